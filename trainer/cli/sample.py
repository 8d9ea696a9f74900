"""Draw pictures for prompts, with a run's averaged weights unless told otherwise.

Writes 00000.png, 00001.png ... in the order of the prompts, grid.png, and prompts.json.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import json
import typing
from pathlib import Path

import fsspec
import torch
from PIL import Image
from tqdm import tqdm

from trainer.config.checks_diffusion import check_sampling
from trainer.config.run import Config, ConfigError
from trainer.config.training import SamplerName, SamplingConfig
from trainer.metrics.pictures import grid
from trainer.pipeline import load_pipeline
from trainer.sample import generate

EXAMPLE = (
    "example: ldm sample s3://bucket/run --prompt 'a red circle' --sampler dpmpp_2m --steps 20 --out out"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which weights, what to draw, how."""
    parser.add_argument("source", metavar="RUN", help="run folder, checkpoint folder or .safetensors file")
    parser.add_argument("--prompt", action="append", default=[], help="may be given several times")
    parser.add_argument("--prompts-file", help="path or URL of a text file, one prompt per line")
    parser.add_argument(
        "--per-prompt", type=int, default=1, help="pictures per prompt (default: %(default)s)"
    )
    parser.add_argument("--sampler", choices=typing.get_args(SamplerName), help="default: the run's own")
    parser.add_argument("--steps", type=int, help="sampler steps (default: the run's own)")
    parser.add_argument("--guidance", type=float, help="guidance scale; 1 is none (default: the run's own)")
    parser.add_argument("--eta", type=float, help="DDIM stochasticity (default: the run's own)")
    parser.add_argument("--seed", type=int, default=0, help="picture i depends on (seed, i) alone")
    parser.add_argument("--size", metavar="HxW", help="pixels, e.g. 512x768 (default: the training size)")
    parser.add_argument("--batch-size", type=int, default=16, help="pictures at a time")
    parser.add_argument("--weights", help="average to use, or `weights` for the trained ones (default: EMA)")
    parser.add_argument("--checkpoint", type=int, metavar="STEP", help="default: the newest")
    parser.add_argument("--first-stage", help="first-stage weights, where they moved since training")
    parser.add_argument("--out", default="samples", help="folder or URL (default: %(default)s)")


def run(args: argparse.Namespace) -> int:
    """Sample and write."""
    prompts = _prompts(args)
    size = _size(args.size)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    pipeline = load_pipeline(
        args.source,
        profile=args.weights,
        step=args.checkpoint,
        first_stage_weights=args.first_stage,
        device=device,
    )
    config = _with_choices(pipeline.config, args)
    how = config.sampling
    print(f"{pipeline.description}: {how.sampler}, {how.steps} steps, guidance {how.guidance_scale}")
    with tqdm(total=len(prompts), unit="image", desc="sample") as bar:
        pixels = generate(
            config,
            pipeline.network,
            pipeline.conditioner,
            pipeline.first_stage,
            prompts,
            seed=args.seed,
            size=size,
            batch_size=args.batch_size,
            progress=lambda done: bar.update(done - bar.n),
        ).cpu()
    out = args.out.rstrip("/")
    for i, picture in enumerate(pixels):
        _write_png(f"{out}/{i:05d}.png", Image.fromarray(picture.permute(1, 2, 0).numpy()))
    _write_png(f"{out}/grid.png", grid(pixels, tuple(prompts), columns=min(len(prompts), 9)))
    with fsspec.open(f"{out}/prompts.json", "w", auto_mkdir=True) as file:
        json.dump({"seed": args.seed, "source": args.source, "prompts": prompts}, file, indent=1)
    print(f"{len(prompts)} pictures and {out}/grid.png")
    return 0


def _prompts(args: argparse.Namespace) -> list[str]:
    prompts = list(args.prompt)
    if args.prompts_file:
        try:
            with fsspec.open(args.prompts_file, "r") as file:
                prompts += [line.strip() for line in file if line.strip()]
        except FileNotFoundError as error:
            raise ConfigError(f"there is no prompts file {args.prompts_file}.") from error
    if not prompts:
        raise ConfigError("there is nothing to draw; give --prompt or --prompts-file.")
    return [prompt for prompt in prompts for _ in range(args.per_prompt)]


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
    return dataclasses.replace(config, sampling=sampling)


def _write_png(url: str, picture: Image.Image) -> None:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    if "://" not in url:
        Path(url).parent.mkdir(parents=True, exist_ok=True)
    with fsspec.open(url, "wb") as file:
        file.write(buffer.getvalue())
