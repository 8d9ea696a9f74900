"""Shards that nobody has indexed, opened for a lane: each is learned at its first visit.

    first visit      read in windows, every byte; at its end an index of all is left  (pieces.py, recorder.py)
    later, or in     the index is there and tells what the windows hold: with a cache of moments they are
    another run      planned from it, and of the tar only what the cache lacks is read

Without a cache later visits read the tar as the first one did: all of it is wanted anyway.
An index counts only where it is of the edition that the shard has by now, and says that windows read from the
tar hold the same (`ShardIndex.as_streamed`), so that no sample comes elsewhere for it.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from typing import TypeAlias

from data_pipeline.errors import DataError, ReadFailed
from data_pipeline.order.position import Mark
from data_pipeline.shards.dataset import Dataset
from data_pipeline.shards.index import ShardIndex, decode_index
from data_pipeline.shards.pieces import IndexedPieces, TarPieces
from data_pipeline.shards.recorder import Recorder
from data_pipeline.shards.selection import Selection
from data_pipeline.shards.view import REST
from data_pipeline.storage.editions import Edition
from data_pipeline.storage.listing import ListedFile
from data_pipeline.storage.ranges import Background, RangeReader

logger = logging.getLogger(__name__)

Pieces: TypeAlias = TarPieces | IndexedPieces

_OTHER_COUNT = "shard_other_count"
"""Reason that stands for a shard which is served, but does not hold what files beside it promise."""
_AT_ONCE = 1
"""Threads that learn: their own, since with many lanes those that read are never idle."""
_MOST_WAITING = 8
"""Shards of which is kept what they hold until their index is made; each may be some megabytes."""
_QUESTION, _ANSWER = 0.0, 1.0


class LearnedShards:
    """The shards of one worker, and what it finds out about them; used by many threads."""

    def __init__(
        self,
        dataset: Dataset,
        reader: RangeReader,
        selections: Sequence[Selection] = (),
    ) -> None:
        """`selections`: of each source, where the index that a visit has left is asked for at later ones."""
        self._dataset, self._reader = dataset, reader
        self._background = Background(_AT_ONCE)
        self._waiting: deque[TarPieces] = deque()
        self._selections = selections
        self._recorder = Recorder(dataset.folders, dataset.record_in)
        self.differences: deque[tuple[str, str, str, int]] = deque()
        """For the reject file: shards that hold other than what files beside them promise."""

    def open(self, shard: int, mark: Mark | None, num_bytes: int) -> tuple[Pieces, Future[bool] | None]:
        """Windows of a shard, from a mark on (the first read tells whether it is as it was then), or with its
        first bytes, so many, whose answer says what it is; and whether its index is there, if this is a
        question for `learn`.

        Raises:
            Gone: it is not there.
            ReadFailed: it does not answer while others do.
            StorageOutage: nothing has answered for data.patience_s.
        """
        url, head = self._dataset.urls[shard], b""
        index = self._index(shard) if self._selections else None
        tells = index is not None and bool(index.as_streamed)
        if mark is None:
            found, head = self._reader.begin(url, 1 if tells else num_bytes)
        else:
            found = ListedFile(url, mark.size, mark.version)
        read = partial(self._reader.read, url, expected=Edition(found.size, found.version))
        first, byte = (mark.first, mark.byte) if mark is not None else (0, 0)
        if index is not None and tells and (index.size, index.version) == (found.size, found.version):
            columns = self._selections[self._dataset.source_of[shard]].columns
            return IndexedPieces(read, index.with_columns(columns), first=first), None
        keep = byte == 0 and index is None and not self._recorder.refused
        pieces = TarPieces(read, found, first=first, byte=byte, head=head, keep=keep)
        if keep:
            return pieces, self._background.submit(_QUESTION, partial(self._is_indexed, shard, pieces))
        if index is None:
            return pieces, None
        known = Future[bool]()
        known.set_result(True)
        return pieces, known

    def learn(self, shard: int, pieces: Pieces, indexed: Future[bool] | None, ordinal: int) -> None:
        """A shard was passed to its end: beside the reading, keep what it holds, and compare it with what
        files beside it say, unless somebody has done so before.

        Where lanes are faster, what is found of the shards that have waited longest is kept at another visit.

        ordinal: of the visit behind its last
        """
        if isinstance(pieces, TarPieces):
            self._waiting.append(pieces)
            while len(self._waiting) > _MOST_WAITING:
                with suppress(IndexError):  # the thread may have come to it
                    self._waiting.popleft().keep_nothing()
            self._background.submit(_ANSWER, partial(self._learn, shard, pieces, indexed, ordinal))

    def close(self) -> None:
        """Write what was kept."""
        self._background.close()
        self._recorder.flush()

    def _index(self, shard: int) -> ShardIndex | None:
        """The index of a shard; None where there is none that can be read."""
        known = self._dataset.index_urls  # by now: the run began without
        url = self._dataset.urls[shard]
        for place in [known[shard]] if known else self._recorder.places(shard, url):
            try:
                if (data := self._reader.read_if_there(place)) is not None:
                    return decode_index(data, place)
            except (DataError, ReadFailed) as error:  # it only spares reading
                logger.debug("%s", error)
        return None

    def _is_indexed(self, shard: int, pieces: TarPieces) -> bool:
        """Whether the index of a shard is there, so that nothing need be kept of it."""
        known = self._recorder.has(shard, self._dataset.urls[shard])
        if known or self._recorder.refused:
            pieces.keep_nothing()
        return known

    def _learn(self, shard: int, pieces: TarPieces, indexed: Future[bool] | None, ordinal: int) -> None:
        with suppress(ValueError, IndexError):  # another thread may have taken it
            self._waiting.remove(pieces)
        if indexed is not None and indexed.result():
            return
        self._recorder.keep(shard, pieces)
        url = self._dataset.urls[shard]
        if told := self._recorder.difference(url, pieces.first, self._reader.read_if_there):
            self.differences.append((_OTHER_COUNT, self._dataset.sample_key(shard, REST), told, ordinal))
