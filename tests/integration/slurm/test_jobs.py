"""Whole runs on a real SLURM cluster, against a real S3 server: requeued, killed, refused, excluded."""

from __future__ import annotations

import itertools
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.slurm, pytest.mark.slow]

REPOSITORY = Path(__file__).parents[3]
SCRIPT = REPOSITORY / "slurm" / "train_ldm.sh"
# This cluster has no GPUs and shares its nodes; everything else is the script as it stands.
HERE = ("--gpus-per-node=0", "--ntasks-per-node=1", "--oversubscribe", "--nodes=2")
LIMIT_S = 1500.0
DEMO_CONFIG = REPOSITORY / "configs" / "demo_first_stage.yaml"
# The tests' bucket; a rate that does not depend on the number of steps; the discriminator's part as well.
DEMO_OVERRIDES = [
    "data.allow_enlarging=true",  # the bucket's pictures are small
    "data.shards=s3://ldm/shards/*.tar",
    "optimizer.schedule=constant",
    "autoencoder_loss.discriminator_start=5",
    "logging.every=1",
    "logging.wandb=disabled",
    "sampling.every=0",
]


class Job:
    """One submitted job: its state, its folder, its log."""

    def __init__(self, slurm: Any, submit_dir: Path, *arguments: str, **environment: str) -> None:
        submit_dir.mkdir(parents=True, exist_ok=True)
        self.slurm, self.submit_dir = slurm, submit_dir
        command = ["sbatch", "--parsable", *HERE, *arguments]
        self.number = slurm.run(*command, cwd=submit_dir, **environment)
        self.folder = submit_dir / "runs" / "slurm" / self.number

    @property
    def log(self) -> str:
        path = self.submit_dir / f"ldm-{self.number}.log"
        return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""

    @property
    def attempts(self) -> list[dict[str, Any]]:
        path = self.folder / "attempts.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def rank_log(self, attempt: int, rank: int = 0) -> str:
        path = self.folder / f"attempt-{attempt}" / f"rank-{rank:04d}.log"
        return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""

    def ldm(self, *arguments: str) -> str:
        """What `ldm slurm ...` says in the folder of the submission."""
        command = [sys.executable, "-m", "trainer", "slurm", *arguments]
        return str(self.slurm.run(*command, cwd=self.submit_dir))

    def until(self, condition: Callable[[], bool], what: str) -> None:
        limit = time.monotonic() + LIMIT_S
        while not condition():
            assert time.monotonic() < limit, f"never saw {what}:\n{self.log[-4000:]}"
            state = self.slurm.field(self.number, "JobState")
            over = state in ("FAILED", "COMPLETED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
            assert not over or condition(), f"{state} before {what}:\n{self.log[-6000:]}"
            time.sleep(0.1)

    def rank_pid(self, rank: int) -> int:
        """The process that SLURM started as this rank, on whichever node."""
        # The configuration as well: another cluster of these tests may count its jobs at the same time.
        cluster = self.slurm.environment["SLURM_CONF"]
        named = {"SLURM_CONF": cluster, "SLURM_JOB_ID": self.number, "SLURM_PROCID": rank}
        wanted = {f"{name}={value}".encode() for name, value in named.items()}
        for process in Path("/proc").iterdir():
            try:
                words = (process / "cmdline").read_bytes().split(b"\0")
                if b"trainer" not in words or b"train" not in words:
                    continue
                if wanted <= set((process / "environ").read_bytes().split(b"\0")):
                    return int(process.name)
            except (OSError, ValueError):
                continue
        raise AssertionError(f"rank {rank} of job {self.number} is not running")

    def finish(self, state: str = "COMPLETED") -> None:
        final = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
        reached = self.slurm.wait_state(self.number, *final, timeout_s=LIMIT_S)
        assert reached == state, self.log[-6000:]


def test_killed_rank_leads_to_a_requeue_and_the_same_end(
    slurm: Any, bucket: Any, unbroken: Any, tmp_path: Path
) -> None:
    run = bucket.run("slurm-kill")
    job = Job(slurm, tmp_path, str(SCRIPT), str(bucket.config), f"run_dir={run.url}", LDM_WAIT_S="40")
    job.until(lambda: max(run.steps(), default=0) >= 10, "a checkpoint")
    assert f"{job.number}  RUNNING on n[" in job.ldm("status", job.number)
    os.kill(job.rank_pid(1), signal.SIGKILL)
    job.finish()
    status = job.ldm("status", job.number)
    assert "1 x retryable" in status, status
    assert "step 40 of 40" in status, status
    assert "resuming from step" in job.ldm("logs", job.number, "--lines=0")
    assert [attempt["outcome"] for attempt in job.attempts] == ["retryable", "done"], job.log
    assert job.attempts[0]["blamed"] == [_second_node(job.attempts[0]["nodes"])]
    assert slurm.field(job.number, "Restarts") == "1"
    assert run.losses() == unbroken.losses()
    assert run.fingerprint() == unbroken.fingerprint()


def test_requeued_by_hand_and_by_the_time_limit_it_resumes_and_finishes(
    slurm: Any, bucket: Any, tmp_path: Path
) -> None:
    settings = [*DEMO_OVERRIDES, "checkpoint.every=1000"]
    one_go = bucket.train_here("demo-one-go", *settings, "steps=20", config=DEMO_CONFIG)
    gaps = [b["time"] - a["time"] for a, b in _neighbours(one_go.records())]
    # Long enough for SLURM to look at time limits, every 30 s, also when the machine gets faster meanwhile.
    steps = max(200, int(75 / statistics.median(gaps)))
    run = bucket.run("slurm-requeue")
    settings += [f"run_dir={run.url}", f"steps={steps}"]
    limit = ["--time=60", "--signal=USR1@115"]
    config = tmp_path / "given.yaml"
    config.write_text(DEMO_CONFIG.read_text(encoding="utf-8"), encoding="utf-8")
    job = Job(slurm, tmp_path, *limit, str(SCRIPT), "given.yaml", *settings)
    job.until(lambda: bool(run.steps()), "the first step")
    config.write_text("what was submitted is what runs\n", encoding="utf-8")
    time.sleep(2)
    slurm.run("scontrol", "requeue", job.number)
    job.until(lambda: "resuming from step" in job.rank_log(2), "the second attempt")
    first = _resumed_at(job.rank_log(2))
    assert first > 0, "the requeue ended the ranks before they could save"

    started = time.time() - slurm_seconds(slurm.field(job.number, "RunTime"))
    # One to two minutes are left: the signal is due at once, and there is time to save.
    minutes = int((time.time() - started) // 60) + 2
    slurm.run("scontrol", "update", f"JobId={job.number}", f"TimeLimit={minutes}")
    job.until(lambda: len(job.attempts) > 1 or "SIGUSR1" in job.rank_log(2), "the signal")
    job.until(lambda: len(job.attempts) > 0 and job.attempts[-1]["attempt"] == 2, "the end of the attempt")
    assert job.attempts[-1]["outcome"] == "preempted", job.log[-3000:]
    slurm.run("scontrol", "update", f"JobId={job.number}", "TimeLimit=60")
    job.finish()
    assert _resumed_at(job.rank_log(3)) > first
    assert job.attempts[-1]["outcome"] == "done"
    losses = run.losses()
    assert sorted(losses) == list(range(1, steps + 1))
    assert {step: losses[step] for step in one_go.losses()} == one_go.losses()


def test_cancelled_means_saved_and_not_requeued(slurm: Any, bucket: Any, tmp_path: Path) -> None:
    run = bucket.run("slurm-cancel")
    settings = [f"run_dir={run.url}", "steps=100000", "checkpoint.every=100000"]
    job = Job(slurm, tmp_path, str(SCRIPT), str(bucket.config), *settings)
    job.until(lambda: bool(run.steps()), "the first step")
    time.sleep(2)
    slurm.run("scancel", job.number)
    job.finish("CANCELLED")
    limit = time.monotonic() + 60
    while not job.attempts:
        assert time.monotonic() < limit, job.log
        time.sleep(0.2)
    assert run.steps()[0] > 0
    assert slurm.field(job.number, "JobState") == "CANCELLED"
    assert slurm.field(job.number, "Restarts") == "0"


def test_a_node_that_fails_twice_is_excluded(slurm: Any, bucket: Any, tmp_path: Path) -> None:
    check = tmp_path / "site_check.sh"
    check.write_text('#!/bin/sh\n[ "$SLURMD_NODENAME" != n1 ] || { echo "fabric is down"; exit 1; }\n')
    check.chmod(0o755)
    run = bucket.run("slurm-exclude")
    settings = [f"run_dir={run.url}", "steps=2", "distributed.doctor=true"]
    job = Job(slurm, tmp_path, str(SCRIPT), str(bucket.config), *settings, LDM_NODE_CHECK=str(check))
    job.finish()
    assert "done: 2 steps" in job.rank_log(3)  # the doctor was there before the first attempt alone
    assert [attempt["blamed"] for attempt in job.attempts] == [["n1"], ["n1"], []]
    assert job.attempts[-1]["nodes"] == "n[2-3]"
    assert slurm.field(job.number, "ExcNodeList") == "n1"
    assert "unfit node: n1" in job.log
    assert "fabric is down" in job.log


def test_a_job_array_sweeps_seeds(slurm: Any, bucket: Any, tmp_path: Path) -> None:
    run = bucket.run("slurm-array")
    # Last option wins: two jobs of one node each, and no second node check is needed.
    options = ["--nodes=1", "--array=0-1", str(SCRIPT), str(bucket.config)]
    job = Job(slurm, tmp_path, *options, f"run_dir={run.url}", "steps=2", LDM_SKIP_NODE_CHECK="1")
    for task in range(2):
        slurm.wait_state(f"{job.number}_{task}", "COMPLETED", timeout_s=LIMIT_S)
        assert bucket.run(f"slurm-array/seed-{task}").steps()[0] == 2
    both = [bucket.run(f"slurm-array/seed-{task}") for task in range(2)]
    assert both[0].losses()[1] != both[1].losses()[1]


def test_what_runs_is_in_the_run_folder(slurm: Any, bucket: Any, tmp_path: Path) -> None:
    run = bucket.run("slurm-bad-path")
    settings = [f"run_dir={run.url}", "data.shards=s3://ldm/nothing/*.tar"]
    job = Job(slurm, tmp_path, str(SCRIPT), str(bucket.config), *settings)
    job.finish("FAILED")
    assert slurm.field(job.number, "ExitCode") == "2:0"
    assert slurm.field(job.number, "Restarts") == "0"
    assert "No shard matches s3://ldm/nothing/*.tar" in job.log
    stored = run.folder / "launch" / f"slurm-{job.number}"
    assert json.loads((stored / "submission.json").read_text())["arguments"][1:] == settings
    names = subprocess.run(
        ["tar", "-tzf", str(stored / "code.tar.gz")], capture_output=True, text=True, check=True
    ).stdout
    assert "code/trainer/train.py" in names


def slurm_seconds(text: str) -> int:
    """[D-]HH:MM:SS."""
    days, _, clock = text.rpartition("-")
    hours, minutes, seconds = (int(part) for part in clock.split(":"))
    return int(days or 0) * 86_400 + hours * 3600 + minutes * 60 + seconds


def _neighbours(records: list[dict[str, Any]]) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    timed = [record for record in records if "loss" in record]
    return list(itertools.pairwise(timed[5:]))


def _second_node(nodes: str) -> str:
    found = re.fullmatch(r"n\[(\d)[-,](\d)\]", nodes)
    assert found, nodes
    return f"n{found[2]}"


def _resumed_at(log: str) -> int:
    found = re.search(r"resuming from step (\d+)", log)
    assert found, log
    return int(found[1])
