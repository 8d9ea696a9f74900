"""Whole runs on a real Ray cluster, against a real S3 server: kills, node loss and return, stop, handover."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.loader import build_loader
from tests.integration.launch_bucket import encoding_config, kept_samples, served_samples
from tests.unit.evaluator.committed_run import reference
from trainer.config.io import load_config

pytestmark = [pytest.mark.ray, pytest.mark.slow]

REPOSITORY = Path(__file__).parents[3]
LIMIT_S = 1500.0


class Job:
    """A job submitted with `ray job submit`."""

    def __init__(
        self, cluster: Any, bucket: Any, run: Any, *arguments: str, config: Path | None = None
    ) -> None:
        self.cluster, self.run = cluster, run
        words = (str(config or bucket.config), f"run_dir={run.url}", "--device", "cpu", *arguments)
        self.number = cluster.submit(*words)

    def until(self, condition: Callable[[], bool], what: str) -> None:
        limit = time.monotonic() + LIMIT_S
        while not condition():
            status = self.cluster.status(self.number)
            assert status in ("PENDING", "RUNNING", "UNKNOWN") or condition(), f"{status}\n{self.log}"
            assert time.monotonic() < limit, f"never saw {what}:\n{self.log}"
            time.sleep(0.2)

    def until_checkpoint(self, step: int) -> None:
        self.until(lambda: max(self.run.steps(), default=0) >= step, f"a checkpoint at step {step}")

    def finish(self, status: str = "SUCCEEDED") -> None:
        over = ("SUCCEEDED", "FAILED", "STOPPED")
        self.until(lambda: self.cluster.status(self.number) in over, "the end")
        assert self.cluster.status(self.number) == status, self.log

    def stop(self) -> None:
        self.cluster.run("job", "stop", f"--address={self.cluster.address}", self.number)
        self.finish("STOPPED")

    @property
    def log(self) -> str:
        return str(self.cluster.logs(self.number)[-8000:])


def worker_pid(run: Any, rank: int) -> int:
    """The Ray Train worker that started this rank of this run."""
    for process in Path("/proc").iterdir():
        try:
            if b"trainer.launch.rank" not in (process / "cmdline").read_bytes():
                continue
            words = (process / "environ").read_bytes().split(b"\0")
            config = (process / "cmdline").read_bytes().split(b"\0")[3].decode()
            if f"RANK={rank}".encode() in words and run.url in Path(config).read_text():
                return int(re.findall(r"^PPid:\s+(\d+)$", (process / "status").read_text(), re.MULTILINE)[0])
        except (OSError, ValueError, IndexError):
            continue
    raise AssertionError(f"rank {rank} of {run.url} is not running")


def assert_same_samples(bucket: Any, run: Any, unbroken: Any) -> None:
    """The position after the run's last step is that of one uninterrupted reader, and so were the losses."""
    state = run.state()
    config = load_config(str(bucket.config))
    os.environ.update(bucket.server.env)
    loader = build_loader(
        config.data,
        seed=config.seed,
        global_batch_size=config.global_batch_size,
        position=None,
    )
    for _ in range(state["step"]):
        batch = next(loader)
    loader.close()
    assert state["position"] == batch.position
    losses = run.losses()
    for step, loss in unbroken.losses().items():
        if step in losses:
            # Another number of ranks adds up in another order; another sample would show at once.
            assert math.isclose(losses[step], loss, rel_tol=1e-3), step


def test_a_killed_worker_is_replaced_and_the_run_ends_the_same(
    ray_cluster: Any, bucket: Any, unbroken: Any
) -> None:
    run = bucket.run("ray-kill")
    job = Job(ray_cluster, bucket, run, "distributed.doctor=true", "--workers", "2")
    job.until_checkpoint(10)
    os.kill(worker_pid(run, 1), signal.SIGKILL)
    job.finish()
    assert len(run.events("resume")) == 1
    assert run.losses() == unbroken.losses()
    assert run.fingerprint() == unbroken.fingerprint()


def test_node_lost_and_back_then_stopped(ray_cluster: Any, bucket: Any, unbroken: Any) -> None:
    run = bucket.run("ray-elastic")
    job = Job(ray_cluster, bucket, run, "steps=100000", "--workers", "1:2", "--resize-every-s", "5")
    job.until_checkpoint(10)
    ray_cluster.kill_node("r2")
    job.until(lambda: worlds(run) == [1], "one rank alone")
    at = run.steps()[0]
    job.until_checkpoint(at + 10)
    ray_cluster.start_node("r2")
    job.until(lambda: worlds(run) == [1, 2], "two ranks again")
    # Asked to save before the group was ended: the second start did not lose a step.
    assert run.events("preempted"), "the resize did not save first"
    job.until_checkpoint(run.steps()[0] + 10)
    job.stop()
    assert_same_samples(bucket, run, unbroken)
    assert sorted(run.losses()) == list(range(1, run.state()["step"] + 1))


