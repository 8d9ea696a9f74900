"""The real `ldm train` as a process on one rank with ZeRO-1, read through its metrics.jsonl."""

from __future__ import annotations

import json
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gpu_sections.processes import ROOT, environment, kill_family
from gpu_sections.recipe import Setup

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
    """Seconds to the first optimizer step with the defaults, the doctor's checks included."""
    first_step(setup, [])


def startup_compiled(setup: Setup) -> None:
    """The same with `distributed.compile`."""
    first_step(setup, ["distributed.compile=true"])


def run_training(setup: Setup, edge: int, *, global_batch: int, micro_batch: int) -> None:
    """Report the steady state over `setup.train_steps` steps, then kill the run: nothing else is wanted."""
    every = max(1, setup.train_steps // INTERVALS)
    settings = [
        f"global_batch_size={2 if setup.small else global_batch}",
        f"micro_batch_size={1 if setup.small else micro_batch}",
        f"logging.every={every}",
        "distributed.doctor=false",
    ]
    with training(setup, edge, settings) as run:
        for records in run.records():
            setup.report(**figures(records, every, run.started))
            if records[-1]["step"] >= setup.train_steps:
                return


def first_step(setup: Setup, overrides: Sequence[str]) -> None:
    """Report when the first step is done, seen from the start of the process."""
    settings = [
        f"global_batch_size={2 if setup.small else 64}",
        f"micro_batch_size={1 if setup.small else 32}",
        "logging.every=1",
        *overrides,
    ]
    with training(setup, 512, settings) as run:
        for records in run.records():
            setup.report(first_step_s=records[0]["time"] - run.started)
            if len(records) >= 2:
                setup.report(second_step_s=records[1]["time"] - records[0]["time"])
                return


def figures(records: Sequence[Record], every: int, started: float) -> dict[str, Any]:
    """Medians over the steady intervals; all of them when there are too few to leave any out."""
    rated = [record for record in records if "images_per_s" in record]
    steady = rated[1:] or rated
    result: dict[str, Any] = {
        "first_record_s": records[0]["time"] - started,
        "losses": [record.get("loss") for record in records],
        "memory_gib": records[-1].get("memory_gib"),
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
    rates = [record["images_per_s"] for record in steady]
    return {**result, "images_per_s": statistics.median(rates), "rates": [r["images_per_s"] for r in rated]}


class Training:
    """A started run."""

    def __init__(self, process: subprocess.Popen[bytes], run_dir: Path, log: Path) -> None:
        self.started = time.time()
        self._process = process
        self._metrics = run_dir / "logs" / "metrics.jsonl"
        self._log = log

    def records(self) -> Iterator[list[Record]]:
        """All log records so far, each time there is a new one.

        Raises:
            SystemExit: the run ended first; its last words are in the message.
        """
        known = 0
        while True:
            ended = self._process.poll()
            lines = self._metrics.read_text().splitlines() if self._metrics.exists() else []
            found = [json.loads(line) for line in lines if line.endswith("}")]
            found = [record for record in found if "event" not in record]
            if len(found) > known:
                known = len(found)
                yield found
            elif ended is not None:
                words = self._log.read_text(errors="replace")[-3000:]
                raise SystemExit(f"ldm train ended with code {ended}:\n{words}")
            time.sleep(0.05)


@contextmanager
def training(setup: Setup, edge: int, settings: Sequence[str]) -> Iterator[Training]:
    """`ldm train` in a process of its own; killed with everything it started, its folder removed."""
    name = setup.result.stem
    run_dir, log = setup.work / f"run-{name}", setup.result.with_suffix(".log")
    command = [
        *(sys.executable, "-m", "trainer", "train", *setup.arguments(edge)),
        f"run_dir={run_dir}",
        "steps=100000",
        "checkpoint.every=0",
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
            command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, env=environment()
        )
        try:
            yield Training(process, run_dir, log)
        finally:
            kill_family(process.pid)
            process.wait()
            shutil.rmtree(run_dir, ignore_errors=True)
