"""One shard's index as a lane sees it: which rows are read, why the others are not, where the bytes lie."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_pipeline.errors import DataError, Gone, ReadFailed, RetryableFault
from data_pipeline.order.buckets import Buckets
from data_pipeline.shards.beside import parquet_of, texts_beside, unkept
from data_pipeline.shards.dataset import Dataset
from data_pipeline.shards.filters import Filter
from data_pipeline.shards.index import ShardIndex
from data_pipeline.shards.manifest import decode_listed
from data_pipeline.shards.selection import Decision, Selection
from data_pipeline.storage.ranges import RangeReader

REST = "*"
"""Key that stands for all samples of a shard, or what is left of them."""


@dataclass(frozen=True)
class ShardView:
    """What is decided about the n samples of one shard before a byte of it is read."""

    keys: NDArray[np.bytes_]
    decided: Decision
    members: tuple[str, ...]
    """Extensions that are read, one row of offsets and sizes each."""
    offsets: NDArray[np.int64]
    """[members, n] first byte, -1 where absent."""
    sizes: NDArray[np.int64]
    late: Filter | None
    """Clauses that the index cannot decide alone: they look at each json once it is read."""
    late_columns: dict[str, NDArray[Any]]
    """Columns of those that the index does have; [n] each."""
    texts: dict[str, list[Any]]
    """[n] captions, or lists of them, that lie beside the tar, by column."""
    originals: NDArray[np.int32]
    """[2, n] heights and widths before the pictures were stored; 0 where the json does not say."""
    accepted: NDArray[np.int64] | None
    """[accepted] rows that the orders of buckets count, ascending; None: they count all rows."""
    rows: tuple[NDArray[np.int64], ...]
    """The same by bucket."""
    identities: NDArray[np.uint64]
    """[ways to name a sample, n] hashes of URLs and digests; 0 is missing."""

    def original(self, row: int) -> tuple[int, int] | None:
        """Height and width of one picture before it was stored, if its json says so."""
        height, width = self.originals[:, row].tolist()
        return (height, width) if height and width else None

    def identities_of(self, row: int) -> tuple[int, ...]:
        """What removal lists may have of one sample besides its key."""
        return tuple(int(identity) for identity in self.identities[:, row] if identity)

    def captions(self, row: int) -> dict[str, Any]:
        """What lies beside the tar of one sample's captions."""
        return {name: values[row] for name, values in self.texts.items()}

    def row(self, bucket: int, place: int) -> int:
        """Row of the `place`-th sample that the order of a bucket counts here."""
        return place if self.accepted is None else int(self.rows[bucket][place])

    def passed(self, row: int) -> range | list[int]:
        """Rows that no order counts and that are told of with this one: those between it and the one before,
        and with the last, those after it."""
        if self.accepted is None:
            return []
        at = int(np.searchsorted(self.accepted, row))
        before = range(int(self.accepted[at - 1]) + 1 if at else 0, row)
        return [*before, *range(row + 1, len(self.keys))] if at == len(self.accepted) - 1 else before

    def key(self, row: int) -> str:
        """Key of one sample."""
        return bytes(self.keys[row]).decode("utf-8", "replace")

    def late_filter(self, row: int) -> Filter | None:
        """What the json of one sample must still satisfy."""
        if self.late is None:
            return None
        return self.late.given({name: column[row] for name, column in self.late_columns.items()})

    def reason(self, row: int) -> str | None:
        """Why a sample is rejected unread; None: read it."""
        code = int(self.decided.codes[row])
        return self.decided.names[code] if code >= 0 else None


def _left_out(samples: int) -> ShardView:
    """View of so many samples of a shard that was replaced."""
    nobody, nothing = np.zeros(samples, np.int32), np.zeros((0, samples), np.int64)
    return ShardView(
        keys=np.full(samples, REST.encode()),
        decided=Decision(nobody, ("shard_replaced",), nobody > 0),
        members=(),
        offsets=nothing,
        sizes=nothing,
        late=None,
        late_columns={},
        texts={},
        originals=np.zeros((2, samples), np.int32),
        accepted=None,
        rows=(),
        identities=nothing.astype(np.uint64),
    )


