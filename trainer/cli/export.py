"""Write a run's weights as one safetensors file, averaged ones unless told otherwise.

The file carries the resolved configuration and the latent statistics: it is what first_stage.weights,
init_from and `ldm sample` take. Memory does not grow with the model.
"""

from __future__ import annotations

import argparse

from trainer.checkpoint.export import export

EXAMPLE = "example: ldm export s3://bucket/first_stage_run s3://bucket/first_stage.safetensors"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """From where, to where, which weights."""
    parser.add_argument("source", metavar="RUN", help="run folder or checkpoint folder")
    parser.add_argument("destination", metavar="FILE", help="path or URL of the .safetensors file")
    parser.add_argument(
        "--weights", help="average to write, or `weights` for the trained ones (default: EMA)"
    )
    parser.add_argument("--checkpoint", type=int, metavar="STEP", help="default: the newest")
    parser.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), default="fp32")


def run(args: argparse.Namespace) -> int:
    """Export and say what was written."""
    made = export(args.source, args.destination, profile=args.weights, step=args.checkpoint, dtype=args.dtype)
    print(
        f"{made.destination}: {made.num_parameters / 1e6:.2f} M parameters, {made.num_bytes / 1e6:.1f} MB, "
        f"{made.profile} of step {made.step}"
    )
    return 0
