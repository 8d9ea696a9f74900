"""Ranks that are slower than the others at work that waits for no other rank."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

OWN_PHASES = ("data", "encode")
"""Phases of StepTimer that wait for no other rank; forward and backward contain collectives."""


@dataclass(frozen=True)
class SlowRank:
    """A rank that was found slow."""

    rank: int
    seconds: float
    """Per step, of its own work."""
    times_median: float
    """`seconds` over the median of all ranks."""
    reports: int
    """Reports running in which it was slow, this one included."""


class SlowRanks:
    """Finds ranks that do their own work slower than the others, again and again.

    Feed it, at each log interval, every rank's seconds of work that waits for no other rank; step
    time itself is the same on all ranks, since everyone waits for the slowest. A rank is slow once
    it took `ratio` times the median, and more than it by at least `floor` of the step time, in
    `patience` reports running.
    """

    def __init__(self, *, ratio: float = 1.5, patience: int = 3, floor: float = 0.05) -> None:
        self.patience = patience
        self._ratio = ratio
        self._floor = floor
        self._strikes: dict[int, int] = defaultdict(int)

    def observe(self, seconds: Sequence[float], step_s: float) -> list[SlowRank]:
        """The slow ranks as of this report.

        Args:
            seconds: of own work per step, one figure per rank.
            step_s: seconds per step of the whole job, against which noise is told from a loss.
        """
        # The lower one: the mean of two ranks would hide the slow one behind its own time.
        median = statistics.median_low(seconds)
        found = []
        for rank, value in enumerate(seconds):
            slow = value > self._ratio * median > 0 and value - median > self._floor * step_s
            self._strikes[rank] = self._strikes[rank] + 1 if slow else 0
            if self._strikes[rank] >= self.patience:
                found.append(SlowRank(rank, value, value / median, self._strikes[rank]))
        return found


def own_seconds(record: Mapping[str, float]) -> float:
    """Seconds per step that this rank spent on its own work, from a record of Throughput."""
    return sum(record.get(f"time/{phase}_s", 0.0) for phase in OWN_PHASES)
