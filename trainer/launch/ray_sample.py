"""`python -m trainer.launch.ray_sample RUN --count N --out URL`: one set of pictures by a whole Ray cluster.

driver        starts share 0, which begins the set, then the others, spread over the nodes; each again where
              it is lost or meets a fault, until all are done
task (Ray's)  `ldm sample --share K/N` as a child process on resources of its own (ray_beside.py)

Shares need nothing of each other: no process group, so a node that goes costs the parts it had under way;
while there is no room for its share, that waits and the others go on. Which share makes a picture changes
nothing about it; the same command again, with any number of them, makes what is missing.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import threading
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import ray

from data_pipeline.errors import Failure
from data_pipeline.storage.files import list_names
from data_pipeline.storage.urls import is_local, join, local_path
from trainer.config.run import ConfigError
from trainer.console import configure_logging
from trainer.exit_codes import ExitCode, classify, normalize, should_restart
from trainer.generation.store import PARTS, former_record
from trainer.launch.ray_beside import PAUSE_S, Command, End, ended, resources, start, stop
from trainer.launch.ray_worker import ROUND_S
from trainer.operation.standing import duration

logger = logging.getLogger(__name__)

_MAX_FAULTS = 3
"""Of a share in a row, while the set does not grow."""
_MOST_SHARES = 100_000
_RESERVED = ("--share", "--ranks", "--overwrite")
_TELL_S = 60.0
"""Between words about how far the set is."""


@dataclass
class _Worker:
    command: Command
    reference: Any = None
    starts: int = 0
    due: float = 0.0
    faults: int = 0
    """In a row, since the set has grown."""
    parts: int = -1
    """Of the set at its last fault."""
    done: bool = False


class Drawing:
    """All shares of one set, to their end."""

    def __init__(self, out: str, commands: Sequence[Command]) -> None:
        self._out = out
        self._shares = [_Worker(command) for command in commands]
        self._job = f"Ray job {uuid.uuid4().hex}"
        self._record: dict[str, Any] | None = None
        self._begun: tuple[float, int] | None = None
        self._told = time.monotonic()
        self._known = 0

    def run(self, asked: threading.Event) -> ExitCode:
        """How the set ends: done, a mistake, too many faults, or as `asked`.

        Raises:
            Failure: the set's folder cannot be read.
        """
        try:
            while not asked.is_set():
                for share in self._over():
                    code = self._note(share, ended(share.reference))
                    if code is not None:
                        return code
                if all(share.done for share in self._shares):
                    return ExitCode.DONE
                self._start_those_due()
                self._tell()
                time.sleep(ROUND_S / 2)
            return ExitCode.PREEMPTED
        finally:
            stop([share.reference for share in self._shares if share.reference is not None])

    def _over(self) -> list[_Worker]:
        running = {share.reference: share for share in self._shares if share.reference is not None}
        if not running:
            return []
        ready, _ = ray.wait(list(running), num_returns=len(running), timeout=0)
        return [running[reference] for reference in ready]

    def _start_those_due(self) -> None:
        """Share 0 alone until the set has begun: others would wait for it, perhaps in the place it needs."""
        if self._record is None:
            self._record = former_record(self._out)
        for share in self._shares if self._record is not None else self._shares[:1]:
            if share.reference is None and not share.done and time.monotonic() >= share.due:
                share.reference = start(share.command, self._job, share.starts, scheduling_strategy="SPREAD")
                share.starts += 1

    def _note(self, share: _Worker, end: End) -> ExitCode | None:
        """What became of a share that is over; the code of the whole where that ends, too."""
        name, share.reference = share.command.name, None
        if end.status == ExitCode.DONE:
            share.done = True
            logger.info("%s is done", name)
            return None
        if not should_restart(end.status):
            logger.error("%s %s%s", name, end.told, end.tail)
            return normalize(end.status)
        parts = self._parts()
        share.faults = 1 if parts > share.parts else share.faults + 1
        share.parts = parts
        if share.faults > _MAX_FAULTS:
            logger.error("%s %s%s\nit has not helped to start it again; giving up", name, end.told, end.tail)
            return ExitCode.RETRYABLE
        logger.warning("%s %s and is started again%s", name, end.told, end.tail)
        share.due = time.monotonic() + PAUSE_S
        return None

    def _parts(self) -> int:
        """Of the set that have their records, as far as is known."""
        try:
            self._known = len(list_names(join(self._out, PARTS)))
        except Failure as error:  # the shares ride out what storage does; they, not this, end the set
            logger.warning("%s", error)
        return self._known

    def _tell(self) -> None:
        """How far the set is, by its parts, of which the last one may be small."""
        if time.monotonic() - self._told < _TELL_S:
            return
        self._told = time.monotonic()
        if self._record is None:
            logger.info("waiting for a place for share 0, or for it to begin the set in %s", self._out)
            return
        parts = self._parts()
        count, size = self._record.get("count", 0), self._record.get("part_size", 0)
        done = min(count, parts * size)
        if self._begun is None:
            self._begun = (self._told, done)
        since, before = self._told - self._begun[0], self._begun[1]
        left = f", {duration((count - done) * since / (done - before))} left" if done > before else ""
        logger.info("%s of %s pictures%s", f"{done:,}", f"{count:,}", left)


def main(argv: Sequence[str] | None = None) -> int:
    """The driver: exit codes are those of `ldm sample`."""
    args = _parser().parse_args(argv)
    configure_logging()
    asked = threading.Event()
    try:
        out = _check(args)
        ray.init(log_to_driver=True, logging_level=logging.WARNING)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, lambda *_: asked.set())
        gpus = int(ray.cluster_resources().get("GPU", 0))
        count = (gpus or 1) if args.workers is None else args.workers
        place = resources(args.on or ("gpu" if gpus else "cpu"), args.cpus_per_worker)
        words = ("sample", args.source, *args.options, "--share")
        commands = [Command(f"share {k}", (*words, f"{k}/{count}"), out, None, **place) for k in range(count)]
        code = Drawing(out, commands).run(asked)
    except Failure as error:
        sys.stderr.write(f"ldm: {error}\n")
        return classify(error)
    logger.info("the set in %s ends: %s", out, code.name.lower())
    return code


def _check(args: argparse.Namespace) -> str:
    """Where the set is to lie. Raises ConfigError for what need not reach the cluster to be seen."""
    if args.workers is not None and not 1 <= args.workers <= _MOST_SHARES:
        raise ConfigError(f"--workers {args.workers} must lie in 1 .. {_MOST_SHARES}.")
    given = [word.partition("=")[0] for word in args.options if word.startswith("--")]
    for option in _RESERVED:
        if any(option.startswith(name) and len(name) > 2 for name in given):
            raise ConfigError(
                f"{option} is not for ray_sample: --workers says how many shares there are, and a set that "
                "is to go is removed before."
            )
    for option in ("--workers", "--on", "--cpus-per-worker"):
        if option in given:
            raise ConfigError(f"{option} is none of `ldm sample`; write it before RUN.")
    if not {"--count", "--prompts-from"} & set(given):
        raise ConfigError("say how many pictures are to be drawn, with --count or --prompts-from.")
    parser = argparse.ArgumentParser(prog="ray_sample", add_help=False, allow_abbrev=False)
    parser.add_argument("--out", default="")
    out: str = parser.parse_known_args(args.options)[0].out.strip()
    if not out or (is_local(out) and not os.path.isabs(local_path(out))):
        raise ConfigError(
            f"--out {out or 'is not given'}: each node would write to a folder of its own; name a URL, or "
            "the whole path of a folder that all nodes share."
        )
    return out.rstrip("/") or out


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m trainer.launch.ray_sample",
        description="Draw one set of pictures on a Ray cluster; the same command goes on where it stopped.",
        epilog="example: ray job submit --working-dir . -- python -m trainer.launch.ray_sample --workers 64 "
        "s3://bucket/run --count 30000 --prompts-from s3://bucket/prompts.txt --out s3://bucket/sets/coco",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--workers", type=int, metavar="N", help="shares (default: one per GPU, or one)")
    parser.add_argument(
        "--on",
        metavar="cpu|gpu|KIND",
        help="KIND: of GPU, as Ray calls it, e.g. L4 (default: gpu where the cluster has any)",
    )
    parser.add_argument("--cpus-per-worker", type=float, default=1.0, help="CPUs reserved for each share")
    parser.add_argument("source", metavar="RUN", help="run folder, checkpoint folder or .safetensors file")
    parser.add_argument(
        "options", nargs=argparse.REMAINDER, metavar="...", help="options of `ldm sample`, which stand last"
    )
    return parser


if __name__ == "__main__":
    # Through the import system, so that Ray pickles functions by name and not by value.
    from trainer.launch import ray_sample as launcher

    sys.exit(launcher.main())
