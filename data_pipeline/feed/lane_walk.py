"""Lanes at work: plans windows, reads them ahead, serves samples in order."""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict, deque
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial

import numpy as np
from numpy.typing import NDArray

from data_pipeline.errors import DataError, Rejected
from data_pipeline.order.buckets import Buckets
from data_pipeline.order.lanes import Order
from data_pipeline.order.position import LaneState
from data_pipeline.shards.dataset import Dataset
from data_pipeline.shards.filters import Filter
from data_pipeline.shards.index import DEFECTS, ShardIndex, decode_index
from data_pipeline.shards.selection import Selection
from data_pipeline.storage.cache import BlockCache
from data_pipeline.storage.ranges import Background, RangeReader

_GAP = 128_000
"""Unwanted bytes between two members that are cheaper to read than a second request."""
_MIN_PLAN = 64
"""Raw samples planned at a time at least."""
_FIRST_RANGE_BYTES = 1_000_000
"""Most bytes asked for at once in the first windows of a lane."""
_STEPS_AHEAD = 8
"""Steps for which every lane has reads under way at least, memory permitting."""


@dataclass(frozen=True)
class _View:
    """What a lane needs of one shard's index."""

    keys: NDArray[np.bytes_]
    reasons: NDArray[np.int32]
    """[n] -1: read it; else position in `names`."""
    names: tuple[str, ...]
    offsets: NDArray[np.int64]
    """[wanted members, n] first byte, -1 where absent."""
    sizes: NDArray[np.int64]
    late: Filter | None
    """Clauses to be checked on each json."""
    buckets: NDArray[np.int16]
    """[n] bucket of every sample."""


@dataclass
class Visit:
    """One raw sample of a lane on its way."""

    epoch: int
    offset: int
    shard: int
    """Distinct shard."""
    key: str
    reason: str | None
    """Why it is rejected without being read."""
    members: dict[str, Future[dict[tuple[int, str], bytes]]] = field(default_factory=dict)
    slot: int = 0
    """Place in its plan."""
    late: Filter | None = None
    """Clauses that its json must still satisfy."""

    def load(self) -> dict[str, bytes]:
        """Member contents by extension; waits for them. Raises ReadFailed."""
        return {e: future.result().pop((self.slot, e)) for e, future in self.members.items()}


class ShardViews:
    """Index files of the shards in use, loaded once, the least recently used dropped."""

    def __init__(
        self, dataset: Dataset, selection: Selection, buckets: Buckets, reader: RangeReader, capacity: int
    ) -> None:
        self._dataset, self._selection, self._reader = dataset, selection, reader
        self._buckets = buckets
        self._capacity = capacity
        self._views: OrderedDict[int, Future[_View]] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, shard: int) -> _View:
        """View of one distinct shard; other threads that want it meanwhile wait for the same load."""
        with self._lock:
            future = self._views.get(shard)
            mine = future is None
            if future is None:
                future = self._views[shard] = Future()
            self._views.move_to_end(shard)
            while len(self._views) > self._capacity:
                self._views.popitem(last=False)
        if mine:
            try:
                future.set_result(self._load(shard))
            except BaseException as error:
                with self._lock:
                    self._views.pop(shard, None)
                future.set_exception(error)
                raise
        return future.result()

    def _load(self, shard: int) -> _View:
        url = self._dataset.index_urls[shard]
        data = self._reader.read_all(url)
        if hashlib.sha256(data).hexdigest() != self._dataset.checksums[shard]:
            raise DataError(f"The index {url} does not match its manifest; run `ldm data index` again.")
        index = decode_index(data, url)
        return self._view(index)

    def _view(self, index: ShardIndex) -> _View:
        reasons, names = self._selection.reasons(index)
        late = self._selection.undecided(index)
        offsets, sizes = [], []
        for extension in self._selection.members:
            first, size = np.full(len(index), -1, np.int64), np.zeros(len(index), np.int64)
            needed = extension != "json" or self._selection.reads_json or late is not None
            if extension in index.extensions and needed:
                first, size = index.extents(extension)
            offsets.append(first)
            sizes.append(size)
        defects = index.defects.astype(np.int32)
        reasons = np.where(defects > 0, defects + len(names), reasons)
        buckets = self._buckets.assign(*index.picture_sizes())
        return _View(
            index.keys, reasons, (*names, *DEFECTS), np.stack(offsets), np.stack(sizes), late, buckets
        )


