"""This process: its rank, what it imports and leaves, a child that ends with it, memory that both can map."""

from __future__ import annotations

import ctypes
import gc
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Generator
from contextlib import contextmanager

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)
"""What people, SLURM and Kubernetes send to end a run in order."""
_PR_SET_PDEATHSIG = 1  # prctl(2)
_IMPORTED = time.monotonic()


def die_with_parent(number: signal.Signals = signal.SIGKILL) -> None:
    """Ask Linux to send this process a signal when the thread that started it ends, however it ends.

    A parent that has ended before the request goes unnoticed: compare os.getppid() afterwards. Other
    systems have nothing like it.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, number, 0, 0, 0)


@contextmanager
def children_deaf_to_stops() -> Generator[None]:
    """A process started inside is deaf to stop signals from its first instruction on.

    They reach the whole process group, and are the rank's business: it still needs batches and its writer to
    save. Ignoring them in the child's own code would leave the second in which it imports.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def scratch_folder(prefix: str) -> Generator[str]:
    """A temporary folder that is gone afterwards, also where a stop signal ends this process unhandled."""

    def leave(number: int, frame: object) -> None:
        raise SystemExit(128 + number)  # as a shell has it

    here = threading.current_thread() is threading.main_thread()
    ours = [number for number in STOP_SIGNALS if here and signal.getsignal(number) is signal.SIG_DFL]
    for number in ours:
        signal.signal(number, leave)
    try:
        with tempfile.TemporaryDirectory(prefix=prefix) as folder:
            yield folder
    finally:
        for number in ours:
            signal.signal(number, signal.SIG_DFL)


def unnamed_file(name: str) -> int:
    """Descriptor of memory that a child can map; `name` shows in /proc only.

    Unlike /dev/shm, its size is limited by memory alone, also in a container.
    """
    if hasattr(os, "memfd_create"):
        return os.memfd_create(name)
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


def process_age_s() -> float:
    """Seconds since this process started; where the system does not say, since this module was imported."""
    known = process_status(os.getpid())
    if known is None or not hasattr(time, "CLOCK_BOOTTIME"):
        return time.monotonic() - _IMPORTED
    return time.clock_gettime(time.CLOCK_BOOTTIME) - known[1] / os.sysconf("SC_CLK_TCK")


def process_status(pid: int) -> tuple[str, int] | None:
    """(state letter, clock ticks from boot to its start) of a process; None: gone, or there is no /proc."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            # The name, in parentheses, may hold anything. proc(5): state, ... starttime
            fields = file.read().rpartition(")")[2].split()
    except OSError:
        return None
    return fields[0], int(fields[19])


def told_rank() -> tuple[int, int]:
    """Rank and ranks of the job as the environment tells them; 0 and 1 of a process that is no rank's.

    A batch script finds SLURM_PROCID and the job's SLURM_NTASKS, and is in no step.
    """

    def number(*names: str) -> int:
        return next((int(os.environ[name]) for name in names if os.environ.get(name, "").isdigit()), 0)

    if "RANK" not in os.environ and "SLURM_STEP_ID" not in os.environ:
        return 0, 1
    return number("RANK", "SLURM_PROCID"), max(1, number("WORLD_SIZE", "SLURM_STEP_NUM_TASKS"))


@contextmanager
def importing() -> Generator[None]:
    """Imports inside are not interrupted by searches for garbage, of which they make none.

    Python would look at all of their hundred thousands of objects again and again, a fifth of the time that
    they take. What is there at the end is not looked at later either.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


@contextmanager
def without_packages(*names: str) -> Generator[None]:
    """Inside, importing these raises ImportError as if they were not installed; those imported already stay.

    For libraries that import heavy packages on the chance that somebody will want them.
    """
    hidden = [name for name in names if name not in sys.modules]
    sys.modules.update(dict.fromkeys(hidden))  # type: ignore[arg-type]  # None is the import system's sign
    try:
        yield
    finally:
        for name in hidden:
            del sys.modules[name]
