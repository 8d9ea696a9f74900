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
from typing import Literal, Protocol, Self

from data_pipeline.processes import process_status
from trainer.config.training import DistributedConfig
from trainer.exit_codes import ExitCode
from trainer.reliability.heartbeat import Board

logger = logging.getLogger(__name__)

Phase = Literal["start", "data", "step", "checkpoint", "preview", "validation", "profile", "finish"]

GRACE_S: Mapping[Phase, float] = {
    "start": 900.0,
    "data": 0.0,
    "step": 0.0,
    "checkpoint": 600.0,
    "preview": 300.0,
    "validation": 600.0,
    "profile": 300.0,
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
_BUSY_AFTER_S = 1.0


class Peers(Protocol):
    """What ranks tell each other about long phases (`peers.PeerPhases`). Nothing here waits."""

    @property
    def heard(self) -> tuple[float, str]:
        """When (time.monotonic) the newest sign of a busy peer was seen, 0 for never, and whose it was."""
        ...

    def tell(self, what: str) -> None:
        """This rank is busy, and has time left for it."""
        ...

    def ask(self) -> None:
        """Look whether a peer is busy."""
        ...


class Watchdog:
    """Expects a beat from the training loop at every phase of every step.

    A phase may last `timeout_s` beyond what is expected of it: twice its slowest recent duration, at
    least its grace, and ten minutes until it has been seen three times (kernels are tuned and graphs
    compiled then). Past that, the stacks of all threads go to stderr and the process exits with
    ExitCode.RETRYABLE, long before a collective's own timeout.

    Most of that silence is waiting for a peer, inside a collective. While a peer says that it is in a phase
    that may take long, and has time left for it, this rank waits on: it gives up `timeout_s` after the last
    such sign.

    A thread cannot see that its own process is frozen (SIGSTOP) or that the GIL is stuck. So every
    beat and every tick of the thread is also written to the `board`, which a launcher of ours reads;
    the thread then waits a little longer, to let the launcher collect the stacks of every rank.

    timeout_s: 0 switches the watchdog off. grace_s: overrides of GRACE_S, e.g. how long storage may
    be unreachable while waiting for data. peers: unset, nobody is waited for longer than expected.
    evidence: called once in a silence, in a thread of its own, when half of `timeout_s` is left: before this
    rank or any other is given up. on_hang: replaces the exit, in tests.
    """

    def __init__(
        self,
        timeout_s: float,
        *,
        local_rank: int = 0,
        board: Board | None = None,
        grace_s: Mapping[Phase, float] | None = None,
        peers: Peers | None = None,
        evidence: Callable[[], object] = lambda: None,
        on_hang: Callable[[], None] | None = None,
    ) -> None:
        self._timeout_s = timeout_s
        self._local_rank = local_rank
        self._board = board
        self._grace_s: dict[Phase, float] = {**GRACE_S, **(grace_s or {})}
        self._peers = peers
        self._evidence = evidence
        self._suspected = 0.0  # beginning of the silence that evidence was left of
        self._on_hang = on_hang or _exit_retryable
        self._durations: dict[Phase, deque[float]] = defaultdict(lambda: deque(maxlen=32))
        self._phase: Phase = "start"
        self._step = 0
        self._since = time.monotonic()
        self._deadline = float("inf")  # of this silence: later than the promise while peers are busy
        self._promise = float("inf")  # of this phase
        self._beating = threading.Lock()
        self._told_at = self._asked_at = 0.0
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
        with self._beating:
            self._durations[self._phase].append(now - self._since)
            self._phase, self._step, self._since = phase, step, now
            if self._timeout_s <= 0:
                return
            self._deadline = self._promise = now + self.allowance_s(phase)
            if self._board is not None:
                self._board.write(self._local_rank, deadline=self._deadline, step=step, phase=phase)

    def begin_anew(self) -> None:
        """What follows is prepared as at a start, and its steps take their own time: that is learned anew."""
        with self._beating:
            self._durations.clear()
        self.beat(self._step, "start")

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
            if self._peers is not None:
                self._mind_peers(self._peers, now)
            if now > self._deadline - self._timeout_s / 2 and self._suspected != self._since:
                self._suspected = self._since
                threading.Thread(target=self._evidence, name="evidence", daemon=True).start()
            if now > self._deadline + delay:
                self._give_up(f"no progress for {now - self._since:.1f} s")
                return
            if tick % _TICKS_PER_LOOK == 0:
                stopped = stopped_children()
                stopped_since = (stopped_since or now) if stopped else None
                if stopped_since is not None and now > stopped_since + self._timeout_s:
                    self._give_up(f"child processes {stopped} are stopped")
                    return

    def _mind_peers(self, peers: Peers, now: float) -> None:
        """Tell them of a long phase of this rank; and past what this rank's phase may take, hear of
        theirs."""
        pause = self._timeout_s / 6
        # In a step this rank may itself be waiting: two that wait must not keep each other alive. And while
        # the run starts there may be no store yet, and everybody has equally much time.
        starting = self._phase == "start" and self._step == 0
        busy = self._phase != "step" and not starting and now - self._since > min(_BUSY_AFTER_S, pause)
        if busy and now < self._promise and now - self._told_at > pause:
            self._told_at = now
            peers.tell(f"{self._phase} of step {self._step}")
        elif now > self._deadline - self._timeout_s and now - self._asked_at > pause:
            self._asked_at = now
            peers.ask()
        heard, who = peers.heard
        with self._beating:
            if heard <= self._since or heard + self._timeout_s <= self._deadline:
                return
            if self._deadline == self._promise:
                logger.warning("step %d takes long: waiting for %s", self._step, who)
            self._deadline = heard + self._timeout_s
            if self._board is not None:
                self._board.extend(self._local_rank, self._deadline)

    def _give_up(self, reason: str) -> None:
        logger.error(
            "%s, in phase %s of step %d; stacks of all threads follow", reason, self._phase, self._step
        )
        faulthandler.dump_traceback(file=_STDERR, all_threads=True)
        self._on_hang()


def silence_s(config: DistributedConfig, num_nodes: int) -> float:
    """Seconds beyond the expected ones that a rank may be silent; 0: no watchdog."""
    if config.watchdog_s <= 0 or num_nodes == 1:
        return config.watchdog_s
    return config.watchdog_s + config.link_patience_s


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
    known = process_status(pid)
    return known is not None and known[0] == "T"


def _exit_retryable() -> None:
    # The main thread is stuck, perhaps inside a collective: no clean-up can be waited for.
    sys.stderr.flush()
    os._exit(ExitCode.RETRYABLE)