class LaneWalk:
    """One lane's samples of one bucket, without end, read ahead within the worker's budget."""

    def __init__(self, lane: int, bucket: int, state: LaneState, walker: Walker) -> None:
        self.lane = lane
        self.bucket = bucket
        self.state = state
        self._walker = walker
        self._cursor = (state.epoch, state.offset)  # next raw offset to plan
        self._plans: deque[tuple[int, Future[list[Visit]]]] = deque()
        self._visits: deque[Visit] = deque()
        self._planned = 0

    @property
    def ready(self) -> int:
        """Raw samples planned and not yet visited."""
        return len(self._visits) + sum(n for n, _ in self._plans)

    def plan_next(self) -> int:
        """Start planning and reading the next windows; returns how many raw samples they hold."""
        order = self._walker.order
        epoch, offset = self._cursor
        if offset >= order.lane_size(self.lane):
            epoch, offset = epoch + 1, 0
        first, stop = order.window_of(self.lane, offset)
        while stop - offset < _MIN_PLAN and stop < order.lane_size(self.lane):
            stop = order.window_of(self.lane, stop)[1]
        task = partial(self._walker.plan, self, epoch, first, stop, offset, float(self._planned))
        self._plans.append((stop - offset, self._walker.background.submit(-1.0 + self._planned * 1e-9, task)))
        self._cursor = (epoch, stop)
        self._planned += stop - offset
        return stop - offset

    def next_visit(self) -> Visit:
        """The next raw sample in order; call `done` or `defer` with it afterwards. Raises DataError."""
        size, passed = self._walker.order.lane_size(self.lane), 0
        while True:
            while not self._visits:
                if not self._plans:
                    self.plan_next()
                count, plan = self._plans.popleft()
                self._visits.extend(plan.result())
                passed += count
                if passed > 3 * size + _MIN_PLAN:
                    raise DataError(
                        f"Lane {self.lane} has no sample of bucket {self.bucket}; lower data.lanes or "
                        "data.bucket_max_aspect."
                    )
            visit = self._visits[0]
            if visit.epoch > self.state.epoch and self.state.deferred:
                return self._walker.revisit(self, self.state.epoch, self.state.deferred[0])
            return self._visits.popleft()

    def done(self, visit: Visit) -> None:
        """The visit was served or rejected: commit it."""
        if visit.epoch == self.state.epoch and visit.offset < self.state.offset:
            self.state.deferred.remove(visit.offset)
            return
        self.state.epoch, self.state.offset = visit.epoch, visit.offset + 1

    def defer(self, visit: Visit) -> None:
        """Set the visit aside until the end of the epoch. Raises Rejected the second time."""
        if visit.epoch == self.state.epoch and visit.offset < self.state.offset:
            raise Rejected("unreadable")
        self.done(visit)
        self.state.deferred.append(visit.offset)


