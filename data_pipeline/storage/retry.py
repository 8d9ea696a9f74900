"""Retries with exponential backoff and jitter, and which failures are worth one."""

from __future__ import annotations

import random
import re
import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

_FIRST_PAUSE_S = 0.1
_LONGEST_PAUSE_S = 20.0
_TRANSIENT = re.compile(
    r"timeout|timed out|connect|reset|closed|incomplete|payload|slow ?down|throttl|too many|"
    r"internal ?error|unavailable|bad gateway|temporar|short body|\b(429|500|502|503|504)\b|eof",
    re.IGNORECASE,
)


class ShortBody(OSError):
    """The server sent fewer bytes than it promised."""


def is_transient(error: BaseException) -> bool:
    """Whether the same request may succeed later: network trouble, throttling, 5xx, a short body."""
    if isinstance(error, (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)):
        return False
    if isinstance(error, (ConnectionError, TimeoutError, ShortBody)):
        return True
    return bool(_TRANSIENT.search(f"{type(error).__name__} {error}"))


def pause_before(attempt: int) -> float:
    """Seconds to wait before try number `attempt` (1 is the second try): full jitter."""
    return random.uniform(0.5, 1.0) * min(_LONGEST_PAUSE_S, _FIRST_PAUSE_S * 2.0 ** (attempt - 1))


def with_retries(
    action: Callable[[], T],
    *,
    tries: int,
    sleep: Callable[[float], object] = time.sleep,
) -> T:
    """Call `action` until it succeeds or `tries` transient failures; others are raised at once."""
    for attempt in range(1, tries + 1):
        try:
            return action()
        except Exception as error:
            if attempt == tries or not is_transient(error):
                raise
        sleep(pause_before(attempt))
    raise AssertionError("tries must be at least 1")
