"""One HTML page about a run, for people who would rather look: curves, pictures over time, faults, settings.

Reads the folder of a run that trains or has ended, at any URL, and changes nothing else in it. The page needs
no network.
"""

from __future__ import annotations

import argparse

from data_pipeline.errors import UserError
from data_pipeline.storage.files import write_bytes
from data_pipeline.storage.urls import join

EXAMPLE = "example: ldm report s3://bucket/run --out report.html"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which run, and where to."""
    parser.add_argument("run_dir", metavar="RUN", help="run folder, a path or URL")
    parser.add_argument("--out", metavar="FILE", help="path or URL of the page (default: report.html in RUN)")
    parser.add_argument(
        "--pictures", type=int, default=60, metavar="N", help="grids on it at most (default: 60)"
    )


def run(args: argparse.Namespace) -> int:
    """Write the page."""
    if args.pictures < 0:
        raise UserError(f"--pictures={args.pictures} must be at least 0.")
    try:
        from trainer.report.page import write_page
    except ModuleNotFoundError as error:
        if error.name != "plotly":
            raise
        raise UserError("ldm report draws with plotly; install it with: pip install plotly") from error
    destination = args.out or join(args.run_dir, "report.html")
    write_bytes(destination, write_page(args.run_dir, most_pictures=args.pictures))
    print(destination)
    return 0
