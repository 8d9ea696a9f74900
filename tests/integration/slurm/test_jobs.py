"""Whole runs on a real SLURM cluster, against a real S3 server: requeued, refused, excluded."""

from __future__ import annotations

import itertools
import json
import os
import re
import signal
import statistics
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from tests.integration.slurm.slurm_cluster import LIMIT_S, SCRIPT, Job
from trainer.launch.slurm_records import read_attempts

pytestmark = [pytest.mark.slurm, pytest.mark.slow]

REPOSITORY = Path(__file__).parents[3]
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
    assert "leave 600 s to save (KillWait)" in job.log
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
    limit = time.monotonic() + LIMIT_S
    while not job.rank_pids(0, task=1):
        assert time.monotonic() < limit, job.log
        time.sleep(0.1)
    os.kill(job.rank_pids(0, task=1)[0], signal.SIGKILL)
    for task, outcomes in enumerate((["done"], ["retryable", "done"])):  # one starts again, the other goes on
        slurm.wait_state(f"{job.number}_{task}", "COMPLETED", timeout_s=LIMIT_S)
        ended = read_attempts(job.folder.with_name(f"{job.number}_{task}"))
        assert [attempt["outcome"] for attempt in ended] == outcomes
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


def _resumed_at(log: str) -> int:
    found = re.search(r"resuming from step (\d+)", log)
    assert found, log
    return int(found[1])
