"""A rank as a child process: its place, signals, log, and the one verdict about a hang for both launchers."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.errors import RetryableFault
from trainer.config.run import Config
from trainer.config.training import DistributedConfig
from trainer.distributed.place import Place
from trainer.exit_codes import ExitCode
from trainer.launch import ray_worker
from trainer.launch.local import supervise
from trainer.launch.rank_process import RankProcess
from trainer.launch.ray_board import RunBoard, RunRequest
from trainer.launch.ray_worker import Facts, Follower, started_rank

CHILD = """
import os, sys, time, signal
from trainer.reliability.heartbeat import board_from_environment
local_rank = int(os.environ["LOCAL_RANK"])
board = board_from_environment(local_rank)
def say(phase, deadline_s=600.0):
    board.write(local_rank, deadline=time.monotonic() + deadline_s, step=17, phase=phase)
def tick(seconds):
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        board.tick(local_rank)
        time.sleep(0.02)
"""
OBEDIENT = """
say("step")
signal.signal(signal.SIGUSR1, lambda *_: sys.exit(75))
print("rank", os.environ["RANK"], "of", os.environ["WORLD_SIZE"], flush=True)
assert os.environ["LDM_RESTARTS"] == "3"
tick(60)
"""
SLOW_START = """
say("start")
time.sleep(2.5)  # DeepSpeed's import keeps the interpreter: the watchdog thread does not tick
say("step")
tick(1.5)
"""
FROZEN = """
say("step")
time.sleep(60)
"""
PLACE = Place(rank=3, local_rank=1, world_size=4, local_world_size=2, master_addr="127.0.0.1", master_port=1)
ALONE = Place(rank=0, local_rank=0, world_size=1, local_world_size=1, master_addr="127.0.0.1", master_port=1)

Start = Callable[..., RankProcess]


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    """A child that speaks like a rank but imports no torch."""
    with ExitStack() as stack:

        def make(body: str, *, place: Place = PLACE, watchdog_s: float = 0.5) -> RankProcess:
            config = Config(steps=7, distributed=DistributedConfig(watchdog_s=watchdog_s))

            def command(config_file: Path, task: str) -> list[str]:
                assert json.loads(config_file.read_text())["steps"] == 7
                assert task == "train"
                return [sys.executable, "-c", CHILD + body]

            monkeypatch.setattr(ray_worker, "rank_command", command)
            log = tmp_path / "logs" / "r.log"
            return stack.enter_context(started_rank(config, place, log=log, restarts=3))

        yield make


def wait_for_step(rank: RankProcess) -> None:
    while rank.step != 17:
        assert rank.poll() is None, rank.tail(30)
        time.sleep(0.02)


def wait_for_hang(rank: RankProcess) -> str:
    while (hung := rank.hang()) is None:
        assert rank.poll() is None, rank.tail(30)
        time.sleep(0.02)
    return hung


def test_a_rank_knows_its_place_obeys_signals_and_leaves_a_log(start: Start) -> None:
    rank = start(OBEDIENT)
    wait_for_step(rank)
    rank.signal(signal.SIGUSR1)
    while (status := rank.poll()) is None:
        time.sleep(0.02)
    assert status == ExitCode.PREEMPTED
    assert rank.tail(30) == "rank 3 of 4"


def test_the_log_of_an_earlier_attempt_is_kept_but_not_shown(start: Start, tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "r.log").write_text("of old\n")
    rank = start("print('of now')")
    rank.wait()
    assert rank.tail(30) == "of now"
    assert (tmp_path / "logs" / "r.log").read_text() == "of old\nof now\n"


def test_a_stopped_rank_hangs(start: Start) -> None:
    rank = start("say('step'); tick(60)")
    wait_for_step(rank)
    assert rank.hang() is None
    os.kill(rank.pid, signal.SIGSTOP)
    assert wait_for_hang(rank).startswith("stopped for")


def test_a_rank_without_progress_hangs(start: Start) -> None:
    hung = wait_for_hang(start("say('data', 0.1); tick(60)"))
    assert hung.startswith("no progress for")
    assert hung.endswith("in data of step 17")


def test_a_rank_that_has_not_spoken_is_importing(start: Start) -> None:
    rank = start("time.sleep(60)")
    until = time.monotonic() + 3.0
    while time.monotonic() < until:
        assert rank.hang() is None
        time.sleep(0.05)


class OneWorker:
    """Implements ray_worker.Group around the real board, for a run of one worker."""

    def __init__(self) -> None:
        self.board = RunBoard(max_faults=0)
        self.board.begin(1)
        self.reported: list[Facts] = []

    def tick(self, step: int) -> tuple[str, dict[int, int]]:
        return self.board.tick(step)

    def ended(self, rank: int, code: int) -> None:
        self.board.ended(rank, code)

    def is_preempted(self) -> bool:
        return False

    def share(self, message: Any) -> Any:
        return message

    def report(self, facts: Facts) -> None:
        self.reported.append(facts)


def follow(rank: RankProcess, group: OneWorker) -> ExitCode:
    return Follower(0, 1, rank, group, lambda step, final: {"step": step} if final else None).run()


def test_a_slow_start_is_no_hang_under_ray(start: Start) -> None:
    """No tick for five times watchdog_s, in phase `start`."""
    group = OneWorker()
    assert follow(start(SLOW_START, place=ALONE), group) is ExitCode.DONE
    assert group.board.state()["codes"] == {0: 0}
    assert group.reported == [{"step": 17}]


def test_a_slow_start_is_no_hang_of_local_ranks(tmp_path: Path) -> None:
    code = supervise(
        [sys.executable, "-c", CHILD + SLOW_START],
        1,
        max_restarts=0,
        watchdog_s=0.5,
        scratch=tmp_path,
        log_dir=tmp_path,
    )
    assert code is ExitCode.DONE


def test_a_frozen_rank_starts_the_group_anew_under_ray(start: Start) -> None:
    with pytest.raises(RetryableFault, match=r"rank 0 hangs: frozen for .* in step of step 17"):
        follow(start(FROZEN, place=ALONE), OneWorker())


def test_a_stop_of_the_job_reaches_the_rank_under_ray(start: Start) -> None:
    group = OneWorker()
    rank = start(OBEDIENT, place=ALONE)
    wait_for_step(rank)
    group.board.ask(RunRequest.PREEMPT)
    assert follow(rank, group) is ExitCode.PREEMPTED


def test_a_death_starts_the_group_anew_and_a_mistake_does_not(start: Start) -> None:
    with pytest.raises(RetryableFault, match="rank 0 was ended by SIGKILL:\nlast words"):
        follow(start("print('last words', flush=True); os.kill(os.getpid(), 9)", place=ALONE), OneWorker())
    assert follow(start("sys.exit(2)", place=ALONE), OneWorker()) is ExitCode.USER_ERROR
