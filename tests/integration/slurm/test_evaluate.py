"""A run and its evaluator by one command on a real SLURM cluster: over requeues, and to either end."""

from __future__ import annotations

import json
import re
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.integration.slurm.slurm_cluster import LIMIT_S, Job

pytestmark = [pytest.mark.slurm, pytest.mark.slow]

HERE = "--gpus-per-node=0 --ntasks-per-node=1 --cpus-per-task=1 --oversubscribe"
ENDS = ("COMPLETED", "FAILED", "CANCELLED")


class Pair(Job):
    """A run of these tests' bucket with its evaluator."""

    def __init__(self, slurm: Any, bucket: Any, folder: Path, *settings: str) -> None:
        self.slurm, self.submit_dir = slurm, folder
        (folder / "real").mkdir()
        for seed in range(6):
            pixels = np.random.default_rng(seed).integers(0, 256, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / "real" / f"{seed}.png")
        evaluate = (
            f"--reference {folder / 'real'} --features random --metrics fid --image-size 16 --rule all "
            "--poll-s 0.5 --sample '--count 4 --batch-size 4 --steps 1 --prompt red'"
        )
        command = ["submit", str(bucket.config), f"--sbatch={HERE} --nodes=1", *settings]
        self.environment = {"LDM_RUN_POLL_S": "0.5", "LDM_SKIP_NODE_CHECK": "1"}
        told = self.ldm(*command, f"--evaluate={evaluate}", f"--evaluate-sbatch={HERE}")
        self.number, self.evaluator = re.findall(r"job (\d+)[;,]", told)
        self.folder = folder / "runs" / "slurm" / self.number

    def ldm(self, *arguments: str) -> str:
        """With this test's variables."""
        command = [sys.executable, "-m", "trainer", "slurm", *arguments]
        return str(self.slurm.run(*command, cwd=self.submit_dir, **self.environment))

    @property
    def evaluator_log(self) -> str:
        path = self.submit_dir / f"ldm-evaluate-{self.evaluator}.log"
        return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""

    def until_it_says(self, text: str) -> None:
        limit = time.monotonic() + LIMIT_S
        while text not in self.evaluator_log:
            assert time.monotonic() < limit, self.evaluator_log[-4000:]
            state = self.slurm.field(self.evaluator, "JobState")
            assert state not in ENDS or text in self.evaluator_log, self.evaluator_log[-4000:]
            time.sleep(0.2)

    def evaluator_ends(self) -> None:
        assert self.slurm.wait_state(self.evaluator, *ENDS, timeout_s=LIMIT_S) == "COMPLETED", (
            self.evaluator_log[-6000:]
        )


def measured(run: Any) -> list[int]:
    lines = (run.folder / "evaluation" / "metrics.jsonl").read_text().splitlines()
    return sorted(json.loads(line)["step"] for line in lines)


def test_it_follows_requeues_of_both_and_ends_with_the_last_step(
    slurm: Any, bucket: Any, tmp_path: Path
) -> None:
    run = bucket.run("slurm-evaluated")
    pair = Pair(
        slurm, bucket, tmp_path, f"run_dir={run.url}", "steps=60", "checkpoint={every: 20, keep_last: 9}"
    )
    pair.until(lambda: bool(run.steps()), "the first step")
    slurm.run("scontrol", "requeue", pair.number)
    pair.until_it_says("step 20, ")
    slurm.run("scontrol", "requeue", pair.evaluator)
    pair.finish()
    pair.evaluator_ends()
    assert {20, 40, 60} <= set(measured(run))
    assert int(slurm.field(pair.evaluator, "Restarts")) == 1


def test_it_measures_what_is_left_of_a_run_that_was_cancelled(
    slurm: Any, bucket: Any, tmp_path: Path
) -> None:
    run = bucket.run("slurm-evaluated-cancelled")
    settings = ["steps=1000000", "checkpoint={every: 1000000, keep_last: 9}"]
    pair = Pair(slurm, bucket, tmp_path, f"run_dir={run.url}", *settings)
    pair.until(lambda: bool(run.steps()), "the first step")
    pair.until_it_says("step 0, ")
    slurm.run("scancel", pair.number)
    pair.finish("CANCELLED")
    pair.evaluator_ends()
    assert "of the run is over" in pair.evaluator_log
    assert measured(run) == sorted(run.steps())
    assert measured(run)[-1] > 0, "what it saved when it was cancelled"
