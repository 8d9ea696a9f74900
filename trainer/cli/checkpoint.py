"""List and verify the checkpoints of a run."""

from __future__ import annotations

import argparse

from trainer.checkpoint.commands import list_checkpoints, verify
from trainer.config.checks_validation import TRAINING_LOSS
from trainer.console import progress_bar, say

EXAMPLE = "example: ldm checkpoint verify s3://bucket/run"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """One sub-command each."""
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    listing = commands.add_parser("list", help="what is there, newest first")
    listing.add_argument("source", metavar="RUN", help="run folder")
    checking = commands.add_parser("verify", help="read every byte and compare checksums")
    checking.add_argument("source", metavar="RUN", help="run folder or one checkpoint's folder")
    checking.add_argument("--checkpoint", type=int, metavar="STEP", help="only this one")


def run(args: argparse.Namespace) -> int:
    """Print one line per checkpoint; `verify` exits with 1 when one is damaged."""
    if args.command == "list":
        for row in list_checkpoints(args.source):
            loss = "-" if row.loss is None else f"{row.loss:.4g}"
            size = f"{row.num_bytes / 1e6:10.1f} MB  {row.num_shards} shard(s)"
            what = f"loss {loss:>9}  {size}  {', '.join(row.networks)}"
            if row.best_metric != TRAINING_LOSS:
                what = f"{row.best_metric} {'-' if row.merit is None else f'{row.merit:.4g}':>9}  {what}"
            print(f"{row.step:>9}  {what if row.complete else f'INCOMPLETE: {row.problem}'}  {row.url}")
        return 0
    damaged = 0
    with progress_bar(None, "checkpoint", "verify") as bar:
        for found in verify(args.source, args.checkpoint):
            damaged += bool(found.problems)
            say(f"{found.step:>9}  {'; '.join(found.problems) or 'good'}  {found.url}")
            bar.update()
    return 1 if damaged else 0
