"""Reconstruct the average of any length, after the run, from stored snapshots (EDM2's post-hoc EMA).

The run needs ema.power_stds (two of them) and ema.snapshot_every.
"""

from __future__ import annotations

import argparse

from trainer.ema_reconstruction import reconstruct

EXAMPLE = "example: ldm ema s3://bucket/run s3://bucket/ema_0.07.safetensors --std 0.07"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """From which run, to where, which average."""
    parser.add_argument("source", metavar="RUN", help="run folder")
    parser.add_argument("destination", metavar="FILE", help="path or URL of the .safetensors file")
    parser.add_argument("--std", type=float, required=True, help="relative width of the average, e.g. 0.07")
    parser.add_argument("--step", type=int, help="end of the average (default: the newest snapshot)")
    parser.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), default="fp32")


def run(args: argparse.Namespace) -> int:
    """Reconstruct and report."""
    made = reconstruct(args.source, args.destination, std=args.std, step=args.step, dtype=args.dtype)
    print(
        f"{made.destination}: {made.num_bytes / 1e6:.1f} MB, the average of relative width {made.std:g} at "
        f"step {made.step}, from {made.num_averages} stored ones (relative error {made.error:.2g})"
    )
    return 0
