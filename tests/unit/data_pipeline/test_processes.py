"""Children of a rank, the signals that its whole group gets, and what a process leaves behind."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from data_pipeline.processes import STOP_SIGNALS, children_deaf_to_stops, scratch_folder


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


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_scratch_folder_goes_with_its_process(number: signal.Signals) -> None:
    program = (
        "import signal, time\n"
        f"signal.signal({int(number)}, signal.SIG_DFL)  # nohup, say, hands on that it is ignored\n"
        "from data_pipeline.processes import scratch_folder\n"
        "with scratch_folder('ldm-test-') as folder:\n"
        "    print(folder, flush=True)\n"
        "    time.sleep(600)\n"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        folder = Path(process.stdout.readline().strip())
        assert folder.is_dir()
        process.send_signal(number)
        assert process.wait(timeout=60) in (128 + number, -number)
    assert not folder.exists()


def test_a_scratch_folder_leaves_signals_to_who_handles_them() -> None:
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    heard: list[int] = []
    signal.signal(signal.SIGUSR1, lambda number, frame: heard.append(number))
    try:
        with scratch_folder("ldm-test-"):
            signal.raise_signal(signal.SIGUSR1)
        assert heard == [signal.SIGUSR1]
    finally:
        signal.signal(signal.SIGUSR1, before[signal.SIGUSR1])
    assert {number: signal.getsignal(number) for number in STOP_SIGNALS} == before
