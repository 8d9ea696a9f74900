"""A tar that nobody has indexed, window by window, as its bytes come.

    byte      0                      a                      b                     the end
              [ window of n samples ][ window of n samples ][ fewer: the last ]
    next(n)   index of these samples, their bytes in memory, and where the next one begins

A window is a small shard: its index (`read_index.assemble`) is made from its headers and json members, so
what is decided of its samples (filters, removal lists, sizes, the held-out share) is decided by the same code
as with an index of the whole. Every byte is read once, in order. To begin at b, nothing before b is needed.

A window ends before a member of another sample. Which members are one sample is seen by names alone, without
those that are still to come (`grouping.Beginnings`). Members of one sample that lie in different windows
cannot be joined; the shard is refused there as no tar is, with the remedy.

Once the shard has been read to its end its index is there, and says whether it tells the same of every
window (`ShardIndex.as_streamed`). Then `IndexedPieces` gives the same windows, for which no member is read.
"""

from __future__ import annotations

import math
import pickle
import sys
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from data_pipeline.errors import NotATar
from data_pipeline.shards.grouping import IMAGE_EXTENSIONS, Beginnings, Sample, group, tidy
from data_pipeline.shards.index import ShardIndex
from data_pipeline.shards.read_index import assemble, index_of, look, not_a_tar
from data_pipeline.shards.tars import TarScan, scan_part
from data_pipeline.storage.listing import ListedFile

_SKIP = 8_000_000
"""Bytes of a member that are not read along with its neighbours, but when they are asked for."""
HEADERS = 65_536
"""Bytes to ask for at a time where there is room for headers and small members alone."""
_HEAD = 512
_LEVEL = 1
_ASK_AGAIN_S = 60.0
_BY_INDEX = "a run that begins with an index (`ldm data index`) takes it as it is"


@dataclass(frozen=True)
class TarPiece:
    """One window of a shard."""

    first: int
    """Samples of the shard before it."""
    byte: int
    """Where the header of its first member lies."""
    index: ShardIndex
    """Of its samples alone; offsets are those of the whole tar."""
    read: Callable[[int, int], bytes]
    """Bytes [start, stop) of the tar; those that `holds` tells of are in memory until they are dropped."""
    holds: Callable[[int, int], bool]
    drop: Callable[[int], None]
    """Forget what lies before this byte."""


class TarPieces:
    """The windows of one shard, from one of them on.

    read: gives bytes [start, stop) of the tar. shard: its URL, size and version. first, byte: see `TarPiece`.
    head: what has been read from `byte` on. keep: what is found, for `whole`.
    """

    def __init__(
        self,
        read: Callable[[int, int], bytes],
        shard: ListedFile,
        *,
        first: int = 0,
        byte: int = 0,
        head: bytes = b"",
        keep: bool = False,
    ) -> None:
        self.shard = shard
        self.first = first
        self._byte: int | None = byte
        self._held = _Held(read, shard.size, byte, head)
        self._read = read
        # Compressed, for ten thousand json members of each of many lanes are gigabytes.
        self._kept: list[bytes] | None = [] if keep and byte == 0 else None
        self._known: dict[int, bool] = {}  # hash of each key: whether its sample had a picture

    @property
    def held_bytes(self) -> int:
        """Bytes of the tar that are in memory."""
        return self._held.held

    def next(self, samples: int, chunk: int, room: int = sys.maxsize) -> TarPiece | None:
        """The next window, of about so many samples; None at the end of the tar.

        chunk: bytes of a request. room: bytes that may be held, up to HEADERS more; where they do not
        suffice, large members are jumped over, and are for the caller to read when they are wanted.

        Raises:
            NotATar: it is none, or one whose members cannot be joined on the way: those of one sample lie
                too far apart, or are links out of their window.
        """
        while self._byte is not None:
            begin = self._byte
            self._held.drop(begin)
            self._held.chunk, self._held.room = chunk, room
            found = scan_part(self._held, look=look, start=begin, until=_Ends(samples))
            if begin == 0 and not found.is_tar:
                head = self._read(0, min(self.shard.size, _HEAD))
                raise NotATar(not_a_tar(self.shard.url, head, found))
            self._byte = found.rest
            if (kept := self._kept) is not None:
                kept.append(zlib.compress(pickle.dumps(found), _LEVEL))
            grouping = group(found.members)
            if found.lost:
                raise NotATar(
                    f"{self.shard.url} has links to members that lie far from them, which cannot be followed "
                    "while it is streamed; write it again with `tar --dereference --hard-dereference`, or "
                    f"{_BY_INDEX}."
                )
            self._check_whole(grouping.samples)
            if grouping.samples:
                index = assemble(self.shard, found, grouping)
                index.choose_picture(IMAGE_EXTENSIONS)
                held = self._held
                piece = TarPiece(self.first, begin, index, held.get, held.holds, held.drop)
                self.first += len(index)
                return piece
        return None

    def release(self, *, everything: bool) -> None:
        """Forget the window, and what was read beyond it, or keep that."""
        end = self._held.size if self._byte is None else self._byte
        if everything:
            self._held.begin(end)
        else:
            self._held.drop(end)

    @property
    def keeps(self) -> bool:
        """Whether what is found is kept."""
        return self._kept is not None

    def keep_nothing(self) -> None:
        """Forget what was found of all windows: `whole` will not be asked for. Any thread may call it."""
        self._kept = None

    def whole(self) -> ShardIndex | None:
        """The index of the whole shard, as `read_index` gives it, once all windows have been read; None where
        they were not, from the first on, or not kept."""
        kept = self._kept
        if kept is None or self._byte is not None:
            return None
        found = TarScan()
        for packed in kept:
            part: TarScan = pickle.loads(zlib.decompress(packed))  # our own, of this process
            found.members += part.members
            found.problems += part.problems
            found.seen |= part.seen
            found.others += part.others
        return index_of(self.shard, found)

    def _check_whole(self, samples: Sequence[Sample]) -> None:
        """Raises NotATar where other members of a sample were in an earlier window."""
        pictured = {
            hash(sample.key): any(name.rpartition(".")[2] in IMAGE_EXTENSIONS for name in sample.members)
            for sample in samples
        }
        for sample in samples:
            key = hash(sample.key)
            # Twice with a picture are two samples.
            if key in self._known and not (self._known[key] and pictured[key]):
                raise NotATar(
                    f"The members of sample {sample.key[:80]!r} of {self.shard.url} lie apart, which cannot "
                    f"be joined while it is streamed; write it again with `tar --sort=name`, or {_BY_INDEX}."
                )
        self._known |= pictured