class Walker:
    """All lanes of one worker, with their shared reader, index views and read-ahead budget."""

    def __init__(
        self,
        dataset: Dataset,
        order: Order,
        selection: Selection,
        buckets: Buckets,
        reader: RangeReader,
        background: Background,
        *,
        lanes: Sequence[int],
        states: Sequence[LaneState],
        per_lane: int,
        cache: BlockCache | None,
        range_bytes: int,
        budget_bytes: int,
    ) -> None:
        self.order = order
        self.background = background
        self._dataset = dataset
        self._selection = selection
        self._reader = reader
        self._cache = cache
        self._range_bytes = max(1, range_bytes)
        self._enough = max(_MIN_PLAN, _STEPS_AHEAD * per_lane)
        self._budget = budget_bytes / max(1.0, dataset.mean_bytes)
        self._views = ShardViews(dataset, selection, buckets, reader, 2 * len(lanes) + 8)
        pairs = [(lane, bucket) for lane in lanes for bucket in range(len(buckets.shapes))]
        self._shares = buckets.weights
        self.walks = [
            LaneWalk(lane, bucket, state, self) for (lane, bucket), state in zip(pairs, states, strict=True)
        ]
        """Lane-major: bucket b of the i-th lane is at i * buckets + b."""

    def read_ahead(self) -> None:
        """Plan further windows, the most urgent lanes first, while the memory budget lasts."""
        waiting = [(walk.ready * self._shares[walk.bucket], i) for i, walk in enumerate(self.walks)]
        total = sum(ready for ready, _ in waiting)
        for ready, i in sorted(waiting):
            walk = self.walks[i]
            if ready == 0 or (total < self._budget and ready < self._enough * self._shares[walk.bucket]):
                total += walk.plan_next() * self._shares[walk.bucket]

    def plan(
        self, walk: LaneWalk, epoch: int, first: int, stop: int, skip_to: int, tick: float
    ) -> list[Visit]:
        """Visits of the whole windows [first, stop) from `skip_to` on, with their reads under way."""
        entries, rows = self.order.visits(epoch, walk.lane, first, stop)
        entries, rows = entries[skip_to - first :], rows[skip_to - first :]
        visits = self._visits(walk, epoch, skip_to, entries, rows)
        self._start_reads(visits, rows, tick)
        return visits

    def revisit(self, walk: LaneWalk, epoch: int, offset: int) -> Visit:
        """One visit that was set aside."""
        first, stop = self.order.window_of(walk.lane, offset)
        entries, rows = self.order.visits(epoch, walk.lane, first, stop)
        at = slice(offset - first, offset - first + 1)
        visits = self._visits(walk, epoch, offset, entries[at], rows[at])
        self._start_reads(visits, rows[at], 0.0)
        return visits[0]

    def _visits(
        self, walk: LaneWalk, epoch: int, offset: int, entries: NDArray[np.int64], rows: NDArray[np.int64]
    ) -> list[Visit]:
        shards = self._dataset.shard_of[entries]
        skipped = self._selection.skipped(self.order, epoch, walk.lane, offset, len(rows))
        visits = []
        for i, (shard, row) in enumerate(zip(shards.tolist(), rows.tolist(), strict=True)):
            view = self._views.get(shard)
            if view.buckets[row] != walk.bucket:
                continue
            code = int(view.reasons[row])
            reason = view.names[code] if code >= 0 else "skipped" if offset + i in skipped else None
            key = view.keys[row].decode("utf-8", "replace")
            visits.append(Visit(epoch, offset + i, shard, key, reason, slot=i, late=view.late))
        return visits

    def _start_reads(self, visits: list[Visit], rows: NDArray[np.int64], tick: float) -> None:
        wanted: dict[int, list[tuple[int, int, int, str]]] = {}
        for visit in visits:
            if visit.reason is not None:
                continue
            row = int(rows[visit.slot])
            view = self._views.get(visit.shard)
            for m, extension in enumerate(self._selection.members):
                start = int(view.offsets[m, row])
                if start >= 0:
                    size = int(view.sizes[m, row])
                    wanted.setdefault(visit.shard, []).append((start, start + size, visit.slot, extension))
        by_slot = {visit.slot: visit for visit in visits}
        # The first samples after a start wait for whole ranges, so those are short.
        limit = self._range_bytes if tick else min(self._range_bytes, _FIRST_RANGE_BYTES)
        for shard, members in wanted.items():
            for group in _ranges(sorted(members), limit):
                urgency = tick + min(slot for _, _, slot, _ in group)
                read = partial(self._read, shard, group)
                future = self.background.submit(urgency, read)
                for _, _, slot, extension in group:
                    by_slot[slot].members[extension] = future

    def _read(self, shard: int, group: list[tuple[int, int, int, str]]) -> dict[tuple[int, str], bytes]:
        start = group[0][0]
        stop = max(end for _, end, _, _ in group)
        data = self._bytes(shard, start, stop) if stop > start else b""
        # cut into members here, so that each sample's bytes are free once it is consumed
        return {(slot, extension): data[a - start : b - start] for a, b, slot, extension in group}

    def _bytes(self, shard: int, start: int, stop: int) -> bytes:
        url = self._dataset.urls[shard]
        if self._cache is None:
            return self._reader.read(url, start, stop)
        identity = f"{url} {self._dataset.versions[shard]}"
        fetch = partial(self._reader.read, url)
        return self._cache.read(identity, self._dataset.sizes[shard], start, stop, fetch)


def _ranges(members: list[tuple[int, int, int, str]], limit: int) -> list[list[tuple[int, int, int, str]]]:
    """Members (first byte, end, ...) in order of their place, grouped into requests of at most `limit`."""
    groups: list[list[tuple[int, int, int, str]]] = []
    for member in members:
        if groups:
            last = groups[-1]
            near = member[0] - last[-1][1] <= _GAP
            if near and member[1] - last[0][0] <= limit:
                last.append(member)
                continue
        groups.append([member])
    return groups
