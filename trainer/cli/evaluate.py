"""Measure what a model can do, against data.

reconstruction: PSNR, SSIM and LPIPS of an exported first stage over pictures from shards.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Iterator

from torch import Tensor
from tqdm import tqdm

from data_pipeline.config import DataConfig
from data_pipeline.loader import build_loader
from data_pipeline.storage.files import write_bytes
from trainer.config.io import config_from_dict
from trainer.evaluation.reconstruction import reconstruction_metrics
from trainer.first_stage.build import load_first_stage
from trainer.first_stage.perceptual import load_perceptual
from trainer.weights import read_metadata

EXAMPLE = "example: ldm evaluate reconstruction s3://bucket/first_stage.safetensors --shards 's3://bucket/val/*.tar'"
BATCH = 32


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """One sub-command per kind of model."""
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    command = commands.add_parser("reconstruction", help="PSNR, SSIM and LPIPS of a first stage")
    command.add_argument("weights", metavar="FILE", help="exported first stage (.safetensors)")
    command.add_argument("--shards", required=True, help="URL with braces or wildcards")
    command.add_argument("--samples", type=int, default=5000, help="pictures (default: %(default)s)")
    command.add_argument("--image-size", type=int, default=256, help="edge in pixels (default: %(default)s)")
    command.add_argument("--out", help="also write the figures as JSON to this path or URL")


def run(args: argparse.Namespace) -> int:
    """Print the figures."""
    config = config_from_dict(json.loads(read_metadata(args.weights)["config"])).first_stage
    stage = load_first_stage(dataclasses.replace(config, weights=args.weights))
    pixels = _pictures(args.shards, args.samples, args.image_size)
    figures = reconstruction_metrics(stage, pixels, load_perceptual(None))
    for name, value in figures.items():
        print(f"{name:8} {value:.4f}")
    if args.out:
        write_bytes(args.out, json.dumps(figures).encode())
    return 0


def _pictures(shards: str, samples: int, image_size: int) -> Iterator[Tensor]:
    data = DataConfig(shards=shards, image_size=image_size, require_caption=False, workers=0)
    batches = build_loader(data, seed=0, global_batch_size=BATCH, rank=0, world_size=1, position=None)
    for _ in tqdm(range(-(-samples // BATCH)), unit="batch", desc="reconstruction"):
        yield next(batches).pixels
