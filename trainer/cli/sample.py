"""Draw pictures with a run's averaged weights unless told otherwise.

Models are told what they were trained with: prompts, --class-label, --layout, --semantic-map, --depth,
--image (to enlarge) or --image with --mask (to fill). Any other model takes --image to start from
(image-to-image), with --mask to change only a part. Sizes may be larger than trained on.

Writes 00000.png, 00001.png ... in the order of the prompts, grid.png, and prompts.json.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import json
import typing

import torch
from PIL import Image
from tqdm import tqdm

from data_pipeline.errors import NotFound
from data_pipeline.storage.files import write_bytes
from data_pipeline.tools.given import read_prompt, read_prompts
from trainer.cli.conditions_from_files import Wishes, sampling_inputs
from trainer.config.checks_diffusion import check_guidance, check_sampling
from trainer.config.run import Config, ConfigError
from trainer.config.training import SamplerName, SamplingConfig
from trainer.metrics.pictures import grid
from trainer.model import load_model
from trainer.sample import generate

EXAMPLE = (
    "example: ldm sample s3://bucket/run --prompt 'a red circle' --sampler dpmpp_2m --steps 20 --out out"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which weights, what to draw, how."""
    parser.add_argument("source", metavar="RUN", help="run folder, checkpoint folder or .safetensors file")
    parser.add_argument("--prompt", action="append", default=[], help="caption; may be given several times")
    parser.add_argument("--prompts-file", help="path or URL of a text file, one prompt per line")
    parser.add_argument(
        "--per-prompt", type=int, default=1, help="pictures per prompt or label (default: %(default)s)"
    )
    _add_condition_arguments(parser)
    parser.add_argument("--sampler", choices=typing.get_args(SamplerName), help="default: the run's own")
    parser.add_argument("--steps", type=int, help="sampler steps (default: the run's own)")
    parser.add_argument("--guidance", type=float, help="guidance scale; 1 is none (default: the run's own)")
    parser.add_argument("--eta", type=float, help="DDIM stochasticity (default: the run's own)")
    parser.add_argument("--seed", type=int, default=0, help="picture i depends on (seed, i) alone")
    parser.add_argument(
        "--size",
        metavar="HxW",
        help="pixels, e.g. 512x768 (default: that of a given picture, or of training)",
    )
    parser.add_argument("--batch-size", type=int, default=16, help="pictures at a time")
    parser.add_argument("--weights", help="average to use, or `weights` for the trained ones (default: EMA)")
    parser.add_argument("--checkpoint", type=int, metavar="STEP", help="default: the newest")
    parser.add_argument("--first-stage", help="first-stage weights, where they moved since training")
    parser.add_argument(
        "--latent-scale",
        type=float,
        help="first_stage.latent_scale, where neither the run nor the first stage says it",
    )
    parser.add_argument("--out", default="samples", help="folder or URL (default: %(default)s)")


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


def run(args: argparse.Namespace) -> int:
    """Sample and write."""
    wishes = _wishes(args)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    trained = load_model(
        args.source,
        profile=args.weights,
        step=args.checkpoint,
        first_stage_weights=args.first_stage,
        latent_scale=args.latent_scale,
        device=device,
    )
    config = _with_choices(trained.config, args)
    inputs = sampling_inputs(config, wishes)
    how, n = config.sampling, len(inputs.titles)
    print(f"{trained.description}: {how.sampler}, {how.steps} steps, guidance {how.guidance_scale}")
    with tqdm(total=n, unit="image", desc="sample") as bar:
        made = generate(
            config,
            trained.model,
            inputs.request,
            seed=args.seed,
            batch_size=args.batch_size,
            progress=lambda done: bar.update(done - bar.n),
        ).cpu()
    pixels = inputs.paste(made)
    out = args.out.rstrip("/")
    for i, picture in enumerate(pixels):
        _write_png(f"{out}/{i:05d}.png", Image.fromarray(picture.permute(1, 2, 0).numpy()))
    _write_png(f"{out}/grid.png", grid(pixels, inputs.titles, columns=min(n, 9)))
    record = {"seed": args.seed, "source": args.source, "prompts": inputs.request.captions}
    given = {name: value for name, value in dataclasses.asdict(wishes).items() if value and name != "prompts"}
    write_bytes(f"{out}/prompts.json", json.dumps(record | given, indent=1).encode())
    print(f"{n} pictures and {out}/grid.png")
    return 0


def _wishes(args: argparse.Namespace) -> Wishes:
    return Wishes(
        prompts=tuple(_prompts(args)),
        class_labels=tuple(args.class_label),
        layout=args.layout,
        semantic_map=args.semantic_map,
        depth=args.depth,
        image=args.image,
        mask=args.mask,
        strength=args.strength,
        noise_level=args.noise_level,
        size=_size(args.size),
        per_prompt=args.per_prompt,
    )


def _prompts(args: argparse.Namespace) -> list[str]:
    prompts = [read_prompt(text, "--prompt") for text in args.prompt]
    if args.prompts_file:
        try:
            listed = read_prompts(args.prompts_file)
        except NotFound as error:
            raise ConfigError(f"there is no prompts file {args.prompts_file}.") from error
        if not listed:
            raise ConfigError(f"the prompts file {args.prompts_file} holds no prompt; write one a line.")
        prompts += listed
    return prompts


def _size(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    height, _, width = text.partition("x")
    if not (height.isdigit() and width.isdigit()):
        raise ConfigError(f"--size {text} is not HEIGHTxWIDTH, e.g. 512x768.")
    return int(height), int(width)


def _with_choices(config: Config, args: argparse.Namespace) -> Config:
    chosen = {
        "sampler": args.sampler,
        "steps": args.steps,
        "guidance_scale": args.guidance,
        "eta": args.eta,
    }
    given = {name: value for name, value in chosen.items() if value is not None}
    sampling: SamplingConfig = dataclasses.replace(config.sampling, **given)
    check_sampling(config.diffusion, sampling)
    config = dataclasses.replace(config, sampling=sampling)
    check_guidance(config)
    return config


def _write_png(url: str, picture: Image.Image) -> None:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    write_bytes(url, buffer.getvalue())
