"""slurm/encode.sh on a real SLURM cluster: killed, requeued, cancelled, an array encodes everything once."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.integration.launch_bucket import encoding_config, kept_samples, served_samples
from tests.integration.slurm.slurm_cluster import LIMIT_S, processes

pytestmark = [pytest.mark.slurm, pytest.mark.slow]

SCRIPT = Path(__file__).parents[3] / "slurm" / "encode.sh"
HERE = ("--gpus-per-node=0", "--cpus-per-task=1", "--oversubscribe")
BATCH = 8


class Array:
    """A submitted array."""

    def __init__(self, slurm: Any, folder: Path, *arguments: str, **environment: str) -> None:
        self.slurm, self.folder = slurm, folder
        command = ("sbatch", "--parsable", *HERE, *arguments)
        self.number = slurm.run(*command, cwd=folder, **environment)

    def log(self, task: int) -> str:
        path = self.folder / f"ldm-encode-{self.number}_{task}.log"
        return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""

    def until(self, task: int, condition: Callable[[], bool]) -> None:
        limit = time.monotonic() + LIMIT_S
        while not condition():
            assert time.monotonic() < limit, self.log(task)
            state = self.slurm.field(f"{self.number}_{task}", "JobState")
            assert state not in ("FAILED", "COMPLETED") or condition(), self.log(task)
            time.sleep(0.1)

    def finish(self, task: int, state: str) -> None:
        ends = ("COMPLETED", "FAILED", "CANCELLED")
        reached = self.slurm.wait_state(f"{self.number}_{task}", *ends, timeout_s=LIMIT_S)
        assert reached == state, self.log(task)

    def encoder(self, task: int) -> int:
        """The process of a task."""
        named = {f"SLURM_ARRAY_JOB_ID={self.number}", f"SLURM_ARRAY_TASK_ID={task}"}
        named.add(f"SLURM_CONF={self.slurm.environment['SLURM_CONF']}")
        found = [
            p.pid for p in processes() if {"trainer", "--rank"} <= set(p.words) and named <= p.environment
        ]
        return min(found)


def test_an_array_encodes_everything_once(slurm: Any, bucket: Any, tmp_path: Path) -> None:
    config = encoding_config(bucket, tmp_path)
    # In front of a run that never begins, they come to rest after four of the twelve steps.
    front = [str(config), f"run_dir={tmp_path / 'run'}", "--ahead", "4"]
    array = Array(slurm, tmp_path, "--array=0-1", str(SCRIPT), *front)
    waiting = "step 4: waiting"
    for task in (0, 1):
        array.until(task, lambda task=task: waiting in array.log(task))
    slurm.run("scontrol", "requeue", f"{array.number}_1")
    os.kill(array.encoder(0), signal.SIGKILL)
    for task in (0, 1):
        array.until(task, lambda task=task: array.log(task).count(waiting) == 2)
    share = 4 * BATCH // 2
    assert f"in the cache      0 before, {share} stored now" in array.log(1), "asked to leave, it stored them"
    assert kept_samples(tmp_path).total() == share, "what was killed had stored nothing yet"
    slurm.run("scancel", array.number)
    for task in (0, 1):
        array.finish(task, "CANCELLED")
        array.until(task, lambda task=task: "ended with status 75; job is" in array.log(task))
    found = kept_samples(tmp_path)
    assert (len(found), found.total()) == (2 * share, 2 * share)

    again = Array(slurm, tmp_path, "--array=1-2", str(SCRIPT), str(config))  # numbers need not begin at 0
    for task in (1, 2):
        again.finish(task, "COMPLETED")
    assert kept_samples(tmp_path) == dict.fromkeys(served_samples(config), 1)


def test_a_mistake_ends_a_task_once(slurm: Any, bucket: Any, tmp_path: Path) -> None:
    config = tmp_path / "bad.yaml"
    config.write_text("stepz: 3\n", encoding="utf-8")
    wrong = Array(slurm, tmp_path, "--array=0", str(SCRIPT), str(config))
    gaps = Array(slurm, tmp_path, "--array=0,2", str(SCRIPT), str(config))
    for array, sentence in ((wrong, "unknown key `stepz`"), (gaps, "LDM_ENCODE_PARTS=N")):
        array.finish(0, "FAILED")
        assert slurm.field(f"{array.number}_0", "ExitCode") == "2:0"
        assert slurm.field(f"{array.number}_0", "Restarts") == "0"
        assert sentence in array.log(0)
    outside = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    done = subprocess.run([str(SCRIPT)], capture_output=True, text=True, check=False, env=outside)
    assert done.returncode == 2
    assert re.search(r"usage: sbatch .*encode\.sh", done.stderr)
