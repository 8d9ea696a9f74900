"""Which samples made which step: by running the loader, or from the order and the index alone.

The index decides filters over its columns, removal lists, sizes, absent and blank captions. Whether a picture
can be decoded, what a json says that the index does not keep, and whether storage answered is known only once
a sample was read. Each sample so rejected moves its lane on by one, and all that the lane serves after it. A
run with data.reject_file writes them down, by ordinal, and `explain_step` reads them:

    {"reason": "not_an_image", "key": "00003/000030007", "detail": "...", "ordinal": 31007}
"""

from __future__ import annotations

import glob
import json
from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from data_pipeline.config import DataConfig
from data_pipeline.errors import DataError
from data_pipeline.order.buckets import Buckets
from data_pipeline.order.lanes import Order
from data_pipeline.order.position import LaneState
from data_pipeline.shards.dataset import Dataset
from data_pipeline.shards.held_out import open_held_out
from data_pipeline.shards.opening import open_dataset
from data_pipeline.shards.removals import read_removals
from data_pipeline.shards.selection import make_selection
from data_pipeline.shards.sources import configs_of
from data_pipeline.shards.view import ShardViews
from data_pipeline.storage.files import read_text
from data_pipeline.storage.ranges import RangeReader
from data_pipeline.tools.seek import Seeker, WindowStart

_EPOCHS = 2
"""Epochs of a lane without one sample after which it is called hopeless, as in training."""
_MAX_STEP = 10**8
_SET_ASIDE = "set_aside"


def trace(
    config: DataConfig,
    seed: int,
    global_batch_size: int,
    *,
    steps: range,
    ranks: int = 1,
    first_epoch: int = 0,
) -> Iterator[tuple[int, list[str]]]:
    """Run the real loader for all ranks from `first_epoch` on and yield (step, keys in global order)."""
    from data_pipeline.loader import Part, beginning, build_loader

    dataset = None if config.order == "resampled" else open_dataset(config, at_once=True)
    loaders = []
    try:
        for rank in range(ranks):
            loaders.append(
                build_loader(
                    config,
                    seed=seed,
                    global_batch_size=global_batch_size,
                    part=Part(rank, ranks),
                    position=beginning(first_epoch),
                    dataset=dataset,
                )
            )
        for step in range(steps.stop):
            keys = [key for loader in loaders for key in next(loader).keys]
            if step in steps:
                yield step, keys
    finally:
        for loader in loaders:
            loader.close()


def explain_step(
    config: DataConfig,
    seed: int,
    global_batch_size: int,
    step: int,
    *,
    rejects: Sequence[str] = (),
    first_epoch: int = 0,
) -> Iterator[dict[str, Any]]:
    """Samples of one step in global order, one record per slot, without reading pictures.

    `rejected_before` counts what the index and the run's reject files reject in the sample's lane and bucket
    (and source, where these have weights) from the beginning of `first_epoch` to the sample; `assumes` says
    what must hold for the sample to be the one that was served. `rejects` names reject files, by default
    those of data.reject_file.
    """
    _check_step(config, step)
    ledger = find_ledger(config, rejects)
    dataset = open_dataset(config)
    order = dataset.order(config, seed=seed, global_batch_size=global_batch_size)
    reader = RangeReader(
        timeout_s=config.request_timeout_s, tries=config.max_retries, patience_s=config.patience_s
    )
    buckets = dataset.buckets(config, order)
    removals = read_removals(config.removal_lists)
    selections = [make_selection(each, removals) for each in configs_of(config)]
    views = ShardViews(dataset, selections, buckets, reader, capacity=64)
    bucket = buckets.of_step(step)
    per_lane = global_batch_size // order.lanes
    first = buckets.turns(step)[bucket] * per_lane  # rows of a lane in earlier steps of this bucket
    mixture, numbers = buckets.mixtures[bucket], range(len(buckets.walks))[buckets.walks_of(bucket)]
    lanes = range(order.lanes)
    skips = [mixture.rows_before(lane, first) for lane in lanes]  # of each walk of the bucket
    walks = []
    for place, number in enumerate(numbers):
        # Only a walk from the start meets all that a ledger has.
        starts = [WindowStart(first_epoch, 0, 0, 0)] * order.lanes
        if not ledger.files:
            starts = Seeker(buckets, number, views, first_epoch).seek([skip[place] for skip in skips])
        walks.append(_TracedWalk(buckets, number, dataset, views, ledger, starts))
    for lane in lanes:
        served = [walk.served(lane, skip) for walk, skip in zip(walks, skips[lane], strict=True)]
        for i in range(per_lane):
            place = mixture.source(lane, first + i)
            state, shard, row, rejected = next(served[place])
            yield {
                "step": step,
                "slot": lane * per_lane + i,
                "key": dataset.sample_key(shard, views.get(shard).key(row)),
                "lane": lane,
                "epoch": state.epoch,
                "offset": state.offset,
                "ordinal": walks[place].order.ordinal(state.epoch, lane, state.offset),
                "rejected_before": rejected,
                "assumes": ledger.assumptions(config, views.undecided),
            }


