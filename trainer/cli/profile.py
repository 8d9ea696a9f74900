"""Take a torch profile of a few steps of a running job, without a restart.

The next steps are recorded and written to RUN/profiles/step_N_.../: per chosen rank a chrome trace (open it
in https://ui.perfetto.dev) and a table by kind of operation. What is trained does not change.
"""

from __future__ import annotations

import argparse
import math

from trainer.operation.asking import Patience, profile

EXAMPLE = "example: ldm profile s3://bucket/run --ranks 0,8 --wait 300"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """RUN, which steps of whom, and whether to wait."""
    parser.add_argument("source", metavar="RUN", help="run folder, a path or a URL")
    parser.add_argument("--steps", type=int, default=3, help="optimizer steps to record (default: 3)")
    parser.add_argument(
        "--ranks", type=_ranks, default=(0,), metavar="R,R", help="whose, counted from 0 (default: 0)"
    )
    parser.add_argument(
        "--wait", type=float, nargs="?", const=math.inf, metavar="SECONDS",
        help="return when the files are there, or with code 1 after so many seconds (no number: for ever)",
    )  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Ask, and say what happens."""
    patience = None if args.wait is None else Patience(args.wait)
    ranks = tuple(sorted(set(args.ranks)))
    return 0 if profile(args.source, steps=args.steps, ranks=ranks, patience=patience, tell=print) else 1


def _ranks(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(rank) for rank in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of ranks such as 0,8") from None
