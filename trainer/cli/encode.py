"""Fill first_stage.cache ahead of training, on any machine: the run's samples in its order, without the UNet.

Several of these share the work as ranks of a run would, each its part of every batch (a SLURM array: --rank
$SLURM_ARRAY_TASK_ID). What is in the cache is passed over, so the same command again goes on; a run that
trains meanwhile takes what is there and encodes the rest itself.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from contextlib import closing

import torch

from data_pipeline.batch import Batch
from data_pipeline.errors import DataError
from data_pipeline.loader import AnyLoader, Part, build_loader, check_layout, open_dataset
from data_pipeline.moments.entry import Moments
from data_pipeline.moments.writer import MomentsWriter
from trainer.config.checks import check_networks
from trainer.config.io import load_config
from trainer.config.run import Config, ConfigError
from trainer.distributed.env import choose_device
from trainer.distributed.process import configure_process
from trainer.first_stage.build import load_first_stage, place_first_stage
from trainer.first_stage.encode_once import EncodeOnce, moments_cache, open_cache

EXAMPLE = (
    "example: ldm encode configs/sd/sd2_base_512.yaml data.shards='s3://bucket/laion/*.tar' "
    "first_stage.weights=s3://bucket/kl_f8.safetensors conditioning.openclip.pretrained=laion2b_s32b_b79k "
    "first_stage.cache=s3://bucket/cache"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """CONFIG, overrides, and which part of the work."""
    parser.add_argument("config", metavar="CONFIG", help="YAML file of the run")
    parser.add_argument("overrides", nargs="*", metavar="a.b=c", help="settings that win over the file")
    parser.add_argument("--rank", type=int, default=0, help="which of --ranks this is, from 0")
    parser.add_argument("--ranks", type=int, default=1, help="how many of these share the work")
    parser.add_argument("--steps", type=int, help="steps of the run from its first on; default: one epoch")


def run(args: argparse.Namespace) -> int:
    """Encode; 0 when everything is in the cache, 1 when some of it could not be stored."""
    config = load_config(args.config, args.overrides)
    _check(config, args)
    with torch.no_grad():
        served, once = _encode(config, args.rank, args.ranks, args.steps)
    counts, written = served.counts, once.counts
    _say(f"samples           {served.tally.served:,} ({served.tally.rejected.total():,} rejected)")
    _say(f"in the cache      {counts['cache_found']:,} before, {written['written']:,} stored now")
    _say(f"parts             {written['parts']:,}, {written['bytes']:,} bytes")
    left = counts["cache_missed"] - written["written"]
    if left:
        _say(f"not stored        {left:,} (twice in a batch, no room, or as the log says)")
    return 1 if written["failed"] else 0


def _check(config: Config, args: argparse.Namespace) -> None:
    if config.first_stage.cache is None:
        raise ConfigError(
            "first_stage.cache is not set, so there is nothing to fill; name a folder or URL, e.g. "
            "first_stage.cache=s3://bucket/cache."
        )
    if not 0 <= args.rank < args.ranks:
        raise DataError(f"--rank {args.rank} is none of --ranks {args.ranks}; ranks count from 0.")
    if args.steps is not None and args.steps < 1:
        raise DataError(f"--steps {args.steps} is nothing to encode; it must be at least 1.")
    config.sharing(args.ranks)
    check_networks(config)


def _encode(config: Config, rank: int, ranks: int, steps: int | None) -> tuple[AnyLoader, EncodeOnce]:
    """One pass over this rank's share; the loader and the cache, both closed."""
    configure_process(config.distributed)
    device = choose_device(0, 1, bound=False)
    dataset = open_dataset(config.data)
    seed, size = config.seed, config.global_batch_size
    check_layout(config.data, dataset, seed=seed, global_batch_size=size)
    first_stage = load_first_stage(config.first_stage, device)
    place_first_stage(first_stage, config.distributed, device)
    cache = moments_cache(config.first_stage, first_stage)
    allowance = open_cache(config.first_stage, cache)
    writer = MomentsWriter(cache, allowance=None if allowance is None else allowance // ranks, patient=True)
    once = EncodeOnce(first_stage, cache, writer, config.micro_batch_size)
    moments = Moments(config.first_stage.cache_variants, cache)
    epoch = -(-dataset.epoch_samples // size)
    loader = build_loader(
        config.data,
        seed=seed,
        global_batch_size=size,
        part=Part(rank, ranks),
        dataset=dataset,
        moments=moments,
    )
    with closing(once), closing(loader):
        for step in range(steps or epoch):
            batch: Batch = next(loader)
            once.complete(batch.to(device))
            if step % 100 == 0:
                _say(_progress(step, steps or epoch, Counter(loader.counts)))
    return loader, once


def _progress(step: int, steps: int, counts: Counter[str]) -> str:
    return f"step {step:,} of {steps:,}: {counts['cache_found']:,} found, {counts['cache_missed']:,} encoded"


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()
