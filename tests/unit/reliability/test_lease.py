"""Two jobs in one run folder, on a disk and on a real S3 server: one of them ends, and nothing of the other's
goes."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from data_pipeline.errors import RunTaken
from data_pipeline.storage import files
from data_pipeline.storage.client import filesystem
from data_pipeline.storage.local_s3 import LocalS3
from data_pipeline.storage.urls import join
from tests.unit.checkpoint.small_run import SmallRun, build_small_run
from trainer.checkpoint.catalogue import Retention, checkpoints_url, folder_name, open_checkpoint
from trainer.checkpoint.commands import verify
from trainer.checkpoint.manager import CheckpointManager
from trainer.checkpoint.retirement import Retirement, abort_dead_uploads
from trainer.distributed.env import DistributedEnv
from trainer.exit_codes import ExitCode, classify
from trainer.reliability.job import JOB_VARIABLE, job_identity
from trainer.reliability.lease import Lease, acquire

HOLDER = """
import sys, time
from trainer.reliability.lease import acquire
acquire(sys.argv[1], job=sys.argv[2], renew_s=0.2)
print("held", flush=True)
time.sleep(600)
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalS3]:
    with LocalS3(tmp_path_factory.mktemp("s3"), buckets=("bucket",)) as running:
        yield running


@pytest.fixture(params=["disk", "s3"])
def run_dir(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "disk":
        return str(tmp_path / "run")
    for name, value in request.getfixturevalue("server").env.items():
        monkeypatch.setenv(name, value)
    return f"s3://bucket/{tmp_path.name}"


@pytest.fixture
def holders() -> Iterator[list[subprocess.Popen[str]]]:
    started: list[subprocess.Popen[str]] = []
    yield started
    for process in started:
        process.kill()
        process.wait()


def hold(run_dir: str, job: str, holders: list[subprocess.Popen[str]]) -> subprocess.Popen[str]:
    """Another process that holds the folder."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, run_dir, job], stdout=subprocess.PIPE, text=True, env=dict(os.environ)
    )
    holders.append(process)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def stored(run_dir: str) -> dict[str, object]:
    found: dict[str, object] = json.loads(files.read_bytes(join(run_dir, "lease.json")))
    return found


def taken_by(run_dir: str, lease: Lease, *, asynchronous: bool = False) -> SmallRun:
    """A run of this process, under a lease."""
    run = build_small_run(run_dir, asynchronous=asynchronous)
    run.manager = CheckpointManager(run.config, DistributedEnv.detect({}), None, lease)
    return run


def test_a_second_job_is_told_while_the_first_one_lives(
    run_dir: str, holders: list[subprocess.Popen[str]]
) -> None:
    hold(run_dir, "first", holders)
    began = time.monotonic()
    with pytest.raises(
        RunTaken, match=r"in use by a job .*stop that run, or give this one a run_dir"
    ) as told:
        acquire(run_dir, job="second", expiry_s=30.0)
    assert time.monotonic() - began < 15.0
    assert classify(told.value, restarted=True) is ExitCode.USER_ERROR
    assert stored(run_dir)["job"] == "first"


def test_the_lease_of_a_dead_process_of_this_machine_is_taken_at_once(
    run_dir: str, holders: list[subprocess.Popen[str]], caplog: pytest.LogCaptureFixture
) -> None:
    first = hold(run_dir, "first", holders)
    first.send_signal(signal.SIGKILL)
    first.wait()
    with caplog.at_level(logging.WARNING):
        lease = acquire(run_dir, job="second", expiry_s=600.0)
    lease.release()
    assert lease.claim.token == 2
    assert ["takes it over" in record.message for record in caplog.records] == [True]


def test_that_of_another_machine_expires(run_dir: str) -> None:
    first = acquire(run_dir, job="first", renew_s=600.0)
    elsewhere = {**stored(run_dir), "process": "another boot/pid:[1]/77/1234"}
    files.write_bytes(join(run_dir, "lease.json"), json.dumps(elsewhere).encode())
    began = time.monotonic()
    second = acquire(run_dir, job="second", expiry_s=1.5)
    assert 1.0 < time.monotonic() - began < 20.0
    assert second.claim.token == first.claim.token + 1
    with pytest.raises(RunTaken, match="was taken over by a job"):
        first.claim.verify()
    second.release()


def test_a_restart_of_the_same_job_and_a_job_after_a_clean_end_wait_for_nobody(run_dir: str) -> None:
    acquire(run_dir, job="first", renew_s=600.0)
    elsewhere = {**stored(run_dir), "process": "another boot/pid:[1]/77/1234"}
    files.write_bytes(join(run_dir, "lease.json"), json.dumps(elsewhere).encode())
    again = acquire(run_dir, job="first", expiry_s=600.0)
    again.release()
    assert stored(run_dir)["released"] is True
    other = acquire(run_dir, job="second", expiry_s=600.0)
    other.release()
    assert [again.claim.token, other.claim.token] == [2, 3]


def test_one_job_cannot_be_two_runs_on_one_machine(
    run_dir: str, holders: list[subprocess.Popen[str]]
) -> None:
    """Twice `srun ldm train` inside one allocation."""
    hold(run_dir, "SLURM job 17 of this cluster", holders)
    with pytest.raises(RunTaken, match="in use by SLURM job 17"):
        acquire(run_dir, job="SLURM job 17 of this cluster", expiry_s=30.0)


def test_the_run_that_was_pushed_out_commits_and_removes_nothing(run_dir: str) -> None:
    old = taken_by(run_dir, acquire(run_dir, job="old", renew_s=600.0), asynchronous=True)
    old.train(3)
    old.save()
    lease = acquire(run_dir, job="old", renew_s=600.0)
    new = taken_by(run_dir, lease)
    new.train(5)
    new.save()
    before = files.list_names(join(checkpoints_url(run_dir), folder_name(5)))
    old.train(2)
    old.begin_save()
    failure = old.manager.settle()
    assert isinstance(failure, RunTaken)
    after = files.list_names(join(checkpoints_url(run_dir), folder_name(5)))
    assert set(before) <= set(after)
    assert not any(found.problems for found in verify(run_dir))
    handle = new.manager.latest_good()
    assert handle is not None
    assert handle.step == 5
    new.train(1)
    new.save()  # and it goes on
    lease.release()
    old.manager.close()


def test_only_its_own_leftovers_and_older_ones_are_removed(run_dir: str) -> None:
    run = taken_by(run_dir, acquire(run_dir, job="a", renew_s=600.0))
    here, below = (join(checkpoints_url(run_dir), folder_name(step)) for step in (4, 2))
    for url in (here, below):
        for attempt in ("0-aaaa0001", "9-bbbb0001"):
            files.write_bytes(join(url, f"rank_00001.{attempt}.safetensors"), b"x")
    run.train(4)
    run.save()
    names = files.list_names(here)
    assert "rank_00001.9-bbbb0001.safetensors" in names
    assert "rank_00001.0-aaaa0001.safetensors" not in names
    assert len(files.list_names(below)) == 2  # somebody with a later token is at work there
    committed = open_checkpoint(here).manifest
    Retirement().begin(checkpoints_url(run_dir), committed, Retention(1, 0, 0), token=9)
    assert files.list_names(below) == []


def test_a_running_job_learns_of_it_within_a_renewal(run_dir: str) -> None:
    first = acquire(run_dir, job="first", renew_s=0.3)
    run = taken_by(run_dir, first)
    assert not run.manager.failed
    acquire(run_dir, job="first", renew_s=600.0)
    deadline = time.monotonic() + 20.0
    while first.lost is None and time.monotonic() < deadline:
        time.sleep(0.05)
    assert first.lost is not None
    assert run.manager.failed  # so that the ranks agree to save, which is refused with the sentence


def test_uploads_that_were_killed_with_an_earlier_start_are_ended(
    server: LocalS3, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Their parts are in no listing, and paid for; those of this start and of other runs stay."""
    for name, value in server.env.items():
        monkeypatch.setenv(name, value)
    fs, _ = filesystem("s3://bucket/run")
    names = {
        token: f"killed/checkpoints/step_000000005/rank_00001.{token}-aaaa0001.safetensors"
        for token in (1, 2, 3)
    }
    keys = [*names.values(), "killed-not/checkpoints/step_000000005/rank_00001.1-aaaa0001.safetensors"]
    for key in keys:
        fs.call_s3("create_multipart_upload", Bucket="bucket", Key=key)
    with caplog.at_level(logging.INFO):
        abort_dead_uploads("s3://bucket/killed", token=3)
    left = fs.call_s3("list_multipart_uploads", Bucket="bucket").get("Uploads")
    assert sorted(each["Key"] for each in left) == sorted([names[3], keys[-1]])
    assert "2 uploads that were killed" in caplog.text
    abort_dead_uploads("s3://no-such-bucket/killed", token=3)  # quiet


def test_a_job_has_one_name_in_all_its_starts() -> None:
    slurm = {"SLURM_JOB_ID": "17", "SLURM_CLUSTER_NAME": "big", "SLURM_RESTART_COUNT": "0"}
    assert job_identity(slurm) == job_identity({**slurm, "SLURM_RESTART_COUNT": "3"})
    assert job_identity(slurm) != job_identity({**slurm, "SLURM_JOB_ID": "18"})
    assert job_identity({**slurm, JOB_VARIABLE: "mine"}) == "mine"
    assert job_identity({}, launcher=os.getpid()) != job_identity({}, launcher=os.getppid())
    assert job_identity({"MASTER_PORT": "1"}) != job_identity({"MASTER_PORT": "2"})
