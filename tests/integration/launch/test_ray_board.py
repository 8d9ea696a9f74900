"""What the parts of a Ray run tell each other; the rank as a child process; a run's progress from outside."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

import pytest

from trainer.config.run import Config
from trainer.exit_codes import ExitCode
from trainer.launch import rank_process
from trainer.launch.progress import latest_record, newest_checkpoint
from trainer.launch.rank_process import Place, RankProcess
from trainer.launch.ray_board import Request, RunBoard, forbids_restart, usable_ranks


def test_faults_in_a_row_without_progress_are_bounded() -> None:
    board = RunBoard(max_faults=2)
    assert board.begin(2) == (1, False)
    board.tick(10)
    assert board.begin(2) == (2, False)  # first fault
    board.tick(10)
    assert board.begin(2) == (3, False)  # second, no further than before
    board.tick(11)
    assert board.begin(2) == (4, False)  # got further: counted anew
    board.tick(11)
    assert board.begin(2) == (5, False)
    assert board.begin(2) == (6, True)


def test_planned_restarts_are_no_faults() -> None:
    board = RunBoard(max_faults=0)
    board.begin(2)
    for attempt in range(2, 6):
        board.ask(Request.RESIZE)
        assert board.tick(5)[0] == "resize"
        board.ended(0, ExitCode.PREEMPTED)
        board.ended(1, ExitCode.PREEMPTED)
        assert board.begin(3) == (attempt, False)
        assert board.tick(5) == ("", {})


def test_a_stop_is_not_taken_back_by_a_resize() -> None:
    board = RunBoard(max_faults=3)
    board.begin(2)
    board.ask(Request.PREEMPT)
    board.ask(Request.RESIZE)
    assert board.tick(0)[0] == "preempt"
    board.begin(1)
    assert board.tick(0)[0] == "preempt"


def test_workers_that_the_batch_cannot_use_are_spares() -> None:
    config = Config(global_batch_size=48, micro_batch_size=2)
    assert [usable_ranks(config, n) for n in range(1, 9)] == [1, 2, 3, 4, 4, 6, 6, 8]


def test_only_final_codes_end_the_run_for_all() -> None:
    assert not forbids_restart({0: ExitCode.DONE, 1: ExitCode.PREEMPTED, 2: ExitCode.RETRYABLE})
    assert forbids_restart({0: ExitCode.DONE, 1: ExitCode.USER_ERROR})


PLACE = Place(rank=3, local_rank=1, world_size=4, local_world_size=2, master_addr="127.0.0.1", master_port=1)
CHILD = """
import os, sys, time, signal
from trainer.reliability.heartbeat import board_from_environment
board = board_from_environment(1)
board.write(1, deadline=time.monotonic() + float(sys.argv[1]), step=17, phase="step")
signal.signal(signal.SIGUSR1, lambda *_: sys.exit(75))
print("rank", os.environ["RANK"], "of", os.environ["WORLD_SIZE"], flush=True)
assert os.environ["LDM_RESTARTS"] == "3"
for _ in range(600):
    board.tick(1)
    time.sleep(0.05)
"""


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A child that speaks like a rank but imports no torch."""
    made: list[RankProcess] = []

    def make(deadline_s: float) -> RankProcess:
        def command(config_file: Path, task: str) -> list[str]:
            assert json.loads(config_file.read_text()) == {"steps": 1}
            assert task == "train"
            return [sys.executable, "-c", CHILD, str(deadline_s)]

        monkeypatch.setattr(rank_process, "rank_command", command)
        made.append(
            RankProcess({"steps": 1}, PLACE, log=tmp_path / "logs" / "r.log", watchdog_s=2.0, restarts=3)
        )
        return made[-1]

    yield make
    for one in made:
        one.kill()


def wait_for_step(process: RankProcess) -> None:
    while process.step != 17:
        assert process.poll() is None, process.tail()
        time.sleep(0.02)


def wait_for_status(process: RankProcess) -> int:
    while (status := process.poll()) is None:
        time.sleep(0.02)
    return status


def test_a_rank_process_knows_its_place_and_obeys_signals(start) -> None:
    process = start(deadline_s=600.0)
    wait_for_step(process)
    process.signal(signal.SIGUSR1)
    assert wait_for_status(process) == ExitCode.PREEMPTED
    assert process.tail() == "rank 3 of 4"


def test_a_frozen_rank_process_is_a_retryable_fault(start) -> None:
    process = start(deadline_s=600.0)
    wait_for_step(process)
    os.kill(process.pid, signal.SIGSTOP)
    assert wait_for_status(process) == ExitCode.RETRYABLE


def test_a_rank_process_without_progress_is_a_retryable_fault(start) -> None:
    process = start(deadline_s=0.1)
    assert wait_for_status(process) == ExitCode.RETRYABLE


def test_progress_of_a_run(tmp_path: Path) -> None:
    run_dir = str(tmp_path)
    assert latest_record(run_dir) is None
    assert newest_checkpoint(run_dir) is None
    logs = tmp_path / "logs"
    logs.mkdir()
    records = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}, {"step": 2, "event": "resume"}]
    (logs / "metrics.jsonl").write_text("\n".join(map(json.dumps, records)) + '\n{"step": 3, "lo')
    assert latest_record(run_dir) == {"step": 2, "loss": 1.0}
    for step in (5, 100):
        (tmp_path / "checkpoints" / f"step_{step:09d}").mkdir(parents=True)
    (tmp_path / "checkpoints" / "step_000000005" / "manifest.json").write_text("{}")
    assert newest_checkpoint(run_dir) == (5, f"{run_dir}/checkpoints/step_000000005")
