"""Reads tar headers by ranges: ustar, pax and GNU long names, with every defect reported.

A tar is a chain of blocks of 512 bytes; each header gives the size of its data, and so the next header:

    [x: path=...] [its records] [0: a.jpg, 700] [data][data] [0: a.txt, 5] [data] [zeros] [zeros]
     pax, about    path, size    a member        2 blocks     a member             two empty blocks: the end
     the next one

`x` (pax) and `L` (GNU) headers speak about the next member, `g` about all that follow, and win over what
the member's own header has room for (100 characters of name, 8 GB).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

BLOCK = 512
_MAX_META = 1_000_000
_MAX_JSON = 4_000_000
_KNOWN = (
    *("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff"),
    *("txt", "caption", "json", "cls", "seg.png", "depth.png", "npy", "pyd", "ppm"),
)
IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff")


@dataclass(frozen=True)
class Member:
    """One regular file of a tar."""

    name: str
    offset: int
    """First byte of its data."""
    size: int
    """Bytes of data."""


@dataclass
class TarScan:
    """Everything found in one tar."""

    members: list[Member] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    """Defects, one sentence each; the members before them are usable."""
    is_tar: bool = True
    seen: dict[int, Any] = field(default_factory=dict)
    """What `look` made of a member, by index into `members`."""


class _Window:
    """Sequential reads over ranges; jumps over large members instead of reading them."""

    def __init__(self, read: Callable[[int, int], bytes], size: int, chunk: int) -> None:
        self._read, self.size, self._chunk = read, size, chunk
        self._start, self._data = 0, b""

    def get(self, start: int, stop: int) -> bytes:
        """Bytes [start, stop), fewer at the end of the file."""
        stop = min(stop, self.size)
        if start < self._start or stop > self._start + len(self._data):
            end = min(self.size, max(stop, start + self._chunk))
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
    look: Callable[[str, Callable[[int], bytes]], Any] = lambda name, head: None,
    chunk: int = 4_000_000,
) -> TarScan:
    """Walk the headers of a tar of `size` bytes through `read(start, stop)`.

    Never raises for bad content: a defect ends the walk, or skips one member, and is reported.
    `look(name, head)` may call head(n) for the first n bytes of each member; what it returns is kept.
    """
    window = _Window(read, size, chunk)
    found = TarScan()
    position, said = 0, _Said()
    while position + BLOCK <= size:
        header = window.get(position, position + BLOCK)
        if header.count(0) == BLOCK:
            # a single zero block inside (tar -A) is skipped; two end the archive
            if (
                window.get(position + BLOCK, position + 2 * BLOCK).count(0) == BLOCK
                or position + BLOCK >= size
            ):
                return found
            position += BLOCK
            continue
        length = _checked_size(header)
        if length is None:
            found.is_tar = bool(found.members) or position > 0
            found.problems.append(f"bad header at byte {position}")
            return found
        kind = header[156:157]
        data = position + BLOCK
        if kind in (b"L", b"K", b"x", b"g"):
            if length > _MAX_META or data + length > size:
                found.problems.append(f"bad extension header at byte {position}")
                return found
            said.add(kind, window.get(data, data + length))
        else:
            length, name = said.size(length), said.name(header)
            if data + length > size:
                found.problems.append(
                    f"truncated inside {name[:80]!r}: {data + length - size} bytes are missing"
                )
                return found
            if kind in (b"0", b"\0", b"7"):
                noticed = look(name, _head(window, data, length))
                if noticed is not None:
                    found.seen[len(found.members)] = noticed
                found.members.append(Member(name, data, length))
            elif kind == b"S":
                found.problems.append(f"sparse member {name[:80]!r} is not supported")
            said.forget()
        position = data + -(-length // BLOCK) * BLOCK
    if position > size or size == 0 or size % BLOCK:
        found.problems.append("the archive ends inside a block")
    found.is_tar = bool(found.members) or size >= 2 * BLOCK
    return found


def _head(window: _Window, data: int, length: int) -> Callable[[int], bytes]:
    return lambda n: bytes(window.get(data, data + min(n, length)))


def split_name(name: str) -> tuple[str, str]:
    """Key and lower-case extension: the longest known suffix, else webdataset's first-dot rule.

    `a/b.v2.JPG` gives (`a/b.v2`, `jpg`); `x.seg.png` gives (`x`, `seg.png`).
    """
    folder, _, base = name.rpartition("/")
    prefix = f"{folder}/" if folder else ""
    lower = base.lower()
    known = [e for e in _KNOWN if lower.endswith("." + e) and len(lower) > len(e) + 1]
    if known:
        extension = max(known, key=len)
        return prefix + base[: -len(extension) - 1], extension
    stem, _, extension = base.partition(".")
    return prefix + stem, extension.lower()


def samples_of(members: list[Member]) -> Iterator[tuple[str, dict[str, Member], list[str]]]:
    """Group consecutive members by key: (key, members by extension, problems)."""
    key: str | None = None
    group: dict[str, Member] = {}
    problems: list[str] = []
    for member in members:
        base = member.name.rpartition("/")[2]
        if not base or base.startswith("._") or member.name.startswith("__"):
            continue  # macOS resource forks and webdataset's own metadata
        this, extension = split_name(member.name)
        if this != key:
            if key is not None:
                yield key, group, problems
            key, group, problems = this, {}, []
        if extension in group:
            problems.append(f"duplicate member {member.name[:80]!r}")
            continue
        group[extension] = member
    if key is not None:
        yield key, group, problems


def parse_record(body: bytes | None) -> dict[str, Any] | None:
    """The json member as a dict; None when absent or not an object. Bad JSON counts as absent."""
    if body is None or len(body) > _MAX_JSON:
        return None
    try:
        value = json.loads(body)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


class _Said:
    """What extension headers say, about the next member and about all."""

    def __init__(self) -> None:
        self._all: dict[str, str] = {}
        self._next: dict[str, str] = {}
        self._long_name = ""

    def add(self, kind: bytes, body: bytes) -> None:
        """Take in the body of a header of kind L, K (a link's long target: of no use here), x or g."""
        if kind == b"L":
            self._long_name = _text(body)
        elif kind != b"K":
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
            target[name.decode("utf-8", "replace")] = value.decode("utf-8", "replace")
            position += int(digits)

    def forget(self) -> None:
        self._next, self._long_name = {}, ""

    def name(self, header: bytes) -> str:
        return self._next.get("path", self._all.get("path", "")) or self._long_name or _name(header)

    def size(self, default: int) -> int:
        text = self._next.get("size", "")
        return int(text) if text.isascii() and text.isdigit() and len(text) < 19 else default


def _text(raw: bytes) -> str:
    return raw.partition(b"\0")[0].decode("utf-8", "replace")


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
    if stored is None or stored != total:
        return None
    return _number(header[124:136])
