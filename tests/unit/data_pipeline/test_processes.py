"""Children of a rank and the signals that its whole group gets."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

from data_pipeline.processes import STOP_SIGNALS, children_deaf_to_stops


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_child_is_deaf_from_its_first_instruction_on(number: signal.Signals) -> None:
    """The signal comes while the child's interpreter starts, before a line of ours has run in it."""
    program = [sys.executable, "-c", "print('alive')"]
    with children_deaf_to_stops():
        child = subprocess.Popen(program, stdout=subprocess.PIPE, text=True)
    child.send_signal(number)
    assert child.communicate(timeout=60)[0] == "alive\n"
    assert child.returncode == 0


def test_this_process_hears_as_before_and_a_deaf_child_can_be_killed() -> None:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    with children_deaf_to_stops():
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == before
    child.kill()
    assert child.wait(timeout=60) == -signal.SIGKILL
