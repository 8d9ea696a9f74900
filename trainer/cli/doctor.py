"""Check, in seconds and on all ranks, that what a configuration needs is there and right.

Gradient parity of this DeepSpeed, torch and ZeRO stage on a tiny twin, all-reduce and storage speed, shards,
memory and disk against the plan, clocks and versions. Exit code 0 when every check passes.

With --fit it looks for the largest micro-batch instead, by training with it until memory is full: networks
with random weights, black pictures, the ranks of this machine. Exit code 0 when the configured one fits, 2
when it does not.
"""

from __future__ import annotations

import argparse

from trainer.config.io import load_config, load_run
from trainer.config.run import ConfigError
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
    parser.add_argument(
        "--fit", action="store_true", help="find the largest micro-batch that fits, by trying"
    )
    parser.add_argument(
        "--memory",
        type=float,
        default=0.0,
        metavar="GIB",
        help="with --fit: as if each rank had only so much (default: what its device has)",
    )


def run(args: argparse.Namespace) -> int:
    """Run the checks on the ranks that training would have, or try micro-batches on them."""
    if args.fit:
        # Not at the top: the launcher of the checks need not import torch.
        from trainer.launch.fit import find_largest

        return find_largest(load_config(args.config, args.overrides), args.memory)
    if args.memory:
        raise ConfigError("--memory goes with --fit, which tries micro-batches in so much; add --fit.")
    return launch(load_run(args.config, args.overrides), "doctor")
