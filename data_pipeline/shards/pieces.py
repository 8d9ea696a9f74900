"""A tar that nobody has indexed, window by window, as its bytes come.

    byte      0                      a                      b                     the end
              [ window of n samples ][ window of n samples ][ fewer: the last ]
    next(n)   index of these samples, their bytes in memory, and where the next one begins

A window is a small shard: its index (`read_index.assemble`) is made from its headers and json members, so
what is decided of its samples (filters, removal lists, sizes, the held-out share) is decided by the same code
as with an index of the whole. Every byte is read once, in order. To begin at b, nothing before b is needed.

A window ends before a member of another sample. Which members are one sample is seen by names alone, without
those that are still to come: a new one begins where what precedes the first dot changes, or where an
extension comes again behind it (`img.v2.jpg`, `img.v3.jpg`). Members of one sample that lie in different
windows cannot be joined; they are refused, with the remedy.
"""

from __future__ import annotations

import pickle
import sys
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from data_pipeline.errors import DataError, NotATar
from data_pipeline.shards.grouping import IMAGE_EXTENSIONS, Sample, group, split_name, stem_of, tidy
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
_INDEX_IT = "run `ldm data index` once"


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
            NotATar: it is none.
            DataError: members of one sample lie too far apart, or are links out of their window.
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
                raise DataError(
                    f"{self.shard.url} has links to members that lie far from them, which cannot be followed "
                    f"while it is read for the first time; {_INDEX_IT}."
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
        return index_of(self.shard, found)

    def _check_whole(self, samples: Sequence[Sample]) -> None:
        """Raises DataError where other members of a sample were in an earlier window."""
        pictured = {
            hash(sample.key): any(name.rpartition(".")[2] in IMAGE_EXTENSIONS for name in sample.members)
            for sample in samples
        }
        for sample in samples:
            key = hash(sample.key)
            # Twice with a picture are two samples.
            if key in self._known and not (self._known[key] and pictured[key]):
                raise DataError(
                    f"The members of sample {sample.key[:80]!r} of {self.shard.url} lie apart, which cannot "
                    f"be joined while it is read for the first time; {_INDEX_IT}, or write the tar again "
                    "with `tar --sort=name`."
                )
        self._known |= pictured


class _Ends:
    """Whether a member is the first that a window of so many samples does not hold; asked in their order."""

    def __init__(self, samples: int) -> None:
        self._left = samples
        self._stem: str | None = None
        self._key = ""
        self._extensions: set[str] = set()

    def __call__(self, name: str) -> bool:
        name = tidy(name)
        if not name:
            return False
        key, extension = split_name(name)
        if stem_of(name) == self._stem:
            within = key == self._key or key.startswith(f"{self._key}.")
            if within or extension not in self._extensions:
                self._extensions.add(extension)
                return False
        if self._left == 0:
            return True
        self._left -= 1
        self._stem, self._key, self._extensions = stem_of(name), key, {extension}
        return False


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
