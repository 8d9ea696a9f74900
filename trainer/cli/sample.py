"""Draw pictures with a run's averaged weights unless told otherwise.

Models are told what they were trained with: prompts, --class-label, --layout, --semantic-map, --depth,
--image (to enlarge) or --image with --mask (to fill). Any other model takes --image to start from
(image-to-image), with --mask to change only a part. Sizes may be larger than trained on.

Writes OUT/pictures/00000.png, 00001.png ... in the order of the prompts, OUT/grid.png, and OUT/prompts.json
with all that it takes to make them again, which each picture carries as text too. docs/sampling.md

With --count or --prompts-from it makes sets of any size over ranks, and goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import io
import shlex
import sys
import typing
from collections.abc import Sequence
from contextlib import redirect_stderr
from typing import Any

import torch

from trainer.cli import sample_series
from trainer.cli.conditions_from_files import SamplingInputs
from trainer.cli.sample_asked import BATCH, ask, find_asked, load_asked, notes_on, wishes_of, with_choices
from trainer.config.ranges import types_of
from trainer.config.run import ConfigError, option_words
from trainer.config.training import SamplerName, SamplingConfig
from trainer.console import progress_bar
from trainer.distributed.env import choose_device
from trainer.generation.store import SmallSet
from trainer.sample import draw_all

EXAMPLE = (
    "example: ldm sample s3://bucket/run --prompt 'a red circle' --sampler dpmpp_2m --steps 20 --out out"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which weights, what to draw, how."""
    parser.add_argument("source", metavar="RUN", help="run folder, checkpoint folder or .safetensors file")
    parser.add_argument("--prompt", action="append", default=[], help="caption; may be given several times")
    parser.add_argument(
        "--prompts-file",
        help="path or URL of a text in UTF-8, one prompt per line, or of a table as for --prompts-from",
    )
    parser.add_argument(
        "--negative-prompt", metavar="TEXT", help="what guidance leads away from, in place of no text at all"
    )
    parser.add_argument(
        "--prompt-chunks",
        type=int,
        default=1,
        metavar="N",
        help="read prompts in N parts of 75 tokens instead of cutting them behind the first",
    )
    parser.add_argument(
        "--per-prompt", type=int, default=1, help="pictures per prompt or label (default: %(default)s)"
    )
    _add_condition_arguments(parser)
    _add_sampler_arguments(parser)
    parser.add_argument("--seed", type=int, default=0, help="picture i depends on (seed, i) alone")
    parser.add_argument(
        "--first-index",
        type=int,
        default=0,
        metavar="I",
        help="i of the first picture (default: 0)",
    )
    parser.add_argument(
        "--size",
        metavar="HxW",
        help="pixels, e.g. 512x768 (default: that of a given picture, or of training)",
    )
    parser.add_argument("--batch-size", type=int, help=f"pictures at a time (default: {BATCH})")
    parser.add_argument(
        "--precision",
        choices=("fp32", "bf16"),
        help="default: the run's own on a GPU, fp32 on a CPU",
    )
    parser.add_argument("--weights", help="average to use, or `weights` for the trained ones (default: EMA)")
    parser.add_argument("--checkpoint", type=int, metavar="STEP", help="default: the newest")
    parser.add_argument("--first-stage", help="first-stage weights, where they moved since training")
    parser.add_argument(
        "--latent-scale",
        type=float,
        help="first_stage.latent_scale, where neither the run nor the first stage says it",
    )
    parser.add_argument("--out", default="samples", help="folder or URL (default: %(default)s)")
    parser.add_argument("--overwrite", action="store_true", help="replace another set of pictures in --out")
    sample_series.add_arguments(parser)


def _add_sampler_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--sampler", choices=typing.get_args(SamplerName), help="default: the run's own")
    parser.add_argument("--steps", type=int, help="sampler steps (default: the run's own)")
    parser.add_argument(
        "--spacing",
        choices=typing.get_args(types_of(SamplingConfig)["spacing"]),
        help="which noise levels the steps visit (default: the run's own)",
    )
    parser.add_argument("--guidance", type=float, help="guidance scale; 1 is none (default: the run's own)")
    parser.add_argument(
        "--guidance-rescale",
        type=float,
        metavar="SHARE",
        help="0 to 1: guided predictions keep the deviation of unguided ones (default: the run's own)",
    )
    parser.add_argument("--eta", type=float, help="DDIM stochasticity (default: the run's own)")


def _add_condition_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("conditions", "files are paths or URLs")
    group.add_argument(
        "--class-label", type=int, action="append", default=[], metavar="N", help="class index, -1 for none"
    )
    group.add_argument("--layout", metavar="JSON", help="[[label, x0, y0, x1, y1], ...], corners in 0 .. 1")
    group.add_argument("--semantic-map", metavar="PNG", help="label indices, 255 unlabelled")
    group.add_argument("--depth", metavar="PNG", help="grey depths; range and unit do not matter")
    group.add_argument("--image", metavar="FILE", help="picture to enlarge, to fill, or to start from")
    group.add_argument("--mask", metavar="FILE", help="white where --image is to be made anew")
    group.add_argument(
        "--strength", type=float, help="how much --image may change, 0 .. 1 (default: 0.75; with --mask 1)"
    )
    group.add_argument(
        "--noise-level", type=int, metavar="N", help="noise hiding flaws of a picture to enlarge"
    )
    group.add_argument(
        "--original-size", metavar="HxW", help="SDXL: size before cropping (default: that of the result)"
    )
    group.add_argument("--crop", metavar="TOPxLEFT", help="SDXL: corner of the crop (default: 0x0)")
    group.add_argument("--target-size", metavar="HxW", help="SDXL: size after it (default: of the result)")


