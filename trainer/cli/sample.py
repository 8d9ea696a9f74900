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
import dataclasses
import importlib.metadata
import re
import sys
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from data_pipeline.errors import NotFound
from data_pipeline.tools.given import read_prompt
from data_pipeline.tools.prompts import prompts_of
from trainer.cli import sample_series
from trainer.cli.conditions_from_files import SamplingInputs, Wishes, sampling_inputs
from trainer.cli.picture_set import PictureSet
from trainer.conditioning.build import TEXT
from trainer.config.checks_diffusion import check_guidance, check_sampling
from trainer.config.run import Config, ConfigError
from trainer.config.training import SamplerName, SamplingConfig
from trainer.distributed.env import DistributedEnv
from trainer.model import DiffusionModel, ModelFound, find_model, load_model
from trainer.provenance import git_commit
from trainer.sample import Request, draw_all

EXAMPLE = (
    "example: ldm sample s3://bucket/run --prompt 'a red circle' --sampler dpmpp_2m --steps 20 --out out"
)
BATCH = 16
MAX_NOTES = 5
"""Prompts that are told to be too long, one by one."""


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
    parser.add_argument("--batch-size", type=int, help="pictures at a time (default: 16)")
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
        choices=typing.get_args(typing.get_type_hints(SamplingConfig)["spacing"]),
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
        return sample_series.run(args, _reading())
    wishes = _wishes(args)
    found = find_model(
        args.source,
        profile=args.weights,
        step=args.checkpoint,
        first_stage_weights=args.first_stage,
        latent_scale=args.latent_scale,
    )
    config = _with_choices(found.config, args)
    inputs = sampling_inputs(config, wishes)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    precision = args.precision or (config.distributed.precision if device.type == "cuda" else "fp32")
    record = _record(args, wishes, inputs, config, found, device, precision)
    pictures = PictureSet(args.out, record, _items(args, inputs), overwrite=args.overwrite)
    trained = load_model(
        args.source,
        profile=args.weights if found.step is None else found.profile,
        step=found.step,
        first_stage_weights=args.first_stage,
        latent_scale=args.latent_scale,
        device=device,
        precision=precision,
    )
    for note in long_prompts(trained.model, inputs.request):
        print(f"note: {note}", file=sys.stderr)
    how, n = config.sampling, len(inputs.titles)
    print(
        f"{found.description}: {how.sampler}, {how.steps} steps, guidance {how.guidance_scale}, {precision}"
    )
    pictures.begin()
    with tqdm(total=n, unit="image", desc="sample") as bar:
        for row, made in draw_all(
            config,
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


def arguments(words: Sequence[str], program: str) -> argparse.Namespace:
    """Those of `ldm sample`, for commands that take some of them and draw by themselves."""
    parser = argparse.ArgumentParser(prog=program)
    add_arguments(parser)
    parsed = parser.parse_args(words)
    parsed.command_line = ["sample", *words]
    return parsed


def make_series(args: argparse.Namespace, env: DistributedEnv) -> None:
    """A set of any size on the ranks that there are, for commands that measure it. Collective."""
    sample_series.make(args, _reading(), env)


def check_series(args: argparse.Namespace) -> None:
    """What can be wrong with such a set without a look at the model. Raises ConfigError."""
    _check_numbers(args)
    if not sample_series.is_series(args):
        raise ConfigError("say how many pictures are to be drawn, with --count or --prompts-from.")
    sample_series.check(args)


def _reading() -> sample_series.Reading:
    return sample_series.Reading(_wishes, _with_choices, _record, long_prompts)


def long_prompts(model: DiffusionModel, request: Request) -> list[str]:
    """A sentence for each caption that is longer than the model reads; after a few, one for the rest."""
    notes = []
    for caption in dict.fromkeys((*request.captions, *request.negative)):
        for condition in model.conditioner.conditions.values():
            count, at_once = condition.text_tokens(caption)
            if count > at_once * request.text_chunks:
                remedy = "shorten it"
                if isinstance(condition.frozen, nn.Module):
                    remedy += f", or give --prompt-chunks {-(-count // at_once)}"
                notes.append(
                    f"{caption[:60]!r} has {count} tokens and the model reads the first "
                    f"{at_once * request.text_chunks}; {remedy}."
                )
                break
    more = len(notes) - MAX_NOTES
    return notes if more <= 0 else [*notes[:MAX_NOTES], f"{more} more prompts are longer than that, too."]


def _check_numbers(args: argparse.Namespace) -> None:
    if not args.out.strip():
        raise ConfigError("--out is empty (a variable that is not set?); name a folder.")
    if args.batch_size is not None and args.batch_size < 1:
        raise ConfigError(f"--batch-size {args.batch_size} must be at least 1.")
    if not 0 <= args.first_index < 1 << 62:
        raise ConfigError(f"--first-index {args.first_index} must be at least 0 and below 2**62.")
    if not 0 <= args.seed < 1 << 64:
        raise ConfigError(f"--seed {args.seed} must be at least 0 and below 2**64.")


def _record(
    args: argparse.Namespace,
    wishes: Wishes,
    inputs: SamplingInputs,
    config: Config,
    found: ModelFound,
    device: torch.device,
    precision: str,
) -> dict[str, Any]:
    """Everything that the pictures are a function of; lists where they differ."""
    how, request = config.sampling, inputs.request
    given = {name: value for name, value in dataclasses.asdict(wishes).items() if value and name != "prompts"}
    if request.start is not None:  # also where nobody said it
        given["strength"] = request.start.strength
    if "noise_level" in request.conditions:
        given["noise_level"] = int(request.conditions["noise_level"][0])
    return {
        "source": args.source,
        "checkpoint": found.step,
        "profile": found.profile,
        "first_stage": config.first_stage.weights,
        "latent_scale": config.first_stage.latent_scale,
        "seed": args.seed,
        "first_index": args.first_index,
        "prompts": list(request.captions),
        **{name: list(value) if isinstance(value, tuple) else value for name, value in given.items()},
        "size": "x".join(map(str, request.size or ())),
        "files": inputs.checksums,
        "sampler": how.sampler,
        "steps": how.steps,
        "spacing": how.spacing,
        "eta": how.eta,
        "guidance": how.guidance_scale,
        "guidance_rescale": how.guidance_rescale,
        "precision": precision,
        "versions": {
            "ldm": importlib.metadata.version("latent-diffusion-trainer"),
            "commit": git_commit(Path(__file__).resolve().parent, mark_changes=True) or "unknown",
            "torch": torch.__version__,
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        },
    }


def _items(args: argparse.Namespace, inputs: SamplingInputs) -> list[dict[str, Any]]:
    """Of each picture what it does not share with the others."""
    request = inputs.request
    labels = request.conditions.get("class_label")
    return [
        {"prompt": caption, "index": args.first_index + i}
        | ({} if labels is None else {"class_label": int(labels[i])})
        for i, caption in enumerate(request.captions)
    ]


def _wishes(args: argparse.Namespace) -> Wishes:
    return Wishes(
        prompts=tuple(_prompts(args)),
        negative_prompt=read_prompt(args.negative_prompt or "", "--negative-prompt"),
        prompt_chunks=args.prompt_chunks,
        class_labels=tuple(args.class_label),
        layout=args.layout,
        semantic_map=args.semantic_map,
        depth=args.depth,
        image=args.image,
        mask=args.mask,
        strength=args.strength,
        noise_level=args.noise_level,
        size=_pair(args.size, "--size"),
        original_size=_pair(args.original_size, "--original-size"),
        crop=_pair(args.crop, "--crop"),
        target_size=_pair(args.target_size, "--target-size"),
        per_prompt=args.per_prompt,
    )


def _prompts(args: argparse.Namespace) -> list[str]:
    prompts = [read_prompt(text, "--prompt") for text in args.prompt]
    if args.prompts_file is not None:
        try:
            listed = prompts_of(args.prompts_file)
        except NotFound as error:
            raise ConfigError(f"there is no prompts file {args.prompts_file}.") from error
        if not listed:
            raise ConfigError(f"the prompts file {args.prompts_file} holds no prompt; write one a line.")
        prompts += listed
    return prompts


def _pair(text: str | None, flag: str) -> tuple[int, int] | None:
    if text is None:
        return None
    match = re.fullmatch(r"([0-9]{1,6})x([0-9]{1,6})", text)
    if match is None:
        raise ConfigError(f"{flag} {text} is not two numbers of pixels, the vertical one first: 512x768.")
    return int(match[1]), int(match[2])


def _with_choices(config: Config, args: argparse.Namespace) -> Config:
    chosen = {
        "sampler": args.sampler,
        "steps": args.steps,
        "spacing": args.spacing,
        "guidance_scale": args.guidance,
        "guidance_rescale": args.guidance_rescale,
        "eta": args.eta,
    }
    given = {name: value for name, value in chosen.items() if value is not None}
    sampling: SamplingConfig = dataclasses.replace(config.sampling, **given)
    check_sampling(config.diffusion, sampling)
    config = dataclasses.replace(config, sampling=sampling)
    check_guidance(config, told=TEXT if args.negative_prompt else ())
    if args.negative_prompt and sampling.guidance_scale == 1.0:
        raise ConfigError("--negative-prompt needs guidance to lead away from it; give --guidance above 1.")
    return config