def _check_step(config: DataConfig, step: int) -> None:
    if not 0 <= step < _MAX_STEP:
        raise DataError(f"--step is {step}; steps count from 0, and no run has {_MAX_STEP:,}.")
    if config.order != "indexed":
        raise DataError(
            f"data.order={config.order} has no index to explain a step from; `ldm data trace` runs it."
        )


def explain_validation(
    config: DataConfig, seed: int, global_batch_size: int, samples: int
) -> Iterator[dict[str, Any]]:
    """The samples of data.validation that a run measures, one record each, without reading pictures."""
    dataset = open_dataset(config) if config.order == "indexed" else None
    held = open_held_out(config, samples, seed=seed, global_batch_size=global_batch_size, dataset=dataset)
    for sample in held.samples:
        height, width = sample.shape
        yield {
            "key": sample.key,
            "ordinal": sample.ordinal,
            "weight": sample.weight,
            "height": height,
            "width": width,
        }


class _TracedVisit(NamedTuple):
    """One sample of a lane, as far as it is known what became of it."""

    place: LaneState
    shard: int
    row: int
    rejected: bool


@dataclass(frozen=True)
class _TracedWalk:
    """The lanes of one walk of a bucket, as far as index and ledger tell of them."""

    buckets: Buckets
    number: int
    """Among the walks of `buckets`."""
    dataset: Dataset
    views: ShardViews
    ledger: Ledger
    starts: Sequence[WindowStart]
    """Of each lane, a place that is not behind what is asked for."""

    @property
    def order(self) -> Order:
        """Which sample comes when."""
        order = self.buckets.orders[self.number]
        assert isinstance(order, Order)
        return order

    def served(self, lane: int, skip: int) -> Iterator[tuple[LaneState, int, int, int]]:
        """Served visits of a lane after the first `skip`: (place, shard, row, rejections before)."""
        start = self.starts[lane]
        seen, rejected = start.accepted, start.rejected
        for visit in self.visits(lane, start):
            view = self.views.get(visit.shard)
            beside = len(view.passed(visit.row))
            if visit.rejected:
                rejected += 1 + beside
                continue
            if seen >= skip:
                yield visit.place, visit.shard, visit.row, rejected
            seen += 1
            rejected += beside

    def visits(self, lane: int, start: WindowStart) -> Iterator[_TracedVisit]:
        """A lane's visits from a place on, what was set aside at the end of its epoch."""
        order, ledger, bucket = self.order, self.ledger, self.buckets.walks[self.number].bucket
        state, fruitless = LaneState(start.epoch, start.offset), 0
        deferred: list[_TracedVisit] = []
        while True:
            first, stop = order.window_of(lane, state.offset)
            shards, places = order.visits(state.epoch, lane, first, stop)
            pairs = zip(shards.tolist(), places.tolist(), strict=True)
            for offset, (shard, counted) in enumerate(pairs, first):
                view = self.views.get(shard)
                row = view.row(bucket, counted)
                ordinal = order.ordinal(state.epoch, lane, offset)
                key = self.dataset.sample_key(shard, view.key(row)) if ledger.files else ""
                rejected = bool(view.decided.codes[row] >= 0) or ledger.rejects(ordinal, key)
                visit = _TracedVisit(LaneState(state.epoch, offset), shard, row, rejected)
                if ledger.defers(ordinal, key):
                    deferred.append(visit)
                    continue
                fruitless = fruitless + 1 if rejected else 0
                yield visit
            state.offset = stop
            if stop >= order.lane_size(lane):
                yield from deferred
                deferred = []
                state = LaneState(state.epoch + 1, 0)
                if fruitless > _EPOCHS * order.lane_size(lane):
                    raise DataError(
                        f"Every sample of lane {lane} is rejected; loosen data.filter, lower data.lanes or "
                        "correct the shards."
                    )


