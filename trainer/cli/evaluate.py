"""Measure what a model can do, against data.

reconstruction: PSNR, SSIM and LPIPS of an exported first stage over pictures from shards. LPIPS needs
torchvision's VGG16 (vgg16-397923af.pth), named by --perceptual-weights or in torch's cache.
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
from trainer.config.models import FirstStageConfig
from trainer.config.run import ConfigError
from trainer.evaluation.reconstruction import reconstruction_metrics
from trainer.first_stage.build import load_first_stage
from trainer.first_stage.perceptual import load_perceptual
from trainer.weights import metadata_object, read_metadata

EXAMPLE = (
    "example: ldm evaluate reconstruction s3://bucket/first_stage.safetensors "
    "--shards 's3://bucket/val/*.tar' --perceptual-weights s3://bucket/vgg16-397923af.pth"
)
BATCH = 32


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """One sub-command per kind of model."""
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    command = commands.add_parser("reconstruction", help="PSNR, SSIM and LPIPS of a first stage")
    command.add_argument("weights", metavar="FILE", help="exported first stage (.safetensors)")
    command.add_argument("--shards", required=True, help="URL with braces or wildcards")
    command.add_argument("--samples", type=int, default=5000, help="pictures (default: %(default)s)")
    command.add_argument("--image-size", type=int, default=256, help="edge in pixels (default: %(default)s)")
    command.add_argument(
        "--perceptual-weights",
        metavar="FILE",
        help="VGG16 of LPIPS, a path or URL; `random`: features that are not LPIPS; `none`: leave it out "
        "(default: torchvision's copy in torch's cache)",
    )
    command.add_argument("--out", help="also write the figures as JSON to this path or URL")


def run(args: argparse.Namespace) -> int:
    """Print the figures."""
    stage = load_first_stage(dataclasses.replace(_first_stage_config(args.weights), weights=args.weights))
    perceptual = None
    if args.perceptual_weights != "none":
        perceptual = load_perceptual(args.perceptual_weights, "--perceptual-weights")
    pixels = _pictures(args.shards, args.samples, args.image_size)
    figures = reconstruction_metrics(stage, pixels, perceptual)
    for name, value in figures.items():
        print(f"{name:8} {value:.4f}")
    network = "none" if perceptual is None else perceptual.name
    print(f"perceptual network: {network}")
    if args.out:
        source = {"weights": args.weights, "shards": args.shards, "image_size": args.image_size}
        write_bytes(args.out, json.dumps(figures | {"perceptual_network": network} | source).encode())
    return 0


def _first_stage_config(url: str) -> FirstStageConfig:
    """What a file of `ldm export` or `ldm import` says about its structure.

    Raises:
        ConfigError: it says nothing.
    """
    metadata = read_metadata(url)
    if "config" in metadata:
        return config_from_dict(metadata_object(metadata, "config", url)).first_stage
    if "first_stage" in metadata:
        return config_from_dict({"first_stage": metadata_object(metadata, "first_stage", url)}).first_stage
    raise ConfigError(
        f"{url} does not describe its first stage; name a file of `ldm export` or `ldm import`."
    )


def _pictures(shards: str, samples: int, image_size: int) -> Iterator[Tensor]:
    data = DataConfig(shards=shards, image_size=image_size, require_caption=False, workers=0)
    batches = build_loader(data, seed=0, global_batch_size=BATCH, rank=0, world_size=1, position=None)
    for _ in tqdm(range(-(-samples // BATCH)), unit="batch", desc="reconstruction"):
        yield next(batches).pixels
