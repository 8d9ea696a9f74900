"""Faults on a real SLURM cluster: the ranks start again on the nodes that the job holds, while it can."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.integration.slurm.slurm_cluster import SCRIPT, Job

pytestmark = [pytest.mark.slurm, pytest.mark.slow]


@pytest.fixture
def breakable(slurm: Any) -> Iterator[Any]:
    """The cluster, whose nodes come back for the next test."""
    yield slurm
    slurm.bring_back()


def test_a_killed_rank_starts_again_in_the_same_allocation(
    slurm: Any, bucket: Any, unbroken: Any, tmp_path: Path
) -> None:
    run = bucket.run("slurm-kill")
    job = Job(slurm, tmp_path, str(SCRIPT), str(bucket.config), f"run_dir={run.url}")
    job.until(lambda: max(run.steps(), default=0) >= 10, "a checkpoint")
    assert f"{job.number}  RUNNING on n[" in job.ldm("status", job.number)
    os.kill(job.rank_pid(1), signal.SIGKILL)
    job.finish()
    assert slurm.field(job.number, "Restarts") == "0"
    assert [attempt["outcome"] for attempt in job.attempts] == ["retryable", "done"], job.log
    assert job.attempts[0]["blamed"] == [second_node(job.attempts[0]["nodes"])]
    assert job.attempts[1]["nodes"] == job.attempts[0]["nodes"]
    assert "resuming from step" in job.ldm("logs", job.number, "--lines=0")
    status = job.ldm("status", job.number)
    assert "1 x retryable" in status, status
    assert "step 40 of 40" in status, status
    told = re.search(r"attempt 2 made its first step ([\d.]+) s after the fault: (.*)", status)
    assert told, status
    parts = dict(part.rsplit(" ", 1) for part in told[2].split(", "))
    assert list(parts) == [
        *("detect", "kill", "judge", "check", "srun", "import", "rendezvous", "restore", "first step")
    ]
    assert all(float(seconds) >= 0 for seconds in parts.values()), parts
    assert sum(map(float, parts.values())) == pytest.approx(float(told[1]), abs=0.5)
    assert told[0] in job.log
    assert run.losses() == unbroken.losses()
    assert run.fingerprint() == unbroken.fingerprint()


def test_a_rank_that_does_not_die_with_its_peer_is_ended(slurm: Any, bucket: Any, tmp_path: Path) -> None:
    run = bucket.run("slurm-stopped")
    settings = [f"run_dir={run.url}", "distributed.watchdog_s=900"]
    job = Job(slurm, tmp_path, str(SCRIPT), str(bucket.config), *settings, LDM_FAULT_WAIT_S="1")
    job.until(lambda: max(run.steps(), default=0) >= 10, "a checkpoint")
    os.kill(job.rank_pid(1), signal.SIGSTOP)
    os.kill(job.rank_pid(0), signal.SIGKILL)
    job.finish()
    assert slurm.field(job.number, "Restarts") == "0"
    assert [attempt["outcome"] for attempt in job.attempts] == ["retryable", "done"], job.log
    assert job.attempts[0]["gone"] == []
    assert run.steps()[0] == 40


def test_spares_take_over_and_then_fewer_nodes_go_on(breakable: Any, bucket: Any, tmp_path: Path) -> None:
    run = bucket.run("slurm-spare")
    settings = [f"run_dir={run.url}", "steps=100000"]
    options = ["--nodes=3", str(SCRIPT), str(bucket.config), *settings]
    job = Job(breakable, tmp_path, *options, LDM_SPARE_NODES="1", LDM_FAULT_WAIT_S="2", LDM_KILL_WAIT_S="2")
    job.until(lambda: max(run.steps(), default=0) >= 10, "a checkpoint")
    assert "2 ranks on n[1-2]" in job.log

    breakable.lose_node("n2", noticed=True)
    job.until(lambda: "2 ranks on n[1,3]" in job.log, "the spare")
    reached = run.steps()[0]
    job.until(lambda: run.steps()[0] > reached, "progress with the spare")

    breakable.lose_node("n3", noticed=False)
    job.until(lambda: "1 ranks on n1" in job.log, "fewer nodes")
    reached = run.steps()[0]
    job.until(lambda: run.steps()[0] > reached, "progress with fewer nodes")
    assert "left out: n2, n3" in job.ldm("status", job.number)

    (run.folder / "STOP").touch()
    job.until(lambda: len(job.attempts) == 3, "the end")
    breakable.bring_back()  # until then SLURM waits for n3 to say that its ranks have ended
    job.finish("FAILED")
    assert breakable.field(job.number, "ExitCode") == "77:0"
    assert breakable.field(job.number, "Restarts") == "0"
    assert [attempt["gone"] for attempt in job.attempts] == [["n2"], ["n3"], []], job.log
    assert [attempt["nodes"] for attempt in job.attempts] == ["n[1-2]", "n[1,3]", "n1"]


def test_too_few_nodes_are_given_back_and_the_lost_one_is_excluded(
    breakable: Any, bucket: Any, tmp_path: Path
) -> None:
    run = bucket.run("slurm-too-few")
    settings = [f"run_dir={run.url}", "steps=100000"]
    job = Job(breakable, tmp_path, str(SCRIPT), str(bucket.config), *settings, LDM_MIN_NODES="2")
    job.until(lambda: max(run.steps(), default=0) >= 10, "a checkpoint")
    lost = second_node(breakable.field(job.number, "NodeList"))
    breakable.lose_node(lost, noticed=True)
    job.until(lambda: "resuming from step" in job.rank_log(2), "the second attempt")
    assert breakable.field(job.number, "Restarts") == "1"
    used = re.findall(r"2 ranks on (\S+),", job.log)[-1]
    assert lost not in breakable.run("scontrol", "show", "hostnames", used).split()
    assert f"1 of 2 nodes are left, too few for this run; nodes to exclude: {lost};" in job.log
    (run.folder / "STOP").touch()
    job.finish("FAILED")


def test_only_attempts_without_progress_are_counted(slurm: Any, bucket: Any, tmp_path: Path) -> None:
    run = bucket.run("slurm-counting")
    settings = [f"run_dir={run.url}", "steps=100000"]
    limits = {"LDM_MAX_FAULTS": "1", "LDM_NODE_STRIKES": "99"}
    job = Job(slurm, tmp_path, str(SCRIPT), str(bucket.config), *settings, **limits)
    for attempt in (1, 2):
        reached = max(run.steps(), default=0)
        job.until(lambda: max(run.steps(), default=0) > reached, "progress")  # noqa: B023
        os.kill(job.rank_pid(1), signal.SIGKILL)
        job.until(lambda: len(job.attempts) == attempt, "the end of the attempt")  # noqa: B023
    # While it imports: nothing can be committed yet.
    job.until(lambda: job.rank_pids(1) != [], "the third attempt")
    os.kill(job.rank_pid(1), signal.SIGKILL)
    job.finish("FAILED")
    assert slurm.field(job.number, "ExitCode") == "76:0"
    assert slurm.field(job.number, "Restarts") == "0"
    assert [attempt["then"] for attempt in job.attempts] == ["restart", "restart", "stop"]
    assert "1 attempts in a row committed no new step" in job.log


def second_node(nodes: str) -> str:
    found = re.fullmatch(r"n\[(\d)[-,](\d)\]", nodes)
    assert found, nodes
    return f"n{found[2]}"
