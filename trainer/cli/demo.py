"""Train both stages on this machine against a real S3 server, sample, and judge the pictures.

Run again, it resumes whatever is unfinished; --fresh starts over.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from trainer.demo import DemoFailed, run_demo

EXAMPLE = "example: ldm demo --folder .demo steps=3000"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Where, and from scratch or not."""
    parser.add_argument("overrides", nargs="*", metavar="a.b=c", help="settings for the second stage")
    parser.add_argument("--folder", type=Path, default=Path(".demo"), help="everything the demo writes")
    parser.add_argument("--fresh", action="store_true", help="remove the folder first")


def run(args: argparse.Namespace) -> int:
    """Exit code of the first command that failed, or 0."""
    try:
        return run_demo(args.folder.resolve(), fresh=args.fresh, overrides=args.overrides)
    except DemoFailed as failure:
        return failure.code