@dataclass
class Ledger:
    """Rejections of a run, as its reject files tell them."""

    files: tuple[str, ...] = ()
    rejected: defaultdict[int, set[str]] = field(default_factory=lambda: defaultdict(set))
    """Keys by ordinal: with buckets, samples that no order counts have the ordinal of a neighbour."""
    set_aside: defaultdict[int, set[str]] = field(default_factory=lambda: defaultdict(set))
    """Visits that storage did not answer, which came again at the end of their epoch."""

    def rejects(self, ordinal: int, key: str) -> bool:
        """Whether the run rejected a visit, at once or when it came again."""
        return ordinal in self.rejected and key in self.rejected[ordinal]

    def defers(self, ordinal: int, key: str) -> bool:
        """Whether the run set a visit aside."""
        return ordinal in self.set_aside and key in self.set_aside[ordinal]

    def assumptions(self, config: DataConfig, undecided: Collection[str]) -> list[str]:
        """What must hold for the answer to be exact; `undecided` clauses of the filter need each json."""
        if self.files:
            return [f"{', '.join(self.files)} hold every rejection of the run up to this step"]
        told = (line for each in configs_of(config) for line in _assumed(each, undecided))
        return list(dict.fromkeys(told))


def find_ledger(config: DataConfig, paths: Sequence[str] = ()) -> Ledger:
    """The reject files `paths`, with wildcards, or those of data.reject_file as far as they exist.

    Raises DataError for paths that match nothing, and for files that are no reject files.
    """
    given = list(paths)
    if not given and config.reject_file:
        given = [glob.escape(config.reject_file).replace("{rank}", "*")]
    files: list[str] = []
    for path in given:
        found = sorted(glob.glob(path)) or ([path] if "://" in path else [])
        if paths and not found:
            raise DataError(f"--rejects {path} matches no file; name data.reject_file of all ranks.")
        files += found
    ledger = Ledger(tuple(files))
    for file in files:
        _read(ledger, file)
    return ledger


def _assumed(config: DataConfig, undecided: Collection[str]) -> Iterator[str]:
    yield "every picture before could be decoded"
    for text in sorted(undecided):
        yield f"every json before satisfied `{text}`, which the index does not decide"
    if config.require_caption and (columns := [source for source in config.captions if source != "txt"]):
        yield f"every sample before had a caption (the index knows those of txt, not of {', '.join(columns)})"
    for condition in config.conditions:
        yield f"every sample before had its {condition}"
    if config.removal_lists:
        yield "the removal lists were the same from the start"
    yield "storage answered, and nothing was skipped after a loss spike"


def _read(ledger: Ledger, file: str) -> None:
    lines = read_text(file).split("\n")
    for number, line in enumerate(lines, 1):
        if not line or (number == len(lines) and line.startswith("{") and not line.endswith("}")):
            continue  # a crash may have torn the last line
        try:
            record = json.loads(line)
            reason, key, ordinal = str(record["reason"]), str(record["key"]), int(record["ordinal"])
        except (ValueError, LookupError, TypeError, RecursionError) as error:
            raise DataError(
                f"{file}, line {number} is no record of a rejection ({error}); name data.reject_file."
            ) from error
        (ledger.set_aside if reason == _SET_ASIDE else ledger.rejected)[ordinal].add(key)