def worlds(run: Any) -> list[int]:
    """World sizes the run was resumed at."""
    return [event["world_size"] for event in run.events("resume")]


def test_slurm_then_ray_then_slurm(
    slurm: Any, ray_cluster: Any, bucket: Any, unbroken: Any, tmp_path: Path
) -> None:
    run = bucket.run("handover")
    script = str(REPOSITORY / "slurm" / "train_ldm.sh")
    submit = [
        "sbatch",
        "--parsable",
        "--nodes=2",
        "--gpus-per-node=0",
        "--ntasks-per-node=1",
        "--oversubscribe",
    ]

    def sbatch(*overrides: str) -> str:
        words = [*submit, script, str(bucket.config), f"run_dir={run.url}", *overrides]
        return str(slurm.run(*words, cwd=tmp_path, LDM_SKIP_NODE_CHECK="1"))

    first = sbatch("steps=100000")
    limit = time.monotonic() + LIMIT_S
    while max(run.steps(), default=0) < 10:
        assert slurm.field(first, "JobState") in ("PENDING", "RUNNING", "CONFIGURING")
        assert time.monotonic() < limit
        time.sleep(0.2)
    slurm.run("scancel", first)
    slurm.wait_state(first, "CANCELLED", timeout_s=LIMIT_S)
    while not (tmp_path / "runs" / "slurm" / first / "attempts.jsonl").exists():
        assert time.monotonic() < limit
        time.sleep(0.2)

    job = Job(ray_cluster, bucket, run, "steps=100000", "--workers", "2")
    job.until_checkpoint(run.steps()[0] + 10)
    job.stop()

    last = run.state()["step"] + 5
    second = sbatch(f"steps={last}")
    slurm.wait_state(second, "COMPLETED", "FAILED", timeout_s=LIMIT_S)
    assert run.state()["step"] == last
    assert worlds(run) == [2, 2]
    assert {s: run.losses()[s] for s in unbroken.losses()} == unbroken.losses()
    assert_same_samples(bucket, run, unbroken)


def test_encoders_keep_in_front_of_the_run_and_come_back(
    ray_cluster: Any, bucket: Any, tmp_path: Path
) -> None:
    """One rank and one encoder, which is killed: it is started again, and the run takes no notice."""
    config = encoding_config(bucket, tmp_path)
    run = bucket.run("encoders")
    words = ("--workers", "1", "--encoders", "1", "--encoders-ahead", "20", "steps=100000")
    job = Job(ray_cluster, bucket, run, *words, config=config)
    job.until(lambda: bool(encoder_pids(run)), "an encoder")
    before = encoder_pids(run)
    os.kill(before[0], signal.SIGKILL)
    job.until(lambda: bool(set(encoder_pids(run)) - set(before)), "another encoder")
    job.until_checkpoint(20)  # beyond an epoch
    job.stop()
    assert "encoder 0 was ended by SIGKILL and is started again" in job.log
    assert not encoder_pids(run), "it has ended with the run"
    assert not run.events("resume")
    assert kept_samples(tmp_path).keys() == served_samples(config)


def test_an_evaluator_comes_back_and_measures_the_last_step(
    ray_cluster: Any, bucket: Any, tmp_path: Path
) -> None:
    run = bucket.run("watched")
    (tmp_path / "prompts.txt").write_text("a red circle\na blue square\n", encoding="utf-8")
    drawn = f"--count 2 --prompts-from {tmp_path}/prompts.txt --steps 2"
    options = f"--reference {reference(tmp_path / 'real')} --features random --metrics fid --poll-s 1"
    words = ("--workers", "1", "steps=20", f"--watch={options} --sample '{drawn}'")
    job = Job(ray_cluster, bucket, run, *words)
    evaluations = run.folder / "evaluation"
    job.until(lambda: bool(child_pids("watch", run.url)), "an evaluator")
    before = child_pids("watch", run.url)
    os.kill(before[0], signal.SIGKILL)
    job.finish()
    assert "evaluator was ended by SIGKILL and is started again" in job.log
    assert not child_pids("watch", run.url)
    found = [json.loads(line) for line in (evaluations / "metrics.jsonl").read_text().splitlines()]
    assert found[-1]["step"] == 20
    assert math.isfinite(found[-1]["eval/fd_random"])


def child_pids(verb: str, url: str) -> list[int]:
    """Processes of this verb of `ldm` whose command line names a run."""
    found = []
    for process in Path("/proc").iterdir():
        try:
            words = (process / "cmdline").read_bytes().decode().split("\0")
        except OSError:
            continue
        if {"trainer", verb, url} <= set(words):
            found.append(int(process.name))
    return found


def encoder_pids(run: Any) -> list[int]:
    """Processes of `ldm encode` beside this run."""
    found = []
    for process in Path("/proc").iterdir():
        try:
            words = (process / "cmdline").read_bytes().decode().split("\0")
            if "encode" in words and run.url in Path(words[words.index("encode") + 1]).read_text():
                found.append(int(process.name))
        except (OSError, ValueError, IndexError):
            continue
    return found
