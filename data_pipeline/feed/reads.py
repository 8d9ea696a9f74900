"""Reads the members of many samples with few requests: neighbours in a shard come in one range.

A plan of a lane wants, of one shard, the members

    byte     0                  40k         90k         150k                 2.0M        2.05M
             [ jpg of visit 7 ] [ txt of 7] [ jpg of 9 ]                     [ jpg of 3 ]
             `-------------- one request --------------'                     `- another -'

because a gap of up to 128 kB is cheaper to read than a second request is to wait for. The bytes of a
range are cut into members as soon as they are there, and `MemberReads` keeps none of them: they belong to
the visits, and are free once their sample is decoded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Future
from functools import partial
from typing import NamedTuple, TypeAlias, TypeVar

from data_pipeline.errors import Replaced
from data_pipeline.feed.editions import ShardEditions
from data_pipeline.shards.dataset import Dataset
from data_pipeline.storage.cache import BlockCache
from data_pipeline.storage.editions import Edition
from data_pipeline.storage.ranges import Background, RangeReader

GAP = 128_000
"""Unwanted bytes between two members that are cheaper to read than a second request."""
_FIRST_RANGE_BYTES = 1_000_000
"""Most bytes asked for at once in the first windows of a lane."""

T = TypeVar("T")
Contents: TypeAlias = dict[tuple[int, str], bytes]
"""Bytes of the members of one range, by slot and extension."""


class Extent(NamedTuple):
    """One member's place in its shard. The order of the fields is the order of the tar."""

    start: int
    stop: int
    slot: int
    """Which visit of the plan wants it."""
    extension: str


class MemberReads:
    """Starts the range reads of plans, in the background, through the cache when there is one."""

    def __init__(
        self,
        dataset: Dataset,
        reader: RangeReader,
        background: Background,
        cache: BlockCache | None,
        range_bytes: int,
    ) -> None:
        self.background = background
        self.editions = ShardEditions(dataset)
        self.reader = reader
        self._dataset, self._cache = dataset, cache
        self._range_bytes = max(1, range_bytes)

    def start(
        self, wanted: Mapping[int, list[Extent]], due: float, gap: int = GAP
    ) -> dict[tuple[int, str], Future[Contents]]:
        """Ask for the members `wanted` by shard; returns the future that brings each (slot, extension).

        `due` is the number of samples that the lane serves before the plan's first: a read with fewer
        samples before it goes first, whatever lane it is for. Members with no more than `gap` bytes between
        them come in one request.
        """
        return self.start_from(wanted, due, self._bytes, gap)

    def start_from(
        self,
        wanted: Mapping[T, list[Extent]],
        due: float,
        read: Callable[[T, int, int], bytes],
        gap: int = GAP,
    ) -> dict[tuple[int, str], Future[Contents]]:
        """The same from other files than shards, by `read(file, start, stop)`."""
        futures: dict[tuple[int, str], Future[Contents]] = {}
        # Right after a start somebody waits for these very samples, and a range is of use when it is whole.
        limit = self._range_bytes if due else min(self._range_bytes, _FIRST_RANGE_BYTES)
        for file, extents in wanted.items():
            for group in ranges(sorted(extents), limit, gap):
                urgency = due + min(extent.slot for extent in group)
                future = self.background.submit(urgency, partial(_read, partial(read, file), group))
                for extent in group:
                    futures[extent.slot, extent.extension] = future
        return futures

    def read_now(self, shard: int, extent: Extent) -> bytes:
        """One member that nothing was asked for ahead. Raises ReadFailed, Replaced."""
        return self._bytes(shard, extent.start, extent.stop)

    def read_met(self, met: tuple[int, Edition], start: int, stop: int) -> bytes:
        """Bytes of a shard, in the edition that a lane has met. Raises ReadFailed, Replaced."""
        shard, edition = met
        return self.reader.read(self._dataset.urls[shard], start, stop, expected=edition)

    def _bytes(self, shard: int, start: int, stop: int) -> bytes:
        url = self._dataset.urls[shard]
        edition = self.editions.expected(shard)
        try:
            return self._of_edition(url, edition, start, stop)
        except Replaced as error:
            return self._of_edition(url, self.editions.renew(shard, edition, error), start, stop)

    def _of_edition(self, url: str, edition: Edition, start: int, stop: int) -> bytes:
        fetch = partial(self.reader.read, url, expected=edition)
        if self._cache is None:
            return fetch(start, stop)
        return self._cache.read(f"{url} {edition.version}", edition.size, start, stop, fetch)


def _read(read: Callable[[int, int], bytes], group: list[Extent]) -> Contents:
    start = group[0].start
    stop = max(extent.stop for extent in group)
    data = read(start, stop) if stop > start else b""
    # Copies, not views: a view of one member would keep the bytes of the whole range alive.
    return {(e.slot, e.extension): data[e.start - start : e.stop - start] for e in group}


def ranges(extents: list[Extent], limit: int, gap: int = GAP) -> list[list[Extent]]:
    """Extents in order of their place, grouped into requests of at most `limit` bytes.

    >>> places = [(0, 40_000, 7), (40_000, 40_100, 7), (90_000, 150_000, 9), (2_000_000, 2_050_000, 3)]
    >>> extents = [Extent(*place, kind) for place, kind in zip(places, ("jpg", "txt", "jpg", "jpg"))]
    >>> [[extent.slot for extent in group] for group in ranges(extents, limit=8_000_000)]
    [[7, 7, 9], [3]]
    >>> [[extent.slot for extent in group] for group in ranges(extents, limit=100_000)]
    [[7, 7], [9], [3]]
    """
    groups: list[list[Extent]] = []
    for extent in extents:
        if groups:
            last = groups[-1]
            near = extent.start - last[-1].stop <= gap
            if near and extent.stop - last[0].start <= limit:
                last.append(extent)
                continue
        groups.append([extent])
    return groups