class ShardViews:
    """Views of the shards in use, each loaded once, the least recently used dropped."""

    def __init__(
        self,
        dataset: Dataset,
        selections: Sequence[Selection],
        buckets: Buckets,
        reader: RangeReader,
        capacity: int,
        *,
        with_identities: bool = False,
    ) -> None:
        """`selections`: of each source; `capacity`: views that are kept; `with_identities`: also what only
        removal lists ask for."""
        self._with_identities = with_identities
        self.selections = selections
        self._dataset, self._reader = dataset, reader
        self._buckets = buckets
        self._capacity = capacity
        self._views: OrderedDict[int, Future[ShardView]] = OrderedDict()
        self.undecided: set[str] = set()
        """Clauses of the filter that some index could not decide."""
        self._lock = threading.Lock()

    def get(self, shard: int) -> ShardView:
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
            # Outside the lock: sixteen threads load sixteen shards at once.
            try:
                future.set_result(self._load(shard))
            except BaseException as error:
                # Forgotten before it is told, so that whoever asks next tries again.
                with self._lock:
                    self._views.pop(shard, None)
                future.set_exception(error)
                raise
        return future.result()

    def _load(self, shard: int) -> ShardView:
        if shard in self._dataset.left_out:
            return _left_out(self._dataset.kept[shard].samples)
        if not self._dataset.checksums[shard]:  # no tar any longer
            return _left_out(0)
        url = self._dataset.index_urls[shard]
        data = self._reader.read_all(url)
        source = int(self._dataset.source_of[shard])
        return self.of(decode_listed(data, url, self._dataset.checksums[shard]), source)

    def of(self, index: ShardIndex, source: int) -> ShardView:
        """View of the samples of an index, which may be some of a shard's."""
        selection = self.selections[source]
        index.choose_picture(selection.picture)
        decided = selection.decide(index)
        late = selection.undecided(index)
        self.undecided |= {clause.text for clause in late.clauses} if late is not None else set()
        late_columns = {n: index.column(n) for n in sorted(late.columns)} if late is not None else {}
        offsets, sizes = selection.extents(index)
        if not selection.reads_json and late is None and "json" in selection.members:
            offsets[selection.members.index("json")] = -1
        accepted, rows = None, []
        if self._buckets.accepted_only:
            accepted = np.flatnonzero(decided.accepted)
            place = self._buckets.assign(*index.picture_sizes(), source)[accepted]
            rows = [accepted[place == bucket] for bucket in range(len(self._buckets.shapes))]
        return ShardView(
            keys=index.keys,
            decided=decided,
            members=selection.members,
            offsets=offsets,
            sizes=sizes,
            late=late,
            late_columns={name: column for name, column in late_columns.items() if column is not None},
            texts=self._texts(index, selection.captions),
            originals=index.original_sizes(),
            accepted=accepted,
            rows=tuple(rows),
            identities=np.stack(list(index.hashes.values()))
            if self._with_identities and index.hashes
            else np.zeros((0, len(index)), np.uint64),
        )

    def _texts(self, index: ShardIndex, names: tuple[str, ...]) -> dict[str, list[Any]]:
        raw = None
        if wanted := unkept(index, names):
            url = parquet_of(index.shard)
            try:
                raw = self._reader.read_all(url)
            except ReadFailed as error:
                raise (DataError if isinstance(error, Gone) else RetryableFault)(
                    f"The captions in {', '.join(wanted)} of {index.shard} lie in {url}, which cannot be "
                    f"read: {error}"
                ) from error
        try:
            return texts_beside(index, names, raw)
        except Exception as error:
            raise DataError(
                f"{parquet_of(index.shard)} is not what was indexed ({error}); run `ldm data index` again."
            ) from error