class IndexedPieces:
    """The windows of a shard whose index tells what `TarPieces` would find; used as these are."""

    held_bytes = 0
    keeps = False

    def __init__(self, read: Callable[[int, int], bytes], index: ShardIndex, *, first: int = 0) -> None:
        """`read`: as of `TarPieces`; raises Replaced where the tar is not the one that was indexed."""
        assert index.as_streamed
        self.first = first
        self._read, self._index = read, index
        self._asked_s = -math.inf
        self.beside = index.beside
        """The parquet that the index knows (`ShardIndex.beside`)."""

    def next(self, samples: int, chunk: int, room: int = sys.maxsize) -> TarPiece | None:
        """The next window, of so many samples; None at the end.

        A byte is read once a minute, to see that it is the tar. Raises Replaced, ReadFailed.
        """
        if self.first >= len(self._index):
            return None
        if time.monotonic() - self._asked_s > _ASK_AGAIN_S:
            self._read(0, 1)
            self._asked_s = time.monotonic()
        first, self.first = self.first, min(self.first + samples, len(self._index))
        index = self._index.rows(first, self.first)
        return TarPiece(first, self._index.end_of(first - 1), index, self._read, _holds_none, _drop_none)

    def release(self, *, everything: bool) -> None:
        """Nothing: no byte is held."""


def _holds_none(start: int, stop: int) -> bool:
    return False


def _drop_none(before: int) -> None:
    pass


class _Ends:
    """Whether a member is the first that a window of so many samples does not hold; asked in their order."""

    def __init__(self, samples: int) -> None:
        self._left = samples
        self._begins = Beginnings()

    def __call__(self, name: str) -> bool:
        name = tidy(name)
        if name and self._begins(name):
            self._left -= 1
        return self._left < 0


class _Held:
    """Bytes of a tar, read in order and kept until they are dropped; implements `tars.TarSource`.

    Members of more than `_SKIP` bytes are jumped over: few filters keep them, and who wants one asks again.
    """

    def __init__(self, read: Callable[[int, int], bytes], size: int, start: int, head: bytes) -> None:
        self.size = size
        self.chunk = 0
        self.room = sys.maxsize
        self.held = len(head)
        self._read = read
        self._runs: list[tuple[int, bytearray]] = [(start, bytearray(head))]

    def passed(self, length: int) -> None:
        """Nothing: whatever the members' sizes, their bytes are wanted."""

    def get(self, start: int, stop: int) -> bytes:
        """Bytes [start, stop), fewer at the end of the tar."""
        stop = min(stop, self.size)
        first, data = self._runs[-1]
        end = first + len(data)
        if start >= first and stop > end:
            if start - end > (_SKIP if self.held < self.room else HEADERS):
                first, data = start, bytearray()
                self._runs.append((first, data))
                end = start
            ahead = min(self.chunk, max(HEADERS, self.room - self.held))
            more = self._read(end, min(self.size, max(stop, end + ahead)))
            self.held += len(more)
            data += more
        for first, data in reversed(self._runs):
            if first <= start and stop <= first + len(data):
                return bytes(data[start - first : stop - first])
        return self._read(start, stop)

    def holds(self, start: int, stop: int) -> bool:
        """Whether `get` would not have to read."""
        return any(first <= start and stop <= first + len(data) for first, data in reversed(self._runs))

    def begin(self, byte: int) -> None:
        """Forget all, and read on from here."""
        self._runs, self.held = [(byte, bytearray())], 0

    def drop(self, before: int) -> None:
        """Forget what lies before this byte."""
        runs = [(first, data) for first, data in self._runs if first + len(data) > before]
        if runs:
            first, data = runs[0]
            del data[: max(0, before - first)]
            runs[0] = max(first, before), data
        self._runs = runs or [(before, bytearray())]
        self.held = sum(len(data) for _, data in self._runs)
