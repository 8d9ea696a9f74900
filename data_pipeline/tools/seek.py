"""Where a lane stands before any step, without walking there: counts of the indexes in place of samples.

Windows of a lane are shuffled inside, so they are contiguous in the stream: what is accepted before a window
is what is accepted of the stream from the lane's start on. To pass 1000 accepted samples of lane l:

    epoch 0                             |  epochs 1 to e - 1          |  epoch e
    shard by shard to the 1000th        |  only if it is not there:   |  as in epoch 0, to the window
    accepted one, or the lane's end     |  whole epochs, many at once |  that holds the 1000th

Early steps of a large set thus read the few indexes that a walk would read, and late steps of a small set
are sums of arrays.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from data_pipeline.errors import DataError
from data_pipeline.order.buckets import Buckets
from data_pipeline.order.lanes import Order
from data_pipeline.shards.view import ShardViews

_READERS = 16
_CHUNK = 2_000_000
"""Shards times epochs that are summed at a time."""
Counts: TypeAlias = tuple[int, int]
"""Accepted samples, and those that the index rejects."""


@dataclass(frozen=True)
class WindowStart:
    """The beginning of a window of a lane."""

    epoch: int
    offset: int
    accepted: int
    """Accepted samples of the lane from the start of the run to here."""
    rejected: int
    """The same of those that the index rejects."""


class Seeker:
    """Finds places of one walk's lanes: of a bucket, or of a source in it where sources have weights."""

    def __init__(self, buckets: Buckets, number: int, views: ShardViews, first_epoch: int = 0) -> None:
        """`number`: of the walk among those of `buckets`; `first_epoch`: with which it begins."""
        order = buckets.orders[number]
        self._start = WindowStart(first_epoch, 0, 0, 0)
        assert isinstance(order, Order)
        assert order.shard_of is not None
        self._order = order
        self._bucket = buckets.walks[number].bucket
        self._shard_of = order.shard_of
        self._views = views
        self._totals: dict[int, Counts] = {}

    def seek(self, skips: Sequence[int]) -> list[WindowStart]:
        """Of every lane, the window that holds its first sample after so many accepted ones.

        Raises DataError when no sample is accepted.
        """
        lanes = range(self._order.lanes)
        with ThreadPoolExecutor(_READERS) as pool:
            places = list(pool.map(lambda lane: self._in_epoch(lane, self._start, skips[lane]), lanes))
            late = [lane for lane in lanes if places[lane].epoch > self._start.epoch]
            if late:
                list(pool.map(self._total, np.unique(self._shard_of).tolist()))
                self._pass_epochs(places, late, skips)
        for lane in late:
            places[lane] = self._in_epoch(lane, places[lane], skips[lane])
        return places

    def _in_epoch(self, lane: int, start: WindowStart, skip: int) -> WindowStart:
        """The window in the epoch that `start` begins; where it is not there, the beginning of the next."""
        first, stop = self._order.lane_slice(lane)
        accepted, rejected = start.accepted, start.rejected
        for shard, low, high, at in self._segments(start.epoch, first, stop):
            inside = self._count(shard, low, high)
            if accepted + inside[0] > skip:
                sums = self._sums(shard)[0]
                row = int(np.searchsorted(sums, sums[low] + skip - accepted, side="right")) - 1
                offset = self._order.window_of(lane, at + row - low - first)[0]
                parts = [
                    self._count(*part[:3]) for part in self._segments(start.epoch, first, first + offset)
                ]
                return WindowStart(
                    start.epoch,
                    offset,
                    start.accepted + sum(part[0] for part in parts),
                    start.rejected + sum(part[1] for part in parts),
                )
            accepted, rejected = accepted + inside[0], rejected + inside[1]
        return WindowStart(start.epoch + 1, 0, accepted, rejected)

    def _pass_epochs(self, places: list[WindowStart], late: list[int], skips: Sequence[int]) -> None:
        """Move the late lanes on to the beginning of the epoch that holds what they seek."""
        in_epoch = sum(self._totals[int(shard)][0] for shard in self._shard_of)
        most = max(1, _CHUNK // (len(self._shard_of) + self._order.lanes))
        if in_epoch == 0:
            raise DataError("The index rejects every sample; loosen data.filter or correct the shards.")
        epoch, seeking = self._start.epoch + 1, list(late)
        while seeking:
            left = max(skips[lane] - places[lane].accepted for lane in seeking)
            step = min(most, left * self._order.lanes // in_epoch + 2)
            accepted, rejected = self._of_epochs(np.arange(epoch, epoch + step))  # [step, lanes] each
            for lane in list(seeking):
                place, passed = places[lane], np.cumsum(accepted[:, lane])
                number = int(np.searchsorted(passed, skips[lane] - place.accepted, side="right"))
                places[lane] = WindowStart(
                    epoch + number,
                    0,
                    place.accepted + int(accepted[:number, lane].sum()),
                    place.rejected + int(rejected[:number, lane].sum()),
                )
                if number < step:
                    seeking.remove(lane)
            epoch += step

    def _of_epochs(self, epochs: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """What every lane accepts and rejects in each of the epochs, [E, lanes] each."""
        order = self._order
        shards, ends = order.streams(epochs)  # [E, S] each
        edges = np.asarray([order.lane_slice(lane)[0] for lane in range(order.lanes)] + [order.total])
        # One search for all epochs, each of which gets a range of numbers of its own.
        base = np.arange(len(epochs))[:, None]
        apart = base * (order.total + 1)
        place = np.searchsorted((ends + apart).ravel(), edges + apart, side="right") - base * shards.shape[1]
        totals = np.asarray([self._totals[int(shard)] for shard in self._shard_of])  # [S, 2]
        # Of the shards before each edge, and of the part of the shard that the edge cuts.
        before = np.zeros((*place.shape, 2), np.int64)
        sums = np.cumsum(totals[shards], axis=1)  # [E, S, 2]
        inner = place > 0
        rows = np.broadcast_to(base, place.shape)
        before[inner] = sums[rows[inner], place[inner] - 1]
        cut = place < shards.shape[1]  # the last edge lies behind all shards
        entry = shards[rows[cut], place[cut]]
        inside = np.broadcast_to(edges, place.shape)[cut] - (
            ends[rows[cut], place[cut]] - order.counts[entry]
        )
        parts = np.zeros((len(entry), 2), np.int64)
        for shard in np.unique(self._shard_of[entry]):
            mine = self._shard_of[entry] == shard
            for column, prefix in enumerate(self._sums(int(shard))):
                parts[mine, column] = prefix[inside[mine]]
        before[cut] += parts
        counts = np.diff(before, axis=1)
        return counts[:, :, 0], counts[:, :, 1]

    def _segments(self, epoch: int, first: int, stop: int) -> Iterator[tuple[int, int, int, int]]:
        """(shard, first row, past the last, stream position of the first) of a part of the stream."""
        shards, ends = self._order.stream(epoch)
        while first < stop:
            place = int(np.searchsorted(ends, first, side="right"))
            entry, end = int(shards[place]), int(ends[place])
            begin = end - int(self._order.counts[entry])
            yield int(self._shard_of[entry]), first - begin, min(stop, end) - begin, first
            first = end

    def _count(self, shard: int, low: int, high: int) -> Counts:
        accepted, rejected = self._sums(shard)
        return int(accepted[high] - accepted[low]), int(rejected[high] - rejected[low])

    def _total(self, shard: int) -> Counts:
        if shard not in self._totals:
            accepted, rejected = self._sums(shard)
            self._totals[shard] = int(accepted[-1]), int(rejected[-1])
        return self._totals[shard]

    def _sums(self, shard: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """[n + 1] accepted and rejected samples before each of the n rows that the order counts here."""
        view = self._views.get(shard)
        codes = view.decided.codes
        passed = np.zeros(len(codes), np.int64)
        if view.accepted is not None:
            # See `ShardView.passed`.
            between = np.diff(view.accepted, prepend=-1) - 1
            if len(between):
                between[-1] += len(codes) - 1 - view.accepted[-1]
            passed[view.accepted] = between
            codes, passed = codes[view.rows[self._bucket]], passed[view.rows[self._bucket]]
        kept = codes < 0
        return _before(kept), _before(passed + ~kept)


def _before(values: NDArray[np.generic]) -> NDArray[np.int64]:
    return np.concatenate([[0], np.cumsum(values, dtype=np.int64)])
