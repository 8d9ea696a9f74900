"""Where a run stands: step, speed, loss, time left, checkpoint, faults, ranks, who holds its folder.

Reads the run folder alone, of a run that goes on or has ended, and changes nothing. A run that has not
written for long is said to be silent. Exit code 1 where somebody should look: silent, or gone without a word.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict

from trainer.operation.screen import screen
from trainer.operation.standing import standing

EXAMPLE = "example: ldm status s3://bucket/run --json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """RUN and the output form."""
    parser.add_argument("source", metavar="RUN", help="run folder, a path or a URL")
    parser.add_argument("--json", action="store_true", help="print one JSON object, for programs")


def run(args: argparse.Namespace) -> int:
    """Print one screen or one JSON object."""
    found = standing(args.source)
    print(json.dumps(asdict(found)) if args.json else screen(found))
    return 1 if found.state in ("silent", "gone") else 0
