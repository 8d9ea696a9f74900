"""What ranks tell each other at a log interval, and which of them are slow at work that waits for nobody."""

from __future__ import annotations

import socket
import statistics
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from data_pipeline.batch import Tally, added
from trainer.distributed import collectives
from trainer.reliability.gpu_health import Health

_TIME = "time/"
"""Before the seconds of a phase in a record."""
OWN_PHASES = ("data", "encode")
"""Phases of StepTimer that wait for no other rank; forward and backward contain collectives."""


@dataclass(frozen=True)
class RankReport:
    """What one rank tells the others at a log interval."""

    rejected: Counter[str]
    """Samples rejected since the start, by reason."""
    storage: Counter[str]
    """Reads and their retries since the start, by name."""
    host: str
    """Name of its machine."""
    own_s: float
    """Seconds per step of work that waits for no other rank."""
    served: int = 0
    """Samples served since the start."""
    health: Health | None = None
    """Of its GPU, where the driver says anything about it."""
    times: Mapping[str, float] = field(default_factory=dict)
    """Seconds per step of each phase of its timer."""


@dataclass(frozen=True)
class SlowRank:
    """A rank that was found slow."""

    rank: int
    host: str
    seconds: float
    """Per step, of its own work."""
    times_median: float
    """`seconds` over the median of all ranks."""
    reports: int
    """Reports running in which it was slow, this one included."""


def gather_reports(
    tally: Tally, storage: Counter[str], record: Mapping[str, float], health: Health | None = None
) -> list[RankReport]:
    """The reports of all ranks, in rank order; `record` holds this rank's times. Collective."""
    host, own_s = socket.gethostname(), own_seconds(record)
    times = {
        name.removeprefix(_TIME).removesuffix("_s"): value
        for name, value in record.items()
        if name.startswith(_TIME)
    }
    report = RankReport(tally.rejected, storage, host, own_s, tally.served, health, times)
    return collectives.all_gather_object(report)


def own_seconds(record: Mapping[str, float]) -> float:
    """Seconds per step that this rank spent on its own work, from a record of Throughput."""
    return sum(record.get(f"{_TIME}{phase}_s", 0.0) for phase in OWN_PHASES)


def times_record(reports: Sequence[RankReport]) -> dict[str, float]:
    """Over all ranks: the most that each own phase takes, who has most of all, and the longest wait.

    Phases with collectives in them end on all ranks together, so whoever is there longer has waited: the
    difference between the most and the least of them is communication that only waits. Nothing of a rank
    alone, nor while the first interval warms up.
    """
    if len(reports) < 2 or not reports[0].times:
        return {}
    found = {
        f"ranks/{phase}_s_most": max(report.times.get(phase, 0.0) for report in reports)
        for phase in OWN_PHASES
        if phase in reports[0].times
    }
    together = [sum(report.times.values()) - report.own_s for report in reports]
    slowest = max(range(len(reports)), key=lambda rank: reports[rank].own_s)
    return {**found, "ranks/slowest": float(slowest), "ranks/waits_s_most": max(together) - min(together)}


def data_record(reports: Sequence[RankReport]) -> dict[str, float]:
    """Samples served and rejected, and reads of storage, over all ranks since the start."""
    tally = added(Tally(report.served, report.rejected) for report in reports)
    total: Counter[str] = Counter()
    for report in reports:
        total.update({f"rejected/{reason}": count for reason, count in report.rejected.items()})
        total.update({f"storage/{name}": count for name, count in report.storage.items()})
    share = {"served_share": tally.served_share} if tally.served else {}
    return {name: float(count) for name, count in total.items()} | share


class SlowRanks:
    """Finds ranks that do their own work slower than the others, again and again.

    Step time itself is the same on all ranks, since everyone waits for the slowest. A rank is slow once
    its own work took `ratio` times the median, and more than it by at least `floor` of the step time, in
    `patience` reports running.
    """

    def __init__(self, *, ratio: float = 1.5, patience: int = 3, floor: float = 0.05) -> None:
        self.patience = patience
        self._ratio = ratio
        self._floor = floor
        self._strikes: dict[int, int] = defaultdict(int)

    def observe(self, reports: Sequence[RankReport], step_s: float) -> list[SlowRank]:
        """The slow ranks as of these reports.

        Args:
            reports: in rank order.
            step_s: seconds per step of the whole job, against which noise is told from a loss.
        """
        # The lower one: the mean of two ranks would hide the slow one behind its own time.
        median = statistics.median_low(report.own_s for report in reports)
        found = []
        for rank, report in enumerate(reports):
            excess = report.own_s - median
            slow = report.own_s > self._ratio * median > 0 and excess > self._floor * step_s
            self._strikes[rank] = self._strikes[rank] + 1 if slow else 0
            if self._strikes[rank] >= self.patience:
                times = report.own_s / median
                found.append(SlowRank(rank, report.host, report.own_s, times, self._strikes[rank]))
        return found
