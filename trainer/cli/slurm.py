"""Submit runs to SLURM, and see where they stand."""

from __future__ import annotations

import argparse

from trainer.config.run import option_words
from trainer.launch.slurm import add_commands

EXAMPLE = (
    "example: ldm slurm submit configs/sd/sd2_base_256.yaml --sbatch='--nodes=32' run_dir=s3://bucket/run "
    "data.shards='s3://bucket/laion/*.tar' first_stage.weights=s3://bucket/kl_f8.safetensors "
    "conditioning.openclip.pretrained=laion2b_s32b_b79k"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """One sub-command per task."""
    add_commands(parser)


def run(args: argparse.Namespace) -> int:
    """Hand over to the sub-command; an evaluator that cannot work is refused before anything is submitted."""
    if getattr(args, "evaluate", None) is not None:
        # Not at the top: it imports torch, and status is asked often.
        from trainer.cli.watch import check_words

        check_words("RUN", option_words("--evaluate", args.evaluate))
    return int(args.handler(args))
