"""One HTML page about a run, for people who would rather look: curves, pictures over time, faults, settings.

Reads the folder of a run that trains or has ended, at any URL, and changes nothing else in it. The page needs
no network.
"""

from __future__ import annotations

import argparse

from data_pipeline.errors import UserError
from data_pipeline.storage.files import write_bytes
from data_pipeline.storage.urls import join
from trainer.metrics.wandb_sink import check_key

EXAMPLE = "example: ldm report s3://bucket/run --out report.html"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which run, and where to."""
    parser.add_argument("run_dir", metavar="RUN", nargs="?", help="run folder, a path or URL")
    parser.add_argument("--out", metavar="FILE", help="path or URL of the page (default: report.html in RUN)")
    parser.add_argument(
        "--workspace",
        metavar="ENTITY/PROJECT",
        help="no page: set up W&B's workspace of this project, with the same curves; with --out, write the "
        "JSON that would be sent, and send nothing",
    )
    parser.add_argument(
        "--pictures", type=int, default=60, metavar="N", help="grids on it at most (default: 60)"
    )


def run(args: argparse.Namespace) -> int:
    """Write the page."""
    if args.pictures < 0:
        raise UserError(f"--pictures={args.pictures} must be at least 0.")
    if (args.run_dir is None) == (args.workspace is None):
        raise UserError("name a RUN to report on, or the --workspace ENTITY/PROJECT to set up.")
    if args.workspace is not None:
        return _workspace(args.workspace, args.out)
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


def _workspace(place: str, out: str | None) -> int:
    try:
        from trainer.report.workspace import as_json, workspace
    except ModuleNotFoundError as error:
        if error.name != "wandb_workspaces":
            raise
        raise UserError("--workspace needs wandb-workspaces: pip install wandb-workspaces") from error
    made = workspace(place)
    if out is not None:
        write_bytes(out, as_json(made).encode())
        print(out)
        return 0
    check_key("ldm report --workspace", "write the JSON with --out")
    try:
        print(made.save().url)
    except Exception as error:
        raise UserError(f"W&B did not take the workspace ({error}); check {place} and the key.") from error
    return 0
