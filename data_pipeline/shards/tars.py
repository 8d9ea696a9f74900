"""Reads tar headers by ranges: ustar, pax and GNU long names, with every defect reported.

A tar is a chain of blocks of 512 bytes; each header gives the size of its data, and so the next header:

    [x: path=...] [its records] [0: a.jpg, 700] [data][data] [0: a.txt, 5] [data] [zeros] [zeros]
     pax, about    path, size    a member        2 blocks     a member             two empty blocks: the end
     the next one

`x` (pax) and `L` (GNU) headers speak about the next member, `g` about all that follow, and win over what
the member's own header has room for (100 characters of name, 8 GB). Hard links (`1`) and symbolic ones (`2`)
are members without data of their own. After the end, another archive may have been joined.
"""

from __future__ import annotations

import posixpath
import tarfile
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, TypeAlias

BLOCK = tarfile.BLOCKSIZE
_MAX_META = 1_000_000
_MAX_NAME = 4096
"""Bytes of a member's name, as Linux has it for paths. Keys are kept at the length of the longest."""
_JUMP = 1_000_000
"""Usual size of members, in bytes, from which on they are jumped over."""
_GLANCE = 65_536
"""What is then read at a time: the rest of a sample, and of the next the header and the picture's own."""
_MEMBERS_MINDED = 8
"""Members whose sizes make out what is usual."""
_ZEROS = 65_536
"""Bytes of padding that are looked at together."""
_MAX_LINKS = 16
"""Links that lead from one to the next."""
_WITHOUT_DATA = b"123456"
"""Links, devices, folders and pipes: no data follows, whatever size they give."""


@dataclass(frozen=True)
class TarMember:
    """One regular file of a tar."""

    name: str
    offset: int
    """First byte of its data."""
    size: int
    """Bytes of data."""


@dataclass(frozen=True)
class _TarLink:
    """A member that is another one's data; symbolic links lead from their own folder."""

    name: str
    target: str


@dataclass
class TarScan:
    """Everything found in one tar."""

    members: list[TarMember] = field(default_factory=list)
    """In the order of their headers; links with the place of what they lead to."""
    problems: list[str] = field(default_factory=list)
    """Defects, one sentence each; the members before them are usable."""
    is_tar: bool = True
    seen: dict[int, Any] = field(default_factory=dict)
    """What `look` made of a member, by its offset."""
    lost: int = 0
    """Links that lead to no member."""
    others: int = 0
    """Entries that are neither folders nor members with data of their own: links, devices, sparse files."""
    rest: int | None = None
    """Where the header of the member lies before which the walk was ended; None: it came to the end."""


class TarSource(Protocol):
    """Where the bytes of a tar come from while it is walked."""

    @property
    def size(self) -> int:
        """Bytes of the tar."""
        ...

    def get(self, start: int, stop: int) -> bytes:
        """Bytes [start, stop), fewer at the end of the file. `start` never goes back behind a header."""
        ...

    def passed(self, length: int) -> None:
        """The walk has gone past a member of so many bytes."""
        ...


class MemberBytes:
    """Reads within one member while its tar is scanned."""

    def __init__(self, window: TarSource, member: TarMember) -> None:
        self._window, self._offset, self.size = window, member.offset, member.size

    def read(self, start: int, stop: int) -> bytes:
        """Bytes [start, stop) of the member, fewer at its end."""
        start, stop = min(start, self.size), min(stop, self.size)
        return self._window.get(self._offset + start, self._offset + stop) if start < stop else b""


Look: TypeAlias = Callable[[str, MemberBytes], Any]


class _TarWindow:
    """Sequential reads over ranges. Of large members only what is looked at is read.

        pictures of 50 kB     [-------------- 4 MB --------------][-------------- 4 MB ---
        pictures of 2 MB      [--]  64 kB          [--]                 [--]

    A request waits as long as a stream of S3 takes for about a megabyte (30 ms at 35 MB/s). So members are
    jumped over from that size on, and what lies between two of them comes with the head of the second.
    """

    def __init__(self, read: Callable[[int, int], bytes], size: int, chunk: int) -> None:
        self._read, self.size, self._chunk = read, size, chunk
        self._start, self._data = 0, b""
        self._usual = 0.0  # size of members that are not small

    def passed(self, length: int) -> None:
        """The walk has gone past a member of so many bytes."""
        if length > _GLANCE:
            self._usual += (length - self._usual) / (_MEMBERS_MINDED if self._usual else 1)

    def get(self, start: int, stop: int) -> bytes:
        """Bytes [start, stop), fewer at the end of the file."""
        stop = min(stop, self.size)
        if start < self._start or stop > self._start + len(self._data):
            ahead = self._chunk if self._usual < _JUMP else min(self._chunk, _GLANCE)
            end = min(self.size, max(stop, start + ahead))
            if self._start <= start < self._start + len(self._data):
                kept = self._data[start - self._start :]
                self._data = kept + self._read(start + len(kept), end)
            else:
                self._data = self._read(start, end)
            self._start = start
        return self._data[start - self._start : stop - self._start]


