"""Check, in seconds and on all ranks, that what a configuration needs is there and right.

Gradient parity of this DeepSpeed, torch and ZeRO stage on a tiny twin, all-reduce and storage speed, shards,
memory and disk against the plan, clocks and versions. Exit code 0 when every check passes.
"""

from __future__ import annotations

import argparse

from trainer.config.io import load_run
from trainer.launch.local import launch

EXAMPLE = (
    "example: ldm doctor configs/sd/sd2_base_256.yaml run_dir=s3://bucket/run "
    "data.shards='s3://bucket/laion/*.tar' first_stage.weights=s3://bucket/kl_f8.safetensors "
    "conditioning.openclip.pretrained=laion2b_s32b_b79k"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """CONFIG and overrides."""
    parser.add_argument("config", metavar="CONFIG", help="YAML file")
    parser.add_argument("overrides", nargs="*", metavar="a.b=c", help="settings that win over the file")


def run(args: argparse.Namespace) -> int:
    """Run the checks on the ranks that training would have."""
    return launch(load_run(args.config, args.overrides), "doctor")
