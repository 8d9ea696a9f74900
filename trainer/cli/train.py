"""Train what a configuration describes; the same command again resumes the run in its run_dir.

Under torchrun, SLURM or Ray the ranks are taken as given; otherwise distributed.ranks processes are started.
Exit codes: 0 done, 2 a mistake in the configuration or data, others in docs/reliability.md.
"""

from __future__ import annotations

import argparse
import os

from trainer.config.io import load_run
from trainer.launch.local import launch, ranks_are_given
from trainer.launch.rank import leave

EXAMPLE = (
    "example: ldm train configs/sd/sd2_base_256.yaml run_dir=s3://bucket/run "
    "data.shards='s3://bucket/laion/*.tar' first_stage.weights=s3://bucket/kl_f8.safetensors "
    "conditioning.openclip.pretrained=laion2b_s32b_b79k\n"
    "first_stage.weights is what `ldm export` wrote of a run of configs/first_stage, or `ldm import` of a "
    "published one."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """CONFIG and overrides."""
    parser.add_argument("config", metavar="CONFIG", help="YAML file with differences from the defaults")
    parser.add_argument("overrides", nargs="*", metavar="a.b=c", help="settings that win over the file")


def run(args: argparse.Namespace) -> int:
    """Check everything that can be checked without torch, then start the ranks."""
    code = launch(load_run(args.config, args.overrides))
    if ranks_are_given(os.environ):
        leave(code)
    return code