def scan(
    read: Callable[[int, int], bytes],
    size: int,
    *,
    look: Look = lambda name, member: None,
    chunk: int = 4_000_000,
) -> TarScan:
    """Walk the headers of a tar of `size` bytes through `read(start, stop)`.

    Never raises for bad content: a defect ends the walk, or skips one member, and is reported. Archives that
    were joined (`cat a.tar b.tar`) are read on. `look(name, member)` may read within each member; what it
    returns is kept.
    """
    return scan_part(_TarWindow(read, size, chunk), look=look)


def scan_part(
    window: TarSource,
    *,
    look: Look = lambda name, member: None,
    start: int = 0,
    until: Callable[[str], bool] = lambda name: False,
) -> TarScan:
    """The same from the header at `start` on; before the first member of whose name `until` is true it ends,
    and `TarScan.rest` says where that is."""
    found, size = TarScan(), window.size
    entries: list[TarMember | _TarLink] = []
    cut = _walk(window, found, entries, look, start, until)
    if cut is not None and (cut > size or size == 0 or size % BLOCK):
        found.problems.append("the archive ends inside a block")
    if cut is not None:
        found.is_tar = bool(entries) or size >= 2 * BLOCK
    for member in _follow(entries, found):
        if member.offset not in found.seen:  # what it leads to may be named otherwise
            _note(found, look, window, member)
    return found


