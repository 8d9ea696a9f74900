"""Samples of tars that are read from their beginning to their end, compressed or not.

The same keys, members and samples as in an index, as far as that is possible without going back: what is not
(a link to a member that has passed, a sample whose members lie apart) is refused with the remedy. Only
members that the selection names are read, none of more than `data.max_member_bytes`: of a compressed tar,
however small, a member may be of any size.
"""

from __future__ import annotations

import tarfile
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol, TypeAlias

from data_pipeline.errors import DataError
from data_pipeline.shards.grouping import Keys, stem_of, tidy
from data_pipeline.shards.records import MAX_JSON
from data_pipeline.shards.selection import Selection
from data_pipeline.shards.tars import BLOCK, is_too_long

_RUN = 64
"""Members with the same name up to the first dot that are looked at together to find where their keys end."""

_Content: TypeAlias = bytes | None
"""Of a member; None: it was not read."""


class _Readable(Protocol):
    def read(self, size: int, /) -> bytes: ...


def samples_of(
    shards: Iterable[dict[str, Any]],
    selection: Selection,
    *,
    broken: Callable[[Exception], object],
    reject: Callable[[str], object],
) -> Iterator[dict[str, Any]]:
    """Samples as webdataset has them, `__key__`, `__url__` and bytes by extension, of shards with a `stream`,
    with the members that the selection names, and the json.

    `broken` is told what ends a shard early, `reject` the reason against a member or sample that is left out.

    Raises:
        DataError: members of a sample lie apart, or a member is a link.
    """
    for shard in shards:
        url = str(shard["url"])
        try:
            yield from _samples(shard["stream"], url, selection, reject)
        except DataError:
            raise
        except Exception as error:  # noqa: BLE001 - tarfile, zlib, lzma and storage have no common base
            broken(error)


def _samples(
    stream: _Readable, url: str, selection: Selection, reject: Callable[[str], object]
) -> Iterator[dict[str, Any]]:
    run: list[tuple[str, _Content]] = []
    known: dict[str, frozenset[str]] = {}
    for name, data in _members(stream, url, selection):
        stem = stem_of(name)
        if run and (stem != stem_of(run[0][0]) or len(run) >= _RUN):
            samples = _grouped(run, reject)
            # The last of a long run may go on.
            kept = samples.pop() if stem == stem_of(run[0][0]) else None
            run = [] if kept is None else [member for member in run if member[0] in kept[2]]
            yield from _checked(samples, url, selection, known, reject)
        run.append((name, data))
    yield from _checked(_grouped(run, reject), url, selection, known, reject)


def _grouped(
    run: list[tuple[str, _Content]], reject: Callable[[str], object]
) -> list[tuple[str, dict[str, _Content], set[str]]]:
    """(key, contents by extension, names) of members that stand side by side."""
    keys = Keys(name for name, _ in run)
    samples: list[tuple[str, dict[str, _Content], set[str]]] = []
    for name, data in run:
        parts = keys.split(name)
        if parts is None:
            continue  # no extension, so of no sample
        key, extension = parts
        if not samples or samples[-1][0] != key:
            samples.append((key, {}, set()))
        if extension in samples[-1][1]:
            reject("duplicate_member")
            continue
        samples[-1][1][extension] = data
        samples[-1][2].add(name)
    return samples


def _checked(
    samples: list[tuple[str, dict[str, _Content], set[str]]],
    url: str,
    selection: Selection,
    known: dict[str, frozenset[str]],
    reject: Callable[[str], object],
) -> Iterator[dict[str, Any]]:
    for key, members, _ in samples:
        before = known.setdefault(key, frozenset())
        if before and before.isdisjoint(members):
            raise DataError(
                f"The members of sample {key[:80]!r} of {url} lie apart, which a stream cannot join; write "
                "the tar again with `tar --sort=name`, or set data.order=indexed, which gathers them."
            )
        if before:
            reject("duplicate_key")
            continue
        known[key] = frozenset(members)
        if _is_too_large(members, selection):
            reject("too_large")
            continue
        read = {extension: content for extension, content in members.items() if content is not None}
        yield {"__key__": key, "__url__": url, **read}


def _is_too_large(members: dict[str, _Content], selection: Selection) -> bool:
    """Whether one of the members that are used is; of several pictures the first is."""
    picture = next((e for e in selection.picture if e in members), None)
    used = [e for e in selection.members if e in members and (e == picture or e not in selection.picture)]
    contents = [members[extension] for extension in used]
    return any(content is None or len(content) > selection.max_member_bytes for content in contents)


def _members(stream: _Readable, url: str, selection: Selection) -> Iterator[tuple[str, _Content]]:
    """Names and contents of all files, also of archives that were joined."""
    # By the end of the name, for the key of a member is known only with its neighbours.
    ends, most = tuple(f".{e}" for e in selection.members), selection.max_member_bytes
    mode = "r|*"
    while True:
        with tarfile.open(fileobj=stream, mode=mode) as tar:  # type: ignore[call-overload]
            for info in tar:
                spelled = info.name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
                name = "" if spelled.endswith("/") else tidy(spelled)
                if not name or is_too_long(name):
                    continue
                if (info.islnk() or info.issym()) and stem_of(name) != name:
                    raise DataError(
                        f"{url} has links, such as {name[:80]!r}, which a stream cannot follow; write the "
                        "tar again with `tar --dereference --hard-dereference`, or set data.order=indexed."
                    )
                lower = name.lower()
                is_read = (lower.endswith(ends) and info.size <= most) or (
                    lower.endswith(".json") and info.size <= MAX_JSON  # as whoever makes an index
                )
                if info.isreg() and not is_read:
                    yield name, None
                elif info.isreg() and (body := tar.extractfile(info)) is not None:
                    yield name, body.read()
                tar.members = []  # tarfile would keep all headers
            # tarfile stops at the end mark; what follows is plain, whatever the whole was packed with.
            rest = tar.fileobj
            assert rest is not None
            block = b""
            while not block.strip(b"\0"):
                block = rest.read(BLOCK)
                if not block:
                    return
        stream, mode = _Joined(block, rest), "r|"


class _Joined:
    """A block that was read already, and the stream behind it."""

    def __init__(self, block: bytes, stream: _Readable) -> None:
        self._block, self._stream = block, stream

    def read(self, size: int) -> bytes:
        """Up to `size` bytes."""
        head, self._block = self._block[:size], self._block[size:]
        return head + self._stream.read(size - len(head)) if len(head) < size else head
