"""The watchdog of one rank: notices that its loop went silent, dumps stacks and gives up the process."""

from __future__ import annotations

import faulthandler
import itertools
import logging
import os
import signal
import sys
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

from trainer.exit_codes import ExitCode
from trainer.reliability.heartbeat import Board

logger = logging.getLogger(__name__)

Phase = Literal["start", "data", "step", "checkpoint", "preview", "finish"]

GRACE_S: Mapping[Phase, float] = {
    "start": 900.0,
    "data": 0.0,
    "step": 0.0,
    "checkpoint": 600.0,
    "preview": 300.0,
    "finish": 900.0,
}
"""Seconds that a phase may take whatever it took before; storage and samplers set their own pace."""

STACKS_SIGNAL = signal.SIGQUIT
"""Makes a rank write the stacks of all its threads to stderr, also when the GIL is stuck."""

# The descriptor, not sys.stderr: it may be replaced, closed or buffered.
_STDERR = 2
_LEARNING_BEATS = 3
_LEARNING_GRACE_S = 600.0
_EXIT_GRACE_S = 60.0
_TICK_S = 0.25
_TICKS_PER_LOOK = 8  # at /proc, which costs tenths of a millisecond
_SUPERVISED_DELAY_S = 3.0


class Watchdog:
    """Expects a beat from the training loop at every phase of every step.

    A phase may last `timeout_s` beyond what is expected of it: twice its slowest recent duration, at
    least its grace, and ten minutes until it has been seen three times (kernels are tuned and graphs
    compiled then). Past that, the stacks of all threads go to stderr and the process exits with
    ExitCode.RETRYABLE, long before a collective's own timeout.

    A thread cannot see that its own process is frozen (SIGSTOP) or that the GIL is stuck. So every
    beat and every tick of the thread is also written to the `board`, which a launcher of ours reads;
    the thread then waits a little longer, to let the launcher collect the stacks of every rank.

    timeout_s: 0 switches the watchdog off. grace_s: overrides of GRACE_S, e.g. how long storage may
    be unreachable while waiting for data. on_hang: replaces the exit, in tests.
    """

    def __init__(
        self,
        timeout_s: float,
        *,
        local_rank: int = 0,
        board: Board | None = None,
        grace_s: Mapping[Phase, float] | None = None,
        on_hang: Callable[[], None] | None = None,
    ) -> None:
        self._timeout_s = timeout_s
        self._local_rank = local_rank
        self._board = board
        self._grace_s: dict[Phase, float] = {**GRACE_S, **(grace_s or {})}
        self._on_hang = on_hang or _exit_retryable
        self._durations: dict[Phase, deque[float]] = defaultdict(lambda: deque(maxlen=32))
        self._phase: Phase = "start"
        self._step = 0
        self._since = time.monotonic()
        self._deadline = float("inf")
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Self:
        if self._timeout_s <= 0:
            return self
        faulthandler.register(STACKS_SIGNAL, file=_STDERR, all_threads=True)
        self.beat(0, "start")
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._thread is None:
            return
        self._closing.set()
        self._thread.join()
        self._thread = None
        if self._board is not None:
            # The thread ticks no more; the process still has to end in time.
            deadline = time.monotonic() + self._timeout_s + _EXIT_GRACE_S
            self._board.write(self._local_rank, deadline=deadline, step=self._step, phase="exit")

    def beat(self, step: int, phase: Phase = "step") -> None:
        """The loop is alive, at this step, and begins this phase. Costs microseconds."""
        now = time.monotonic()
        self._durations[self._phase].append(now - self._since)
        self._phase, self._step, self._since = phase, step, now
        if self._timeout_s <= 0:
            return
        self._deadline = now + self.allowance_s(phase)
        if self._board is not None:
            self._board.write(self._local_rank, deadline=self._deadline, step=step, phase=phase)

    def allowance_s(self, phase: Phase) -> float:
        """Seconds of silence after which this phase counts as hung."""
        seen = self._durations[phase]
        expected = 2 * max(seen) if len(seen) >= _LEARNING_BEATS else _LEARNING_GRACE_S
        return self._timeout_s + max(expected, self._grace_s[phase])

    def _watch(self) -> None:
        delay = 0.0 if self._board is None else _SUPERVISED_DELAY_S
        stopped_since: float | None = None
        for tick in itertools.count():
            if self._closing.wait(min(_TICK_S, self._timeout_s / 4)):
                return
            now = time.monotonic()
            if self._board is not None:
                self._board.tick(self._local_rank)
            if now > self._deadline + delay:
                self._give_up(f"no progress for {now - self._since:.1f} s")
                return
            if tick % _TICKS_PER_LOOK == 0:
                stopped = stopped_children()
                stopped_since = (stopped_since or now) if stopped else None
                if stopped_since is not None and now > stopped_since + self._timeout_s:
                    self._give_up(f"child processes {stopped} are stopped")
                    return

    def _give_up(self, reason: str) -> None:
        logger.error(
            "%s, in phase %s of step %d; stacks of all threads follow", reason, self._phase, self._step
        )
        faulthandler.dump_traceback(file=_STDERR, all_threads=True)
        self._on_hang()


def stopped_children() -> list[int]:
    """Direct children of this process that SIGSTOP has stopped: loader processes that never answer.

    They would otherwise count as waiting for storage, which may take as long as data.patience_s.
    Empty where the system has no /proc with lists of children.
    """
    found = []
    for task in Path("/proc/self/task").glob("*/children"):
        try:
            found += [int(pid) for pid in task.read_text().split() if is_stopped(int(pid))]
        except OSError:
            continue  # the thread ended while we looked
    return sorted(found)


def is_stopped(pid: int) -> bool:
    """Whether a process is in state T; False if it is gone or the system has no /proc."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    # The name, in parentheses, may hold anything; the state follows it.
    return status.rpartition(")")[2].split()[0] == "T"


def _exit_retryable() -> None:
    # The main thread is stuck, perhaps inside a collective: no clean-up can be waited for.
    sys.stderr.flush()
    os._exit(ExitCode.RETRYABLE)
