"""`ldm evaluate fidelity RUN --sample OPTIONS`: draws the pictures that it measures.

They lie in --pictures-out, where the same command goes on after a kill and finds them again; without it in a
temporary folder that is removed once they are measured.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from data_pipeline.processes import scratch_folder
from data_pipeline.storage.urls import join
from trainer.cli import sample, sample_series
from trainer.cli.fidelity import Measuring, check, check_places, report, stored
from trainer.config.run import ConfigError
from trainer.distributed import collectives
from trainer.distributed.env import DistributedEnv
from trainer.evaluation.survey import pictures_to_measure
from trainer.generation.store import PICTURES, former_record
from trainer.launch.command import run_on_ranks
from trainer.launch.local import ranks_are_given

_OURS = ("--out", "--overwrite", "--ranks", "--share")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What is drawn, and where it goes."""
    group = parser.add_argument_group("pictures of a run", "drawn here, then measured")
    group.add_argument(
        "--sample",
        metavar="OPTIONS",
        help="of `ldm sample`, as one text, for a run or a file of weights in place of PICTURES; --count or "
        "--prompts-from at least",
    )
    group.add_argument(
        "--pictures-out",
        metavar="FOLDER",
        help="keep them there, and go on there after a kill (default: a temporary folder)",
    )
    group.add_argument(
        "--ranks", type=int, default=0, help="local processes (default: one per visible GPU, or one)"
    )


def check_unused(args: argparse.Namespace) -> None:
    """Raises ConfigError: options for drawing where nothing is drawn."""
    for option, given in (("--pictures-out", args.pictures_out is not None), ("--ranks", args.ranks != 0)):
        if given:
            raise ConfigError(f"{option} is for pictures that are drawn first; give --sample, too.")


def run(args: argparse.Namespace) -> int:
    """Draw and measure on all ranks."""
    check(args)
    if args.pictures_out is not None and not args.pictures_out.strip():
        raise ConfigError("--pictures-out is empty (a variable that is not set?); name a folder.")
    sample.check_series(_drawing(args, args.pictures_out or "pictures"))
    if args.pictures_out is None and ranks_are_given(os.environ):
        raise ConfigError(
            "ranks of torchrun or srun need one folder for what they draw; name it with --pictures-out."
        )
    with _folder(args) as folder:
        words = [*args.command_line, f"--pictures-out={folder}"]
        return run_on_ranks(words, args.ranks, lambda env: _draw_and_measure(args, folder, env))


@contextmanager
def _folder(args: argparse.Namespace) -> Iterator[str]:
    """Where the pictures go; the process that starts ranks removes what is temporary after them."""
    if args.pictures_out is not None:
        yield args.pictures_out
        return
    with scratch_folder("ldm-fidelity-") as scratch:
        yield scratch


def _draw_and_measure(args: argparse.Namespace, folder: str, env: DistributedEnv) -> None:
    """Collective. Drawing comes last, before it the reference: what else can be wrong is known by then."""
    collectives.from_main_rank(lambda: check_places(args))
    collectives.from_main_rank(lambda: sample_series.check_set(_drawing(args, folder), env.device))
    real = stored(args.reference)
    measuring = Measuring(args, [real] if real else [], env.device)
    real = real or measuring.statistics(pictures_to_measure(args.reference), reference=True)
    sample_series.make(_drawing(args, folder), env)
    made = measuring.statistics(pictures_to_measure(join(folder, PICTURES)))

    def tell() -> None:
        assert made is not None
        drawn = former_record(folder.rstrip("/") or folder) or {}
        source = f"{args.pictures}, {_which(drawn)}"
        named = dataclasses.replace(made, record=dataclasses.replace(made.record, source=source))
        report(args, named, real, env.device, drawn=drawn)

    collectives.from_main_rank(tell)


def _which(drawn: dict[str, Any]) -> str:
    """The weights of a set, for people."""
    step = drawn.get("checkpoint")
    return f"step {'?' if step is None else step}, {drawn.get('profile')}"


def _drawing(args: argparse.Namespace, folder: str) -> argparse.Namespace:
    """What `ldm sample` is to do."""
    return sample.arguments(args.pictures, args.sample, ["--out", folder], _OURS, "ldm evaluate fidelity")
