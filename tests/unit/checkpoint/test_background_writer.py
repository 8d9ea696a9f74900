"""The writer process: dies with its parent, reports failures, survives signals and its own death."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch

from data_pipeline.errors import RetryableFault, UserError
from trainer.checkpoint.commands import list_checkpoints
from trainer.checkpoint.writer_process import receive_frame, send_frame

from .conftest import MakeRun

ROOT = Path(__file__).resolve().parents[3]


def test_frames() -> None:
    stream = io.BytesIO()
    send_frame(stream, {"order": "write"}, [b"abc\n", b""])
    send_frame(stream, {"order": "stop"}, [])
    stream.seek(0)
    assert receive_frame(stream) == ({"order": "write"}, [b"abc\n", b""])
    assert receive_frame(stream) == ({"order": "stop"}, [])
    assert receive_frame(stream) is None


def process_of(run: object) -> subprocess.Popen[bytes]:
    process = run.manager._writer._process  # type: ignore[attr-defined]
    assert process is not None
    return process


def test_signals_for_the_trainer_do_not_stop_it(make_run: MakeRun) -> None:
    run = make_run(asynchronous=True)
    run.save()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        process_of(run).send_signal(number)
    run.train(1)
    run.save()
    assert [row.step for row in list_checkpoints(run.config.run_dir)] == [1, 0]


def test_training_does_not_wait_until_the_writer_takes_a_job(make_run: MakeRun) -> None:
    """A job larger than a pipe, and a process that does not read yet, as at a real network's first save."""
    run = make_run(asynchronous=True)
    run.save()
    os.kill(process_of(run).pid, signal.SIGSTOP)
    run.train(1)
    wanted = run.everything()
    run.begin_save(state={"note": "x" * 1_000_000})  # would never return
    assert not run.manager.failed
    run.train(1)
    os.kill(process_of(run).pid, signal.SIGCONT)
    run.manager.wait()
    assert [row.step for row in list_checkpoints(run.config.run_dir) if row.complete] == [1, 0]
    assert not all(torch.equal(a, b) for a, b in zip(run.everything(), wanted, strict=True))
    handle = run.manager.latest_good()
    assert handle is not None
    run.manager.load(handle, {"unet": run.engine}, run.ema)
    assert all(torch.equal(a, b) for a, b in zip(run.everything(), wanted, strict=True))


def test_a_killed_writer_is_reported_and_replaced(make_run: MakeRun) -> None:
    run = make_run(asynchronous=True)
    run.save()
    os.kill(process_of(run).pid, signal.SIGSTOP)
    run.train(1)
    run.begin_save()
    os.kill(process_of(run).pid, signal.SIGKILL)
    with pytest.raises(RetryableFault, match="could not be written"):
        run.manager.wait()
    run.train(1)
    run.save()
    complete = [row.step for row in list_checkpoints(run.config.run_dir) if row.complete]
    assert complete == [2, 0]


def test_a_failed_save_is_known_without_waiting_and_the_next_takes_its_place(make_run: MakeRun) -> None:
    run = make_run(asynchronous=True)
    run.save()
    os.kill(process_of(run).pid, signal.SIGSTOP)
    run.train(1)
    run.begin_save()
    assert not run.manager.failed
    os.kill(process_of(run).pid, signal.SIGKILL)
    while not run.manager.failed:  # the suite's timeout bounds this
        time.sleep(0.01)
    failure = run.manager.settle()
    assert isinstance(failure, RetryableFault)
    assert not run.manager.failed
    assert run.manager.settle() is None
    run.train(1)
    run.save()
    assert [row.step for row in list_checkpoints(run.config.run_dir) if row.complete] == [2, 0]


def test_what_cannot_be_written_is_known_by_its_consequence(make_run: MakeRun) -> None:
    run = make_run(asynchronous=True)
    run.save()
    (Path(run.config.run_dir) / "checkpoints" / "step_000000001").write_text("in the way")
    run.train(1)
    run.begin_save()
    while not run.manager.failed:
        time.sleep(0.01)
    run.train(1)
    with pytest.raises(UserError, match="step_000000001"):
        run.begin_save()
    assert [row.step for row in list_checkpoints(run.config.run_dir) if row.complete] == [0]


def test_close_finishes_the_last_save(make_run: MakeRun) -> None:
    run = make_run(asynchronous=True)
    run.train(1)
    run.begin_save()
    process = process_of(run)
    run.manager.close()
    assert process.returncode == 0
    assert [row.complete for row in list_checkpoints(run.config.run_dir)] == [True]


def test_it_dies_with_the_trainer(tmp_path: Path) -> None:
    script = textwrap.dedent(
        """
        import runpy, sys, time
        small_run = runpy.run_path(sys.argv[1], run_name="small_run")
        run = small_run["build_small_run"](sys.argv[2], asynchronous=True)
        run.save()
        print(run.manager._writer._process.pid, flush=True)
        time.sleep(60)
        """
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", script, str(Path(__file__).with_name("small_run.py")), str(tmp_path)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    assert is_running(child)
    parent.kill()
    parent.wait()
    while is_running(child):  # the suite's timeout bounds this
        time.sleep(0.01)


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state not in "ZX"
