"""The watchdog: allowances, hang detection and the board."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from trainer.exit_codes import ExitCode
from trainer.reliability.heartbeat import BOARD_VARIABLE, Board, board_from_environment
from trainer.reliability.watchdog import Watchdog, stopped_children


def test_allowance_is_generous_first_and_follows_the_slowest_recent_step() -> None:
    watchdog = Watchdog(15.0)
    assert watchdog.allowance_s("step") >= 600
    for duration in (1.0, 4.0, 2.0):
        watchdog._durations["step"].append(duration)
    assert watchdog.allowance_s("step") == pytest.approx(15.0 + 2 * 4.0)
    assert Watchdog(15.0, grace_s={"data": 900.0}).allowance_s("data") == pytest.approx(915.0)


def test_steps_of_another_size_are_learned_anew() -> None:
    watchdog = Watchdog(15.0)
    for _ in range(5):
        watchdog._durations["step"].append(0.1)
    watchdog.begin_anew()
    assert watchdog.allowance_s("step") >= 600


def test_storage_phases_keep_their_grace_however_quick_they_were() -> None:
    watchdog = Watchdog(5.0)
    for _ in range(5):
        watchdog._durations["checkpoint"].append(0.1)
    assert watchdog.allowance_s("checkpoint") == pytest.approx(605.0)


def test_silence_is_a_hang_and_beats_are_not() -> None:
    hung = threading.Event()
    with Watchdog(0.2, grace_s={"start": 0.0}, on_hang=hung.set) as watchdog:
        for _ in range(3):
            watchdog._durations["step"].append(0.01)
        for step in range(30):
            watchdog.beat(step)
            time.sleep(0.02)
        assert not hung.is_set()
        assert hung.wait(10)


def test_a_stopped_child_is_a_hang_although_the_loop_may_wait_for_data() -> None:
    hung = threading.Event()
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        with Watchdog(0.3, grace_s={"data": 600.0}, on_hang=hung.set) as watchdog:
            watchdog.beat(1, "data")
            assert not hung.wait(0.6)
            assert stopped_children() == []
            child.send_signal(signal.SIGSTOP)
            assert hung.wait(10)
            assert stopped_children() == [child.pid]
    finally:
        child.kill()
        child.wait()


def test_switched_off_it_starts_no_thread() -> None:
    before = threading.active_count()
    with Watchdog(0.0) as watchdog:
        watchdog.beat(1)
        assert threading.active_count() == before


HANGING_RANK = """
import sys, threading
from trainer.reliability.watchdog import Watchdog

def stuck_in_here():
    threading.Event().wait()

with Watchdog(0.2, grace_s={"start": 0.0}) as watchdog:
    watchdog._durations["step"].extend([0.01] * 3)
    watchdog.beat(7)
    stuck_in_here()
"""


def test_a_hung_rank_dumps_its_stacks_and_exits_retryable() -> None:
    done = subprocess.run([sys.executable, "-c", HANGING_RANK], capture_output=True, text=True, check=False)
    assert done.returncode == ExitCode.RETRYABLE
    assert "stuck_in_here" in done.stderr


STUCK_GIL = """
import ctypes
from trainer.reliability.watchdog import Watchdog

sleep = ctypes.PyDLL(None).sleep  # PyDLL keeps the GIL
with Watchdog(30.0) as watchdog:
    watchdog.beat(1)
    print("ready", flush=True); sleep(60)
"""


def test_stacks_can_be_had_from_outside_while_the_gil_is_stuck() -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", STUCK_GIL], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stderr is not None
    assert process.stdout.readline() == "ready\n"
    time.sleep(0.2)  # now it sleeps in C; a signal that comes earlier still finds line 8
    process.send_signal(signal.SIGQUIT)
    line = ""
    while "<string>" not in line or "line 8" not in line:
        line = process.stderr.readline()
        assert line, "no stack of the main thread"
    process.kill()
    process.wait()
    process.stdout.close()
    process.stderr.close()


def test_board_carries_pulses_between_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    board = Board(tmp_path / "board", 3, create=True)
    monkeypatch.setenv(BOARD_VARIABLE, str(board.path))
    assert board.read(2).beat == 0.0
    child = os.fork()
    if child == 0:
        own = board_from_environment(2)
        assert own is not None
        own.write(2, deadline=123.0, step=41, phase="checkpoint")
        os._exit(0)
    os.waitpid(child, 0)
    pulse = board.read(2)
    assert (pulse.deadline, pulse.step, pulse.phase) == (123.0, 41, "checkpoint")
    assert 0 < pulse.beat <= time.monotonic()
    assert board.read(1).beat == 0.0
    board.tick(2)
    assert board.read(2).tick >= pulse.tick
    assert board.read(2).deadline == 123.0
    board.close()


def test_watchdog_thread_ticks_on_the_board_while_the_loop_is_silent(tmp_path: Path) -> None:
    board = Board(tmp_path / "board", 1, create=True)
    with Watchdog(2.0, board=board) as watchdog:
        watchdog.beat(5, "data")
        first = board.read(0)
        time.sleep(0.6)
        later = board.read(0)
        assert (later.step, later.phase, later.beat) == (5, "data", first.beat)
        assert later.tick > first.tick
    assert board.read(0).phase == "exit"
