"""What a run tells of itself while it trains: the record of a log interval, slow ranks, sick GPUs, phases,
the share of its data that is served, norms of its layers."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from data_pipeline.batch import FIRST, Tally, added
from data_pipeline.errors import DataError
from data_pipeline.loader import AnyLoader
from trainer.config.identity import changes
from trainer.config.io import config_to_dict
from trainer.distributed import collectives
from trainer.distributed.engine import Engine
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
    before, config = (run.whole.at(step) for step in (run.state.step - 1, run.state.step))
    changed = changes(config_to_dict(before), config_to_dict(config))
    settings = {
        "phase": run.phase.number,
        "image_size": config.data.image_size,
        "global_batch_size": config.global_batch_size,
        "learning_rate": config.optimizer.learning_rate,
    }
    told_apart = [dataclasses.asdict(each) for each in changed]
    run.sinks.event(run.state.step, run.state.samples_seen, "phase", **settings, changed=told_apart)
    if run.env.is_main:
        told = ", ".join(f"{name} {value}" for name, value in settings.items())
        logger.info("after step %d: %s", run.state.step, told)


class ServedShare:
    """Whether a run trains on its data: judges the first samples of a process, once.

    A filter with a slip in it, captions under another name, a tar whose members lie apart: the loader counts
    all of that and goes on with what is left, which may be one sample in a hundred, seen a hundred times as
    often. So over the first thousand samples of all ranks together the counts are told, and too many
    rejections end the run before it has cost anything. Together, since the lanes of one rank may well begin
    in the one bad shard. Later samples are in the metrics (`served_share`).
    """

    def __init__(self, limit: float) -> None:
        """limit: data.max_rejected_share"""
        self._limit = limit
        self._judged = False

    def judge(self, seen: float, tally: Tally, *, main_rank: bool) -> None:
        """Judge as soon as enough has been seen. Collective when it does, which `seen` decides.

        seen: samples that all ranks have looked at, the same number on every rank
        tally: this rank's

        Raises:
            DataError: on every rank, with the counts by reason.
        """
        if self._judged or seen < FIRST:
            return
        self._judged = True
        total = added(collectives.all_gather_object(tally))
        try:
            total.check(self._limit)
        except DataError as error:
            error.share = 1.0  # counted over all ranks: no machine is to blame
            raise
        if main_rank:
            logger.info("data: %s", total.sentence())


def layer_of(name: str) -> str:
    """The layer of a parameter: its modules down to the first that is numbered, two where none is.

    >>> layer_of("unet.down_blocks.0.resnets.1.conv1.weight")
    'unet.down_blocks.0'
    >>> layer_of("unet.conv_in.weight")
    'unet.conv_in'
    """
    modules = name.split(".")[:-1]
    numbered = next((place for place, module in enumerate(modules) if module.isdigit()), None)
    return ".".join(modules[: numbered + 1] if numbered is not None else modules[:2])


_FIRST_MOMENT = "exp_avg"


@torch.no_grad()
def layer_norms(engines: Mapping[str, Engine]) -> dict[str, float]:
    """Norms of weights and of their mean gradients, layer by layer: where a network grows, or stands still.

        layers/unet.down_blocks.0/weight    Euclidean norm of all its fp32 weights
        layers/unet.down_blocks.0/gradient  of Adam's first moment, the gradient averaged over about ten steps

    The first moment is what ZeRO keeps after a step, when the gradients themselves are gone; Muon's momentum
    stands in the same place, and Adafactor has none, nor that line. Each rank reads the elements that it owns
    (8 bytes a parameter, over all ranks together) and the ranks add up two numbers a layer, so the cost does
    not grow with their number; on other steps there is none. The same on every rank. Collective; waits for
    the device.
    """
    norms: dict[str, float] = {}
    for name, engine in engines.items():
        layers = list(dict.fromkeys(map(layer_of, engine.parameter_shapes)))
        prefix = "layers" if len(engines) == 1 else f"layers/{name}"
        sums = collectives.reduce_sum(_squares(engine, layers)).sqrt().tolist()
        for layer, (weight, gradient) in zip(layers, sums, strict=True):
            norms[f"{prefix}/{layer}/weight"] = weight
            if _FIRST_MOMENT in engine.moments:
                norms[f"{prefix}/{layer}/gradient"] = gradient
    return norms


def _squares(engine: Engine, layers: list[str]) -> Tensor:
    """Sums of squares of what this rank owns, float64 [layers, 2]."""
    row = {layer: place for place, layer in enumerate(layers)}
    sums = torch.zeros(len(layers), 2, dtype=torch.float64, device=engine.device)
    for fragment in engine.fragments():
        of_layer = sums[row[layer_of(fragment.name)]]
        of_layer[0] += torch.linalg.vector_norm(fragment.master, dtype=torch.float64).square()
        if _FIRST_MOMENT in fragment.moments:
            moment = fragment.moments[_FIRST_MOMENT]
            of_layer[1] += torch.linalg.vector_norm(moment, dtype=torch.float64).square()
    return sums
