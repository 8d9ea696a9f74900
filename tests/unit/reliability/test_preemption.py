"""Stop requests: signals, the stop file, and what is left behind afterwards."""

import os
import signal
import threading
import time
from pathlib import Path

import pytest

from trainer.exit_codes import ExitCode, StopRequest
from trainer.reliability.preemption import PREEMPTION_SIGNALS, Preemption


def wait_for(condition: object, seconds: float = 10.0) -> bool:
    limit = time.monotonic() + seconds
    while time.monotonic() < limit:
        if condition():  # type: ignore[operator]
            return True
        time.sleep(0.01)
    return False


@pytest.mark.parametrize("number", PREEMPTION_SIGNALS)
def test_signal_requests_a_saved_exit_and_handlers_are_restored(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with Preemption() as preemption:
        assert preemption.request is StopRequest.NONE
        os.kill(os.getpid(), number)
        assert preemption.request is StopRequest.PREEMPTED
        assert preemption.request.exit_code is ExitCode.PREEMPTED
    assert signal.getsignal(number) is before


def test_first_interrupt_stops_and_second_aborts() -> None:
    with Preemption() as preemption:
        os.kill(os.getpid(), signal.SIGINT)
        assert preemption.request is StopRequest.STOPPED
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_persons_stop_outranks_a_preemption() -> None:
    with Preemption() as preemption:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        assert preemption.request is StopRequest.STOPPED
    assert max([StopRequest.NONE, StopRequest.PREEMPTED, StopRequest.STOPPED]).exit_code == 77


@pytest.mark.parametrize("scheme", ["file", "memory"])
def test_stop_file_is_seen_and_removed_once_acknowledged(tmp_path: Path, scheme: str) -> None:
    import fsspec

    url = str(tmp_path / "STOP") if scheme == "file" else f"memory://{tmp_path.name}/STOP"
    with Preemption(url, poll_s=0.01) as preemption:
        time.sleep(0.05)
        assert preemption.request is StopRequest.NONE
        with fsspec.open(url, "w") as stream:
            stream.write("")
        assert wait_for(lambda: preemption.request is not StopRequest.NONE)
        assert preemption.request is StopRequest.STOPPED
        assert preemption.acknowledge(StopRequest.STOPPED) is StopRequest.STOPPED
    filesystem, path = fsspec.core.url_to_fs(url)
    assert not filesystem.exists(path)


@pytest.mark.parametrize("agreed", [StopRequest.PREEMPTED, StopRequest.NONE])
def test_a_stop_that_comes_while_the_run_ends_otherwise_is_met(tmp_path: Path, agreed: StopRequest) -> None:
    """Nobody sees the file before the next start, which would train on (or, all steps made, stop at once)."""
    stop_file = tmp_path / "STOP"
    with Preemption(str(stop_file), poll_s=60.0) as preemption:
        if agreed is StopRequest.PREEMPTED:
            os.kill(os.getpid(), signal.SIGUSR1)
        assert preemption.acknowledge(agreed) is agreed
        stop_file.touch()
        assert preemption.acknowledge(agreed) is StopRequest.STOPPED
    assert not stop_file.exists()


def test_outside_the_main_thread_the_stop_file_still_works(tmp_path: Path) -> None:
    stop_file = tmp_path / "STOP"
    seen: list[bool] = []

    def rank() -> None:
        with Preemption(str(stop_file), poll_s=0.01) as preemption:
            stop_file.touch()
            seen.append(wait_for(lambda: preemption.request is not StopRequest.NONE))

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=rank)
    thread.start()
    thread.join()
    assert seen == [True]
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_forked_worker_ignores_the_signals_of_its_rank() -> None:
    with Preemption() as preemption:
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            os.kill(os.getpid(), signal.SIGTERM)
            os.write(writing, b"requested" if preemption.request else b"alive")
            os._exit(0)
        os.waitpid(child, 0)
        assert os.read(reading, 16) == b"alive"
        os.close(reading)
        os.close(writing)
