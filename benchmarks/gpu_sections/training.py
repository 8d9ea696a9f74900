"""The real `ldm train` as a process on one rank with ZeRO-1, read through its metrics.jsonl."""

from __future__ import annotations

import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

from gpu_sections.processes import ROOT, environment, kill_family
from gpu_sections.recipe import Setup
from trainer.checkpoint.manifest import MANIFEST_NAME
from trainer.metrics.jsonl import read_records

INTERVALS = 5
"""Log records in the measured steps; the first has no rate and the second still warms up."""
Record = dict[str, Any]


def train_512(setup: Setup) -> None:
    """512 px, global batch 64 in micro-batches of 32: the recipe's step, first save and peak memory."""
    run_training(setup, 512, global_batch=64, micro_batch=32)


def train_256(setup: Setup) -> None:
    """256 px, global batch 256 in micro-batches of 64."""
    run_training(setup, 256, global_batch=256, micro_batch=64)


def startup(setup: Setup) -> None:
    """Seconds to the first optimizer step with the defaults, the doctor's checks included: with no kernel on
    disk, then with those that that start left."""
    _cold_and_warm(setup, [])


def startup_compiled(setup: Setup) -> None:
    """The same with `distributed.compile`."""
    _cold_and_warm(setup, ["distributed.compile=true"])


def _cold_and_warm(setup: Setup, overrides: Sequence[str]) -> None:
    with tempfile.TemporaryDirectory() as cache:
        caches = {"TORCHINDUCTOR_CACHE_DIR": f"{cache}/inductor", "TRITON_CACHE_DIR": f"{cache}/triton"}
        for name in ("cold_first_step_s", "first_step_s"):
            first_step(setup, overrides, name, caches)


def run_training(setup: Setup, edge: int, *, global_batch: int, micro_batch: int) -> None:
    """Report the steady state over `setup.train_steps` steps, then kill the run: nothing else is wanted."""
    every = max(1, setup.train_steps // INTERVALS)
    settings = [
        f"global_batch_size={2 if setup.small else global_batch}",
        f"micro_batch_size={1 if setup.small else micro_batch}",
        f"logging.every={every}",
        "distributed.doctor=false",
        "distributed.watchdog_s=0",
    ]
    with training(setup, edge, settings) as run:
        for records in run.records():
            saved_at = run.saved_at()
            setup.report(**figures(records, every, run.started, saved_at))
            enough = setup.train_steps if saved_at else 2 * setup.train_steps
            if records[-1]["step"] >= enough:
                return


def first_step(
    setup: Setup,
    overrides: Sequence[str],
    name: str,
    variables: Mapping[str, str],
) -> None:
    """Report as `name` when the first step is done, seen from the start of the process."""
    settings = [
        f"global_batch_size={2 if setup.small else 64}",
        f"micro_batch_size={1 if setup.small else 32}",
        "logging.every=1",
        *overrides,
    ]
    with training(setup, 512, settings, variables) as run:
        for records in run.records():
            setup.report(**{name: records[0]["time"] - run.started})
            return


def figures(
    records: Sequence[Record], every: int, started: float, saved_at: float | None = None
) -> dict[str, Any]:
    """Medians over the steady intervals: those that began when the first checkpoint was on disk, if two did.

    The very first interval has no rate, the next one still warms up; the rates of all are there too.
    """
    rated = [record for record in records if "images_per_s" in record]
    steady = rated[1:] or rated
    begun = {after["step"]: before["time"] for before, after in pairwise(records)}
    quiet = [r for r in steady if saved_at is not None and begun[r["step"]] >= saved_at]
    steady = quiet if len(quiet) >= 2 else steady
    result: dict[str, Any] = {
        "first_record_s": records[0]["time"] - started,
        "losses": [record.get("loss") for record in records],
        "memory_gib": records[-1].get("memory_gib"),
        "saved_s": None if saved_at is None else saved_at - started,
    }
    saves = [record["checkpoint/blocked_s"] for record in records if "checkpoint/blocked_s" in record]
    if saves:
        result["first_save_blocked_s"] = saves[0]
    if not steady:
        return result
    step_s = statistics.median(record["step_s"] for record in steady)
    # The first record stands at the end of its interval: its later steps took about what steady ones take.
    result["first_step_s"] = result["first_record_s"] - (every - 1) * step_s
    names = [name for name in steady[-1] if name.startswith("time/") or name in ("data_wait", "step_s")]
    result |= {name: statistics.median(record.get(name, 0.0) for record in steady) for name in names}
    result["images_per_s"] = statistics.median(record["images_per_s"] for record in steady)
    result["rates"] = [record["images_per_s"] for record in rated]
    result["rates_after_the_save"] = [record["images_per_s"] for record in quiet]
    return result


class Training:
    """A started run."""

    def __init__(self, process: subprocess.Popen[bytes], run_dir: Path, log: Path) -> None:
        self.started = time.time()
        self._process = process
        self._run_dir = run_dir
        self._log = log

    def saved_at(self) -> float | None:
        """When the first checkpoint was committed: until then its writer competes with training."""
        manifests = self._run_dir.glob(f"checkpoints/*/{MANIFEST_NAME}")
        return min((path.stat().st_mtime for path in manifests), default=None)

    def records(self) -> Iterator[list[Record]]:
        """All log records so far, each time there is a new one.

        Raises:
            SystemExit: the run ended first; its last words are in the message.
        """
        known = 0
        while True:
            ended = self._process.poll()
            found = [record for record in read_records(str(self._run_dir)) if "event" not in record]
            if len(found) > known:
                known = len(found)
                yield found
            elif ended is not None:
                words = self._log.read_text(errors="replace")[-3000:]
                raise SystemExit(f"ldm train ended with code {ended}:\n{words}")
            time.sleep(0.05)


@contextmanager
def training(
    setup: Setup, edge: int, settings: Sequence[str], variables: Mapping[str, str] | None = None
) -> Iterator[Training]:
    """`ldm train` in a process of its own; killed with everything it started, its folder removed."""
    name = setup.result.stem
    run_dir, log = setup.work / f"run-{name}", setup.result.with_suffix(".train.log")
    command = [
        *(sys.executable, "-m", "trainer", "train", *setup.arguments(edge)),
        f"run_dir={run_dir}",
        "steps=100000",
        "checkpoint.every=0",
        "checkpoint.keep_last=1",  # two of 13.9 GB fit where the doctor looks for room
        "checkpoint.keep_every=0",
        "distributed.ranks=1",
        "distributed.max_restarts=0",
        "logging.wandb=disabled",
        "logging.progress_bar=false",
        f"data.workers={1 if setup.small else 8}",
        *settings,
        *setup.overrides,
    ]
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**environment(), **(variables or {})},
        )
        try:
            yield Training(process, run_dir, log)
        finally:
            kill_family(process.pid)
            process.wait()
            shutil.rmtree(run_dir, ignore_errors=True)
