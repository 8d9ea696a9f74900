"""One worker's share of every step: walks its lanes and fills arrays in shared memory."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_pipeline.config import DataConfig
from data_pipeline.errors import DataError, ReadFailed, Rejected
from data_pipeline.feed.conditions import condition_arrays
from data_pipeline.feed.lane_walk import LaneWalk, Visit, Walker
from data_pipeline.feed.sample import fill_sample, sample_arrays
from data_pipeline.order.buckets import Buckets
from data_pipeline.order.lanes import Order
from data_pipeline.order.position import LaneState
from data_pipeline.shards.dataset import Dataset
from data_pipeline.shards.selection import make_selection
from data_pipeline.storage.cache import BlockCache
from data_pipeline.storage.ranges import Background, RangeReader

_ALIGN = 64
_MIN_REJECTED_RUN = 1000
_THREADS = 16


@dataclass(frozen=True)
class ShareTask:
    """Everything a worker needs to know."""

    config: DataConfig
    dataset: Dataset
    order: Order
    lanes: range
    buckets: Buckets
    step: int
    """Steps done before."""
    states: tuple[LaneState, ...]
    """One per lane and bucket, lane-major."""
    per_lane: int
    """Samples per lane and step."""
    skip_ordinals: frozenset[int] = frozenset()

    @property
    def size(self) -> int:
        """Samples per step."""
        return len(self.lanes) * self.per_lane

    def layout(self, height: int = 0, width: int = 0) -> ShareLayout:
        """Layout of a share of this picture size; 0: the largest that occurs."""
        if height and width:
            return ShareLayout(self.config, self.size, height, width)
        layouts = [ShareLayout(self.config, self.size, h, w) for h, w in self.buckets.shapes]
        return max(layouts, key=lambda layout: layout.bytes)


@dataclass
class Share:
    """What goes with the arrays of one step."""

    height: int
    width: int
    captions: list[str]
    keys: list[str]
    states: list[list[Any]]
    """JSON form of each lane's state once this share is consumed."""
    rejects: list[tuple[str, str, str, int]] = field(default_factory=list)
    """(reason, key, detail, ordinal) since the last share"""
    counts: dict[str, int] = field(default_factory=dict)
    """requests, bytes, retries, failures since the last share"""


class ShareLayout:
    """Where the arrays of one share lie in a flat buffer."""

    def __init__(self, config: DataConfig, size: int, height: int, width: int) -> None:
        self._fields: list[tuple[str, np.dtype[Any], tuple[int, ...], int]] = []
        position = 0
        spec = sample_arrays(height, width) | condition_arrays(config, height, width)
        for name, (kind, shape) in spec.items():
            dtype = np.dtype(kind)
            self._fields.append((name, dtype, (size, *shape), position))
            count = int(np.prod((size, *shape), dtype=np.int64))
            position += -(-count * dtype.itemsize // _ALIGN) * _ALIGN
        self.bytes = position

    def arrays(self, buffer: memoryview) -> dict[str, NDArray[Any]]:
        """Views of a buffer of at least `bytes`."""
        return {
            name: np.frombuffer(
                buffer, dtype, count=int(np.prod(shape, dtype=np.int64)), offset=position
            ).reshape(shape)
            for name, dtype, shape, position in self._fields
        }


class ShareStream:
    """Produces the shares of one worker, in step order, for ever."""

    def __init__(self, task: ShareTask) -> None:
        config = task.config
        self._task = task
        self._reader = RangeReader(
            timeout_s=config.request_timeout_s,
            tries=config.max_retries,
            patience_s=config.patience_s,
            probes=(*task.dataset.urls[:2], *task.dataset.urls[-2:], *task.dataset.index_urls[:1]),
        )
        self._background = Background(_THREADS)
        self._walker = Walker(
            task.dataset,
            task.order,
            make_selection(config, task.skip_ordinals),
            task.buckets,
            self._reader,
            self._background,
            lanes=task.lanes,
            states=[s.copy() for s in task.states],
            per_lane=task.per_lane,
            cache=BlockCache(config.cache_dir, config.cache_bytes) if config.cache_dir else None,
            range_bytes=config.read_ahead_bytes,
            budget_bytes=config.buffer_bytes,
        )
        self._step = task.step
        self._sent: Counter[str] = Counter()
        self._rejects: list[tuple[str, str, str, int]] = []
        self._walker.read_ahead()

    def fill(self, buffer: memoryview) -> Share:
        """Write the arrays of the next step to `buffer`. Raises DataError."""
        buckets = self._task.buckets
        bucket = buckets.of_step(self._task.order.seed, self._step)
        height, width = buckets.shapes[bucket]
        out = self._task.layout(height, width).arrays(buffer)
        captions: list[str] = []
        keys: list[str] = []
        for walk in self._walker.walks[bucket :: len(buckets.shapes)]:
            for _ in range(self._task.per_lane):
                caption, key = self._fill_row(walk, (height, width), out, len(keys))
                captions.append(caption)
                keys.append(key)
        self._walker.read_ahead()
        self._step += 1
        share = Share(
            height=height,
            width=width,
            captions=captions,
            keys=keys,
            states=[walk.state.as_json() for walk in self._walker.walks],
            rejects=self._rejects,
            counts=dict(self._reader.counts - self._sent),
        )
        self._sent = self._reader.counts.copy()
        self._rejects = []
        return share

    def _fill_row(
        self, walk: LaneWalk, target: tuple[int, int], out: dict[str, NDArray[Any]], row: int
    ) -> tuple[str, str]:
        order = self._task.order
        for _ in range(max(_MIN_REJECTED_RUN, 2 * order.lane_size(walk.lane))):
            visit = walk.next_visit()
            ordinal = order.ordinal(visit.epoch, walk.lane, visit.offset)
            try:
                caption = self._serve(walk, visit, ordinal, target, out, row)
            except Rejected as error:
                walk.done(visit)
                self._rejects.append((error.reason, self._key(visit), error.detail, ordinal))
                continue
            if caption is None:
                continue
            walk.done(visit)
            out["ordinals"][row] = ordinal
            return caption, self._key(visit)
        raise self._all_rejected(walk)

    def _serve(
        self,
        walk: LaneWalk,
        visit: Visit,
        ordinal: int,
        target: tuple[int, int],
        out: dict[str, NDArray[Any]],
        row: int,
    ) -> str | None:
        """Caption, or None when the visit was set aside."""
        if visit.reason is not None:
            raise Rejected(visit.reason)
        try:
            members = visit.load()
        except ReadFailed as error:
            walk.defer(visit)
            self._rejects.append(("set_aside", self._key(visit), str(error)[:300], ordinal))
            return None
        return fill_sample(
            self._task.config,
            members,
            late=visit.late,
            target=target,
            seed=self._task.order.seed,
            ordinal=ordinal,
            out=out,
            row=row,
        )

    def _key(self, visit: Visit) -> str:
        return self._task.dataset.sample_key(visit.shard, visit.key)

    def _all_rejected(self, walk: LaneWalk) -> DataError:
        reasons = Counter(reason for reason, _, _, _ in self._rejects).most_common(3)
        listed = ", ".join(f"{reason} ({count})" for reason, count in reasons)
        return DataError(
            f"Every sample of lane {walk.lane} ({self._task.order.lane_size(walk.lane)} per epoch) is "
            f"rejected: {listed}; loosen data.filter, lower data.lanes or correct the shards."
        )

    def close(self) -> None:
        """Stop the threads."""
        self._reader.close()
        self._background.close()
