"""Make, look at and index shards."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from data_pipeline.commands import add_commands
from data_pipeline.config import DataConfig
from trainer.config.io import load_config

EXAMPLE = "example: ldm data synthesize s3://bucket/shards --samples 1000"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """One sub-command per task."""
    add_commands(parser.add_subparsers(dest="command", required=True, metavar="COMMAND"), _load)


def run(args: argparse.Namespace) -> int:
    """Hand over to the sub-command."""
    return int(args.func(args))


def _load(path: str, overrides: Sequence[str]) -> tuple[DataConfig, int, int]:
    config = load_config(path, overrides)
    return config.data, config.seed, config.global_batch_size