def _walk(
    window: TarSource,
    found: TarScan,
    entries: list[TarMember | _TarLink],
    look: Look,
    position: int,
    until: Callable[[str], bool],
) -> int | None:
    """Collect all members and links; returns where they end when nothing follows, not even an end mark."""
    said, ended, begin = _Said(), False, position
    while position + BLOCK <= window.size:
        header = window.get(position, position + BLOCK)
        if header.count(0) == BLOCK:
            first, position = position, _past_zeros(window, position)
            ended = position - first >= 2 * BLOCK
            if ended:
                said = _Said()  # another archive knows nothing of the first one's global headers
            if position + BLOCK > window.size:
                return None
            begin = position
            continue
        length = _checked_size(header)
        if length is None:
            found.is_tar = bool(entries) or position > 0
            found.problems.append(_bad_header(position, window.size, after_end=ended))
            return None
        kind, data = header[156:157], position + BLOCK
        if kind in (b"L", b"K", b"x", b"g"):
            if length > _MAX_META or data + length > window.size:
                found.problems.append(f"bad extension header at byte {position}")
                return None
            said.add(kind, window.get(data, data + length))
        else:
            length, name = said.size(length), said.name(header)
            if not (too_long := is_too_long(name)) and until(name):
                found.rest = begin
                return None
            if kind == b"1" and _has_data(window, data, length):
                kind = b"0"
            if kind in _WITHOUT_DATA:
                length = 0
            is_file = kind in (b"0", b"\0", b"7") and not said.sparse()
            found.others += not is_file and not name.endswith("/")
            if kind in (b"1", b"2") and not too_long:
                entries.append(_TarLink(name, _target(name, said.link(header), kind)))
            if data + length > window.size:
                found.problems.append(_truncated(name, data + length - window.size))
                return None
            if too_long:
                found.problems.append(f"name of more than {_MAX_NAME:,} bytes is left out: {name[:80]!r}")
            elif kind == b"S" or said.sparse():
                found.problems.append(
                    f"sparse member {name[:80]!r} is not supported; write it again without `tar --sparse`"
                )
            elif kind in (b"0", b"\0", b"7"):
                member = TarMember(name, data, length)
                entries.append(member)
                _note(found, look, window, member)
            window.passed(length)
            said.forget()
            begin = data + -(-length // BLOCK) * BLOCK
        position = data + -(-length // BLOCK) * BLOCK
    return position


def _bad_header(position: int, size: int, *, after_end: bool) -> str:
    after = " after the end of the archive" if after_end else ""
    return f"bad header at byte {position}{after}, {size - position} bytes are left out"


def is_too_long(name: str) -> bool:
    """Whether a member is left out for its name."""
    return len(name.encode()) > _MAX_NAME


def _truncated(name: str, missing: int) -> str:
    return f"truncated inside {name[:80]!r}: {missing} bytes are missing"


def _note(found: TarScan, look: Look, window: TarSource, member: TarMember) -> None:
    noticed = look(member.name, MemberBytes(window, member))
    if noticed is not None:
        found.seen[member.offset] = noticed


def _past_zeros(window: TarSource, position: int) -> int:
    """The next block that is not zero, or the end."""
    while position + BLOCK <= window.size:
        data = window.get(position, position + _ZEROS)
        zeros = (len(data) - len(data.lstrip(b"\0"))) // BLOCK * BLOCK
        if zeros == 0:
            return position
        position += zeros
    return window.size - window.size % BLOCK


def _has_data(window: TarSource, data: int, length: int) -> bool:
    """Whether a hard link that gives a size brings the data again, as pax may, or another header follows."""
    header = window.get(data, data + BLOCK)
    return length > 0 and len(header) == BLOCK and any(header) and _checked_size(header) is None


def _target(name: str, link: str, kind: bytes) -> str:
    folder = name.rpartition("/")[0]
    return posixpath.normpath(posixpath.join(folder, link) if kind == b"2" else link)


def _follow(entries: list[TarMember | _TarLink], found: TarScan) -> list[TarMember]:
    """Fill in the members, and return those that are links; one that leads to none is reported."""
    places: dict[str, TarMember | _TarLink] = {posixpath.normpath(e.name): e for e in entries}
    linked, lost = [], []
    for entry in entries:
        member: TarMember | _TarLink | None = entry
        for _ in range(_MAX_LINKS):
            if not isinstance(member, _TarLink):
                break
            member = places.get(member.target)
        if isinstance(member, TarMember):
            found.members.append(replace(member, name=entry.name))
            if isinstance(entry, _TarLink):
                linked.append(found.members[-1])
        else:
            lost.append(entry.name)
    found.lost = len(lost)
    if lost:
        found.problems.append(
            f"{len(lost)} links lead to no member of the archive, the first is {lost[0][:80]!r}; write it "
            "again with `tar --dereference --hard-dereference`"
        )
    return linked


class _Said:
    """What extension headers say, about the next member and about all."""

    def __init__(self) -> None:
        self._all: dict[str, str] = {}
        self._next: dict[str, str] = {}
        self._long_name = self._long_link = ""

    def add(self, kind: bytes, body: bytes) -> None:
        """Take in the body of a header of kind L (a long name), K (a link's long target), x or g."""
        if kind == b"L":
            self._long_name = _text(body)
        elif kind == b"K":
            self._long_link = _text(body)
        else:
            self._add_records(body, self._all if kind == b"g" else self._next)

    def _add_records(self, body: bytes, target: dict[str, str]) -> None:
        """Records `<length> <name>=<value>\\n`, where the length counts the whole record."""
        position = 0
        while position < len(body):
            digits, space, _ = body[position : position + 20].partition(b" ")
            if not space or not digits.isdigit() or not 0 < int(digits) <= len(body) - position:
                return
            record = body[position + len(digits) + 1 : position + int(digits) - 1]
            name, _, value = record.partition(b"=")
            target[name.decode("utf-8", "replace")] = value.decode("utf-8", "backslashreplace")
            position += int(digits)

    def forget(self) -> None:
        self._next, self._long_name, self._long_link = {}, "", ""

    def sparse(self) -> bool:
        """Whether the data are pieces of a file with holes, as `tar --sparse --format=posix` writes them."""
        return any(name.startswith("GNU.sparse.") for name in self._next)

    def name(self, header: bytes) -> str:
        return (
            self._next.get("GNU.sparse.name", "")
            or self._next.get("path", self._all.get("path", ""))
            or self._long_name
            or _name(header)
        )

    def link(self, header: bytes) -> str:
        return self._next.get("linkpath", "") or self._long_link or _text(header[157:257])

    def size(self, default: int) -> int:
        text = self._next.get("size", "")
        return int(text) if text.isascii() and text.isdigit() and len(text) < 19 else default


def _text(raw: bytes) -> str:
    return raw.partition(b"\0")[0].decode("utf-8", "backslashreplace")  # names in Latin-1 stay different


def _name(header: bytes) -> str:
    name = _text(header[:100])
    if header[257:263] == b"ustar\0":
        prefix = _text(header[345:500])
        if prefix:
            return f"{prefix}/{name}"
    return name


def _number(raw: bytes) -> int | None:
    if raw[0] & 0x80:  # GNU base 256
        value = int.from_bytes(raw, "big") & ((1 << (8 * len(raw) - 1)) - 1)
        return value if value < 1 << 60 else None
    digits = raw.partition(b"\0")[0].strip(b" \0")
    if not digits:
        return 0
    if any(c not in b"01234567" for c in digits):
        return None
    return int(digits, 8)


def _checked_size(header: bytes) -> int | None:
    """Member size of a header whose checksum is right, else None."""
    stored = _number(header[148:156])
    total = sum(header) - sum(header[148:156]) + 8 * 32
    # Old writers summed signed bytes, which differs where a name is not ASCII.
    signed = total - 256 * sum(byte > 127 for byte in header[:148] + header[156:])
    if stored is None or stored not in (total, signed):
        return None
    return _number(header[124:136])
