"""What a run tells of itself while it trains: the record of a log interval, slow ranks, sick GPUs, phases."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from data_pipeline.loader import AnyLoader
from trainer.reliability.gpu_health import health_record
from trainer.reliability.slow_ranks import RankReport, SlowRanks, data_record, gather_reports, times_record
from trainer.run import Run

logger = logging.getLogger(__name__)


def report(run: Run, record: dict[str, float], batches: AnyLoader, slow_ranks: SlowRanks) -> None:
    """Record a log interval: what this rank has of it, and what the ranks tell each other. Collective."""
    own = run.gpu.examine() if run.gpu is not None else None
    reports = gather_reports(batches.tally, batches.counts, record, own)
    record |= data_record(reports) | slow_record(run, slow_ranks, reports, record) | run.save_record()
    record |= times_record(reports) | health_record([each.health for each in reports])
    tell_sick(run, reports)
    run.sinks.log(run.state.step, run.state.samples_seen, record)


def tell_sick(run: Run, reports: Sequence[RankReport]) -> None:
    """On rank 0, an event and a warning about each GPU whose driver tells of something new."""
    for rank, each in enumerate(reports):
        if run.env.is_main and each.health is not None and each.health.symptoms:
            details = {"rank": rank, "host": each.health.node, "what": "; ".join(each.health.symptoms)}
            run.sinks.event(run.state.step, run.state.samples_seen, "sick gpu", **details)
            logger.warning("the GPU of rank %(rank)d on %(host)s: %(what)s; leave that node out", details)


def slow_record(
    run: Run, slow_ranks: SlowRanks, reports: Sequence[RankReport], record: dict[str, float]
) -> dict[str, float]:
    """On rank 0, the number of slow ranks; who has just become one is an event and a warning.

    Nothing while `record` has no seconds per step: the first interval warms up.
    """
    if "step_s" not in record or not run.env.is_main:
        return {}
    slow = slow_ranks.observe(reports, record["step_s"])
    new = [found for found in slow if found.reports == slow_ranks.patience]
    for found in new:
        details = {"rank": found.rank, "host": found.host, "own_s": found.seconds, "step_s": record["step_s"]}
        run.sinks.event(run.state.step, run.state.samples_seen, "slow rank", **details)
    if new:
        names = ", ".join(f"rank {s.rank} ({s.host}) needs {s.times_median:.1f}x" for s in new)
        logger.warning(
            "%s the median time for its own work, for %d reports running", names, slow_ranks.patience
        )
    return {"slow_ranks": float(len(slow))}


def tell_phase(run: Run) -> None:
    """Into log and records: which phase begins, and with what."""
    config = run.whole.at(run.state.step)
    settings = {
        "phase": run.phase.number,
        "image_size": config.data.image_size,
        "global_batch_size": config.global_batch_size,
        "learning_rate": config.optimizer.learning_rate,
    }
    run.sinks.event(run.state.step, run.state.samples_seen, "phase", **settings)
    if run.env.is_main:
        told = ", ".join(f"{name} {value}" for name, value in settings.items())
        logger.info("after step %d: %s", run.state.step, told)
