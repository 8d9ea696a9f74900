"""Which samples made which step: by running the loader, or from the order and the index alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from data_pipeline.config import DataConfig
from data_pipeline.errors import DataError
from data_pipeline.order.buckets import Buckets
from data_pipeline.order.position import LaneState
from data_pipeline.shards.dataset import Dataset, open_dataset
from data_pipeline.shards.selection import make_selection
from data_pipeline.shards.view import ShardViews
from data_pipeline.storage.ranges import RangeReader
from data_pipeline.tools.seek import Place, Seeker


def trace(
    config: DataConfig, seed: int, global_batch_size: int, *, steps: range, ranks: int = 1
) -> Iterator[tuple[int, list[str]]]:
    """Run the real loader for all ranks and yield (step, keys in global order)."""
    from data_pipeline.loader import build_loader

    dataset = open_dataset(config) if config.order == "indexed" else None
    loaders = []
    try:
        for rank in range(ranks):
            loaders.append(
                build_loader(
                    config,
                    seed=seed,
                    global_batch_size=global_batch_size,
                    rank=rank,
                    world_size=ranks,
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
    config: DataConfig, seed: int, global_batch_size: int, step: int
) -> Iterator[dict[str, Any]]:
    """Samples of one step in global order, one record per slot, without reading pictures.

    `rejected_before` counts what the index rejects (filters, removal lists, defects) in the sample's lane
    and bucket from the start of the run to the sample. Pictures that turn out to be unreadable later are
    not known here, so lanes that met some are ahead of what this says.
    """
    if step < 0:
        raise DataError(f"--step is {step}; steps count from 0.")
    if config.order != "indexed":
        raise DataError("data.order=resampled has no index to explain a step from; `ldm data trace` runs it.")
    dataset = open_dataset(config)
    order = dataset.order(config, seed=seed, global_batch_size=global_batch_size)
    reader = RangeReader(
        timeout_s=config.request_timeout_s, tries=config.max_retries, patience_s=config.patience_s
    )
    buckets = dataset.buckets(config, order)
    views = ShardViews(dataset, make_selection(config), buckets, reader, capacity=64)
    wanted = buckets.of_step(step)
    earlier = buckets.turns(step)[wanted]  # steps that this bucket had before
    per_lane = global_batch_size // order.lanes
    skip = earlier * per_lane
    for lane, place in enumerate(Seeker(buckets, wanted, dataset, views).seek(skip)):
        for i, (state, shard, row, rejected) in enumerate(
            _accepted(buckets, dataset, views, lane, wanted, place, skip, per_lane)
        ):
            view = views.get(shard)
            yield {
                "step": step,
                "slot": lane * per_lane + i,
                "key": dataset.sample_key(shard, view.key(row)),
                "lane": lane,
                "epoch": state.epoch,
                "offset": state.offset,
                "ordinal": buckets.orders[wanted].ordinal(state.epoch, lane, state.offset),
                "rejected_before": rejected,
            }


def _accepted(
    buckets: Buckets,
    dataset: Dataset,
    views: ShardViews,
    lane: int,
    bucket: int,
    place: Place,
    skip: int,
    take: int,
) -> Iterator[tuple[LaneState, int, int, int]]:
    """The `take` accepted visits of a lane after the first `skip`: (place, shard, row, rejections before)."""
    seen, rejected = place.accepted, place.rejected
    order = buckets.orders[bucket]
    state = LaneState(place.epoch, place.offset)
    while True:
        first, stop = order.window_of(lane, state.offset)
        entries, places = order.visits(state.epoch, lane, first, stop)
        for offset, (entry, counted) in enumerate(zip(entries.tolist(), places.tolist(), strict=True), first):
            shard = int(dataset.shard_of[entry])
            view = views.get(shard)
            row = view.row(bucket, counted)
            if view.codes[row] >= 0:
                rejected += 1 + len(view.passed(row))
                continue
            if seen >= skip:
                yield LaneState(state.epoch, offset), shard, row, rejected
            seen += 1
            rejected += len(view.passed(row))
            if seen == skip + take:
                return
        state.offset = stop
        if stop >= order.lane_size(lane):
            state = LaneState(state.epoch + 1, 0)
