"""Ask a running job for a clean stop: it saves at its next step boundary, and ends with code 77, for good.

The command that started it resumes it. The request is the file RUN/STOP, which the run removes once it has
saved.
"""

from __future__ import annotations

import argparse
import math

from trainer.operation.asking import Patience, cancel_stop, stop

EXAMPLE = "example: ldm stop s3://bucket/run --wait 600"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """RUN, and whether to wait."""
    parser.add_argument("source", metavar="RUN", help="run folder, a path or a URL")
    parser.add_argument(
        "--wait", type=float, nargs="?", const=math.inf, metavar="SECONDS",
        help="return when it has ended, or with code 1 after so many seconds (without a number: for ever)",
    )  # fmt: skip
    parser.add_argument(
        "--cancel", action="store_true", help="take a request back that nobody has followed yet"
    )


def run(args: argparse.Namespace) -> int:
    """Ask, and say what happens."""
    if args.cancel:
        cancel_stop(args.source, print)
        return 0
    patience = None if args.wait is None else Patience(args.wait)
    return 0 if stop(args.source, patience, print) else 1