def run(args: argparse.Namespace) -> int:
    """Sample and write. Everything that can be wrong is found before the weights are read."""
    _check_numbers(args)
    if sample_series.is_series(args):
        return sample_series.run(args)
    wishes = wishes_of(args)
    device = choose_device()
    asked = ask(args, find_asked(args), wishes, device)
    inputs = asked.inputs
    pictures = SmallSet(args.out, asked.record, _items(args, inputs), overwrite=args.overwrite)
    trained = load_asked(args, asked, device)
    for note in notes_on(trained, inputs.request):
        print(f"note: {note}", file=sys.stderr)
    how = trained.config.sampling
    print(
        f"{trained.description}: {how.sampler}, {how.steps} steps, guidance {how.guidance_scale}, "
        f"{asked.precision}"
    )
    pictures.begin()
    with progress_bar(len(inputs.titles), "image", "sample") as bar:
        for row, made in draw_all(
            trained.config,
            trained.model,
            inputs.request,
            seed=args.seed,
            first_index=args.first_index,
            batch_size=args.batch_size or BATCH,
        ):
            pictures.add(row, inputs.paste(made.cpu()))
            bar.update(len(made))
    print(pictures.finish(inputs.titles))
    return 0


def arguments(
    source: str, options: str, own: Sequence[str], reserved: Sequence[str], program: str
) -> argparse.Namespace:
    """Those of `ldm sample`, for commands that take some of them as one text and draw by themselves.

    Args:
        options: the text.
        own: what the command adds.
        reserved: options that are the command's and may not stand in the text.
        program: the command, for messages.

    Raises:
        ConfigError: one of the reserved is there, or a quotation mark is not closed.
    """
    given = option_words("--sample", options)
    taken = [option for option in given if option.partition("=")[0] in reserved]
    if taken:
        raise ConfigError(f"--sample may not hold {taken[0]}, which is given by {program} itself.")
    words = [source, *given, *own]
    parser = argparse.ArgumentParser(prog=f"{program} --sample")
    add_arguments(parser)
    parsed = parser.parse_args(words)
    parsed.command_line = ["sample", *words]
    return parsed


def same_pictures(options: str, others: str) -> bool:
    """Whether two such texts ask for the same pictures: in any order and spelling, by any batch size."""
    if options == others:
        return True
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    try:
        with redirect_stderr(io.StringIO()):
            asked = [vars(parser.parse_args(["", *shlex.split(text)])) for text in (options, others)]
    except (SystemExit, ValueError):  # one is of another version
        return False
    return asked[0] | {"batch_size": None} == asked[1] | {"batch_size": None}


def check_all(commands: Sequence[argparse.Namespace], device: torch.device) -> None:
    """What can be wrong before weights are read with commands that differ in how they draw alone.

    Raises:
        ConfigError: as `run`, or no sampler can do what one of them says.
    """
    first = commands[0]
    _check_numbers(first)
    if sample_series.is_series(first):
        sample_series.check(first)
        found = sample_series.check_model(first, device)
    else:
        found = find_asked(first)
        ask(first, found, wishes_of(first), device)
    for other in commands[1:]:
        with_choices(found.config, other)


def check_series(args: argparse.Namespace) -> None:
    """What can be wrong with such a set without a look at the model. Raises ConfigError."""
    _check_numbers(args)
    if not sample_series.is_series(args):
        raise ConfigError("say how many pictures are to be drawn, with --count or --prompts-from.")
    sample_series.check(args)


def _check_numbers(args: argparse.Namespace) -> None:
    if not args.out.strip():
        raise ConfigError("--out is empty (a variable that is not set?); name a folder.")
    if args.batch_size is not None and args.batch_size < 1:
        raise ConfigError(f"--batch-size {args.batch_size} must be at least 1.")
    if not 0 <= args.first_index < 1 << 62:
        raise ConfigError(f"--first-index {args.first_index} must be at least 0 and below 2**62.")
    if not 0 <= args.seed < 1 << 63:
        raise ConfigError(f"--seed {args.seed} must be at least 0 and below 2**63.")


def _items(args: argparse.Namespace, inputs: SamplingInputs) -> list[dict[str, Any]]:
    """Of each picture what it does not share with the others."""
    request = inputs.request
    labels = request.conditions.get("class_label")
    return [
        {"prompt": caption, "index": args.first_index + i}
        | ({} if labels is None else {"class_label": int(labels[i])})
        for i, caption in enumerate(request.captions)
    ]
