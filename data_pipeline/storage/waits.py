"""Waiting for storage is told: what is not answered, what is tried again, and how it ended.

    seconds    0        15                     30               45                     47
    request    sent     "no answer for 15 s"   given up, sent   "no answer for 15 s"   "answered, after 17 s"
    call       begins                          "tried again"                           "is read, after 47 s"

What lasts less is nobody's business: throttling and resets are what retries are for. A whole run writes
about a line a second of it, however many ranks wait: rank r waits r seconds longer before it speaks, and
speaks once in as many seconds as there are other ranks. Each of a rank's loader workers, and its writer of
checkpoints, does the same on its own.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager

from data_pipeline.processes import told_rank
from data_pipeline.storage.urls import without_secrets

logger = logging.getLogger(__name__)

_QUIET_S = 15.0
"""Of a wait, before anything is said of it."""
_BETWEEN_S = 10.0
"""Two lines of one process at least; what is left out is counted."""


class _Speaker:
    """What this process has said of its waits, for all threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._spoke_at = float("-inf")
        self._left_out = 0

    def say(self, line: str) -> bool:
        """Write the line unless one was written just now; whether it was."""
        _, ranks = told_rank()
        with self._lock:
            now = time.monotonic()
            if now - self._spoke_at < max(_BETWEEN_S, ranks - 1):
                self._left_out += 1
                return False
            others = f" [like lines left out since the last: {self._left_out}]" if self._left_out else ""
            self._spoke_at, self._left_out = now, 0
        logger.warning("%s%s", without_secrets(line), others)
        return True


_SPEAKER = _Speaker()


def quiet_s() -> float:
    """Seconds that a wait of this process may last before it is worth a line."""
    return _QUIET_S + told_rank()[0]


def tell(waited_s: float, line: str) -> bool:
    """Log a call that is about to be tried again; whether that was due."""
    return waited_s >= quiet_s() and _SPEAKER.say(line)


def tell_end(line: str) -> None:
    """Log how a wait ended of which somebody was told."""
    logger.warning("%s", without_secrets(line))


@contextmanager
def unanswered(what: Callable[[], str], *, deadline_s: float, slack_s: float) -> Generator[None]:
    """Around a request in a running event loop: say that it is not answered, and that it was in the end.

    Args:
        what: the request, for people.
        deadline_s: seconds after which it is given up.
        slack_s: seconds that its own bytes may take, of which nothing is said.
    """
    began, told = time.monotonic(), False

    def speak() -> None:
        nonlocal told
        waited = time.monotonic() - began
        told = _SPEAKER.say(
            f"storage has not answered {what()} for {waited:.0f} s; the request is given up after "
            f"{deadline_s:.0f} s"
        )

    timer = asyncio.get_running_loop().call_later(quiet_s() + slack_s, speak)
    try:
        yield
    finally:
        timer.cancel()
    if told:
        tell_end(f"storage has answered {what()}, after {time.monotonic() - began:.0f} s")
