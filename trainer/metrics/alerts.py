"""Whom to wake: which events W&B sends to people, and what only several records together say.

A record is one log interval. A single bad one is a checkpoint, a preview or a validation; what counts is the
median of the newest few against the median of all that this start has seen:

    images/s   100 101  99 100  60 100  71  70  69  72  70   ->  "slower" once, until it is well again
                                 ^one    ^------ recent -----^
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Level = Literal["INFO", "WARN", "ERROR"]

ALERTS: dict[str, Level] = {
    "rewind": "ERROR",
    "storage outage": "ERROR",
    "step skipped": "WARN",
    "save failed": "WARN",
    "snapshot failed": "WARN",
    "preview failed": "WARN",
    "sick gpu": "WARN",
    "slow rank": "WARN",
    "slower": "WARN",
    "validation left out": "WARN",
    "validation not finite": "WARN",
    "waiting for data": "WARN",
    "resume": "INFO",
}
"""By the name of an event; others are on the curves and in the records only."""

RECENT = 5
"""Records of which the median is judged."""
REMEMBERED = 200
WAITING, SERVED = 0.2, 0.1
"""Share of a step spent waiting for data: bad above the first, well again below the second."""
SLOWER, AS_BEFORE = 0.8, 0.9
"""Of the usual images/s, likewise."""


@dataclass
class Trends:
    """On rank 0, since this start."""

    _rates: deque[float] = field(default_factory=lambda: deque(maxlen=REMEMBERED))
    _waits: deque[float] = field(default_factory=lambda: deque(maxlen=RECENT))
    _slower: bool = False
    _waiting: bool = False

    def observe(self, record: Mapping[str, float]) -> dict[str, dict[str, float]]:
        """Events that begin with this record, by name, with details named as no column is."""
        if "images_per_s" not in record or "data_wait" not in record:
            return {}
        self._rates.append(record["images_per_s"])
        self._waits.append(record["data_wait"])
        if len(self._rates) < 2 * RECENT:
            return {}
        found = {}
        recent = statistics.median(list(self._rates)[-RECENT:])
        usual = statistics.median(self._rates)
        if not self._slower and recent < SLOWER * usual:
            found["slower"] = {"recent": recent, "usual": usual}
        self._slower = recent < (AS_BEFORE if self._slower else SLOWER) * usual
        waits = statistics.median(self._waits)
        if not self._waiting and waits > WAITING:
            found["waiting for data"] = {"share": waits}
        self._waiting = waits > (SERVED if self._waiting else WAITING)
        return found
