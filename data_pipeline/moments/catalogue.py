"""What the cache holds of the shards in use: read when a lane comes to a shard, again once a minute.

A lane is in one shard for thousands of samples, so a shard's rows are asked for by one listing and some
small files, kept as sorted arrays, and forgotten with the least recently used. The cache only ever helps:
storage that does not answer, a table or an entry that is damaged mean that the pictures are read and encoded
as without it, which is said once.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_pipeline.errors import Failure
from data_pipeline.moments.parts import Table, shard_folder, whole_table
from data_pipeline.storage.files import list_names, write_bytes
from data_pipeline.storage.urls import join

logger = logging.getLogger(__name__)

REFRESH_S = 60.0
_READERS = 8
_ROWS = np.dtype(
    [
        *(("key", "<u8"), ("rest", "<u8"), ("part", "<i4"), ("size", "<i4"), ("offset", "<i8")),
        *(("check", "<u8"), ("members", "<u8")),
    ]
)
_KINDS = 64
"""Extensions that are told apart, a bit each; further ones are read from the shard."""


@dataclass(frozen=True)
class EntryPlace:
    """Where one entry lies."""

    shard: str
    """URL of the source shard, whose rows told of it."""
    part: str
    offset: int
    size: int
    check: int
    members: frozenset[str] = frozenset()
    """Extensions of what it holds beside the moments."""
    part_size: int = -1
    """Bytes of the whole part."""


@dataclass
class _ShardRows:
    """The rows of one source shard."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    read_s: float = -np.inf
    names: dict[str, int] = field(default_factory=dict)
    """Tables that were read, and the position of each's part in `parts`; -1: damaged."""
    parts: list[str] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    """Bytes of each part."""
    rows: NDArray[Any] = field(default_factory=lambda: np.zeros(0, _ROWS))
    extensions: list[str] = field(default_factory=list)
    """Extensions that occur, by the bit of "members" that stands for each."""

    def place(self, shard: str, row: NDArray[Any]) -> EntryPlace:
        """Where the entry of a row lies."""
        bits = int(row["members"])
        held = frozenset(name for i, name in enumerate(self.extensions) if bits >> i & 1)
        part, size = self.parts[int(row["part"])], self.sizes[int(row["part"])]
        return EntryPlace(shard, part, int(row["offset"]), int(row["size"]), int(row["check"]), held, size)

    def bits(self, members: Sequence[str]) -> int:
        """The extensions as bits."""
        self.extensions += [m for m in members if m not in self.extensions][: _KINDS - len(self.extensions)]
        return sum(1 << self.extensions.index(name) for name in members if name in self.extensions)


class Catalogue:
    """Entries by key, for many threads."""

    def __init__(self, folder: str, capacity: int, *, refresh_s: float = REFRESH_S) -> None:
        """`capacity`: shards whose rows are kept."""
        self._folder, self._capacity, self._refresh_s = folder, capacity, refresh_s
        self._shards: OrderedDict[str, _ShardRows] = OrderedDict()
        self._lock = threading.Lock()
        self._silent_until = -np.inf
        self._broken: set[tuple[str, str]] = set()
        self._told: set[str] = set()

    def find(self, shard: str, key: bytes) -> EntryPlace | None:
        """Where the entry of a key lies, of several the one written last."""
        known = self._of(shard)
        with known.lock:
            if time.monotonic() - known.read_s > self._refresh_s:
                self._refresh(shard, known)
            first, rest = np.frombuffer(key, "<u8")
            start, stop = np.searchsorted(known.rows["key"], [first, first + np.uint64(1)])
            # Parts sort by time.
            for row in known.rows[start : max(start, stop)][::-1]:
                part = known.parts[int(row["part"])]
                if row["key"] == first and row["rest"] == rest and (shard, part) not in self._broken:
                    return known.place(shard, row)
        return None

    def broken(self, place: EntryPlace, why: str) -> None:
        """Never look at this part's entries of this shard again; they are encoded again, and written anew."""
        with self._lock:
            if (place.shard, place.part) in self._broken:
                return
            self._broken.add((place.shard, place.part))
            self._tell(
                place.part,
                f"part {place.part} of the cache {self._folder} is damaged ({why}); what it holds is encoded "
                "again",
            )
        try:
            write_bytes(join(shard_folder(self._folder, place.shard), f"{place.part}.bad"), why.encode())
        except Failure as error:  # then the next process finds it out by itself
            logger.debug("%s", error)

    def silent(self, error: Exception) -> None:
        """Storage of the cache does not answer: nothing is looked up for a while."""
        self._silent_until = time.monotonic() + self._refresh_s
        self._tell("", f"the cache {self._folder} cannot be read, so pictures are encoded anew: {error}")

    @property
    def answers(self) -> bool:
        """Whether storage of the cache is worth asking."""
        return time.monotonic() >= self._silent_until

    def _tell(self, about: str, what: str) -> None:
        if about not in self._told:
            self._told.add(about)
            logger.warning("%s", what)

    def _of(self, shard: str) -> _ShardRows:
        with self._lock:
            known = self._shards.setdefault(shard, _ShardRows())
            self._shards.move_to_end(shard)
            while len(self._shards) > self._capacity:
                self._shards.popitem(last=False)
            return known

    def _refresh(self, shard: str, known: _ShardRows) -> None:
        if not self.answers:
            return
        folder = shard_folder(self._folder, shard)
        try:
            listed = list_names(folder)
            bad = {name.removesuffix(".bad") for name in listed if name.endswith(".bad")}
            tables = {n.removesuffix(".json") for n in listed if n.endswith(".json")} - bad
            new = sorted(tables - known.names.keys())
            with ThreadPoolExecutor(_READERS) as pool:
                found = list(pool.map(whole_table, (join(folder, f"{name}.json") for name in new)))
        except Failure as error:
            self.silent(error)
            return
        known.read_s = time.monotonic()
        if bad or new or known.names.keys() - tables:
            for name, table in zip(new, found, strict=True):
                known.names[name] = -1 if table is None else len(known.parts)
                if table is not None:
                    known.parts.append(table.part)
                    known.sizes.append(table.size)
            known.rows = _merged(shard, known, dict(zip(new, found, strict=True)), tables)


def _merged(shard: str, known: _ShardRows, new: dict[str, Table | None], tables: set[str]) -> NDArray[Any]:
    """The rows of all parts that are still there, sorted by key, those of later parts behind."""
    there = np.asarray([known.names[name] for name in known.names if name in tables], np.int32)
    kept = known.rows[np.isin(known.rows["part"], there)]
    rows = [
        (*_words(row.key), known.names[name], row.size, row.offset, row.check, known.bits(row.members))
        for name, table in new.items()
        if table is not None
        for row in table.rows.get(shard, ())
    ]
    joined = np.concatenate([kept, np.asarray(rows, _ROWS)])
    age = np.argsort(np.argsort(np.asarray(known.parts))) if known.parts else np.zeros(0, np.int64)
    return joined[np.lexsort((age[joined["part"]], joined["key"]))]


def _words(key: str) -> tuple[int, int]:
    data = bytes.fromhex(key)
    return int.from_bytes(data[:8], "little"), int.from_bytes(data[8:], "little")
