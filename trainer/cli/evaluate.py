"""Measure what a model can do, against data.

reconstruction: PSNR, SSIM, LPIPS and, with --features, R-FID of an exported first stage over pictures from
shards. LPIPS needs torchvision's VGG16 (vgg16-397923af.pth): --perceptual-weights, or torch's cache.
fidelity: FID, KID, IS, precision, recall, density, coverage, sFID, MIND, CMMD and CLIP score of pictures, or
of a run that it draws from.
statistics: what fidelity needs to know of a reference, once, for use ever after.
sweep: fidelity over guidance scales and sampler steps, each point sampled and measured, as a table.
watch: an evaluator beside a run, which draws from what it commits, measures, and marks the best.

fidelity and statistics run by one process, or over ranks under torchrun or srun, with the same figures.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from contextlib import closing

from data_pipeline.config import DataConfig
from data_pipeline.storage.files import check_writable, write_bytes
from data_pipeline.storage.urls import parent
from trainer.cli import fidelity, fidelity_of_run, sweep, watch
from trainer.config.io import config_from_dict
from trainer.config.models import FirstStageConfig
from trainer.config.run import ConfigError
from trainer.distributed.env import choose_device
from trainer.evaluation.networks import build_networks, identities
from trainer.evaluation.pictures import pictures_once
from trainer.evaluation.reconstruction import reconstruction_metrics
from trainer.evaluation.survey import ReconstructionDistance
from trainer.first_stage.build import load_first_stage
from trainer.first_stage.perceptual import load_perceptual
from trainer.weights import metadata_object, read_metadata

EXAMPLE = (
    "example: ldm evaluate reconstruction s3://bucket/first_stage.safetensors "
    "--shards 's3://bucket/val/*.tar' --perceptual-weights s3://bucket/vgg16-397923af.pth"
)
BATCH = 32
LEAST_EDGE = 16
"""Below it SSIM's windows and LPIPS' layers have nothing to look at."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """One sub-command per kind of model."""
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    command = commands.add_parser("reconstruction", help="PSNR, SSIM and LPIPS of a first stage")
    command.add_argument("weights", metavar="FILE", help="exported first stage (.safetensors)")
    command.add_argument("--shards", required=True, help="URL with braces or wildcards")
    command.add_argument("--samples", type=int, default=5000, help="pictures at most (default: %(default)s)")
    command.add_argument("--image-size", type=int, default=256, help="edge in pixels (default: %(default)s)")
    command.add_argument(
        "--perceptual-weights",
        metavar="FILE",
        help="VGG16 of LPIPS, a path or URL; `random`: features that are not LPIPS; `none`: leave it out "
        "(default: torchvision's copy in torch's cache)",
    )
    command.add_argument("--out", help="also write the figures as JSON to this path or URL")
    fidelity.add_network_arguments(command, "none, no R-FID")
    of_pictures = commands.add_parser(
        "fidelity", help="pictures, or a run, against a reference", epilog=fidelity.FIDELITY_EXAMPLE
    )
    fidelity_of_run.add_arguments(of_pictures)
    fidelity.add_arguments(
        of_pictures,
        commands.add_parser(
            "statistics", help="measure and store a reference", epilog=fidelity.STATISTICS_EXAMPLE
        ),
    )
    sweep.add_arguments(
        commands.add_parser("sweep", help="fidelity over guidance and steps", epilog=sweep.SWEEP_EXAMPLE)
    )
    watch.add_arguments(
        commands.add_parser("watch", help="an evaluator beside a run", epilog=watch.WATCH_EXAMPLE)
    )


def run(args: argparse.Namespace) -> int:
    """Print the figures."""
    verbs = {"reconstruction": _reconstruction, "sweep": sweep.run, "watch": watch.run}
    if args.command == "fidelity":
        if args.sample is not None:
            return fidelity_of_run.run(args)
        fidelity_of_run.check_unused(args)
    return verbs.get(args.command, fidelity.run)(args)


def _reconstruction(args: argparse.Namespace) -> int:
    config = _first_stage_config(args.weights)
    _check_numbers(args, config)
    if args.out is not None:
        check_writable(parent(args.out))
    device = choose_device()
    stage = load_first_stage(dataclasses.replace(config, weights=args.weights), device)
    perceptual = None
    if args.perceptual_weights != "none":
        perceptual = load_perceptual(args.perceptual_weights, "--perceptual-weights").to(device)
    families = fidelity.names(args.features) or []
    options = fidelity.feature_options(args, families, clip_text=False)
    networks = build_networks(options, device) if families else {}
    distance = ReconstructionDistance(networks, device) if families else None
    see = distance.see if distance is not None else lambda pictures, made: None
    data = DataConfig(shards=args.shards, image_size=args.image_size)
    pictures = pictures_once(data, args.samples, batch_size=BATCH, seed=0, purpose="reconstruction")
    with closing(pictures):
        figures = reconstruction_metrics(stage, (batch.to(device) for batch in pictures), perceptual, see)
    if distance is not None:
        figures |= distance.figures()
    if figures["pictures"] < args.samples:
        print(f"ldm: {args.shards} hold no more than {figures['pictures']:.0f} pictures", file=sys.stderr)
    for name, value in figures.items():
        print(f"{name:8} {value:.4f}")
    network = "none" if perceptual is None else perceptual.name
    print(f"perceptual network: {network}")
    for family, each in networks.items():
        print(f"{family}: {each.name}, weights {each.digest[:16]}, {each.sees}")
    if args.out is not None:
        source = {"weights": args.weights, "shards": args.shards, "image_size": args.image_size}
        by = {"perceptual_network": network, "feature_networks": identities(networks)}
        told = figures | by | source
        write_bytes(args.out, json.dumps(told).encode())
    return 0


def _check_numbers(args: argparse.Namespace, config: FirstStageConfig) -> None:
    if args.samples < 1:
        raise ConfigError(f"--samples {args.samples} measures nothing; give at least 1.")
    if config.name == "identity":
        raise ConfigError(
            f"{args.weights} draws pixels without a first stage, so there is nothing to measure."
        )
    factor, most = config.downsampling, DataConfig().max_image_pixels
    if args.image_size**2 > most:
        raise ConfigError(f"--image-size {args.image_size} is more than {most} pixels; choose a smaller one.")
    if args.image_size < LEAST_EDGE or args.image_size % factor:
        raise ConfigError(
            f"--image-size {args.image_size} must be at least {LEAST_EDGE} and a multiple of {factor}, the "
            "first stage's downsampling factor."
        )


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
