"""What the ranks tell each other at a log interval, and what becomes of it."""

from __future__ import annotations

import logging
import socket
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from data_pipeline.feed.resampled import ResampledLoader
from data_pipeline.loader import Loader
from trainer.assembly import Run
from trainer.distributed import collectives
from trainer.reliability.slow_ranks import SlowRanks, own_seconds

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Report:
    """What one rank tells the others at a log interval."""

    rejected: Counter[str]
    """Samples rejected since the start, by reason."""
    storage: Counter[str]
    """Retries of reads since the start, by name."""
    host: str
    """Name of its machine."""
    own_s: float
    """Seconds per step of work that waits for no other rank."""


def gather_reports(batches: Loader | ResampledLoader, record: dict[str, float]) -> list[Report]:
    """The reports of all ranks, in rank order; `record` holds this rank's times. Collective."""
    report = Report(batches.rejected, batches.counts, socket.gethostname(), own_seconds(record))
    return collectives.all_gather_object(report)


def data_record(reports: Sequence[Report]) -> dict[str, float]:
    """Rejected samples by reason, and retries of reads, over all ranks since the start."""
    total: Counter[str] = Counter()
    for report in reports:
        total.update({f"rejected/{reason}": count for reason, count in report.rejected.items()})
        total.update({f"storage/{name}": count for name, count in report.storage.items()})
    return {name: float(count) for name, count in total.items()}


def slow_record(
    run: Run, slow_ranks: SlowRanks, reports: Sequence[Report], record: dict[str, float]
) -> dict[str, float]:
    """On rank 0, the number of slow ranks; who has just become one is an event and a warning.

    Nothing while `record` has no seconds per step: the first interval warms up.
    """
    if "step_s" not in record or not run.env.is_main:
        return {}
    step_s = record["step_s"]
    slow = slow_ranks.observe([report.own_s for report in reports], step_s)
    new = [(found, reports[found.rank].host) for found in slow if found.reports == slow_ranks.patience]
    for found, host in new:
        details = {"rank": found.rank, "host": host, "own_s": found.seconds, "step_s": step_s}
        run.sinks.event(run.state.step, run.state.samples_seen, "slow rank", **details)
    if new:
        logger.warning(
            "%s the median time for its own work, for %d reports running",
            ", ".join(f"rank {found.rank} ({host}) needs {found.times_median:.1f}x" for found, host in new),
            slow_ranks.patience,
        )
    return {"slow_ranks": float(len(slow))}
