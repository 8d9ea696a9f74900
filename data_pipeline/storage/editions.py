"""Which content a name holds, and reads that notice when it is another one than expected.

Whoever keeps offsets into an object (the index of a shard) reads nonsense when the object is replaced under
its name: captions of the old length, pictures from the middle of a file. So a read may say what it expects:

    s3                 each answer carries size and ETag (or the time of the last change) of what it is from
    this machine       the open file has a size and a time, looked at after its bytes
    other storage      asked for once a minute, before a read

An ETag is compared where both sides have one, else the time, to the second: listings give fractions that
answers leave out. The size is compared always.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

from data_pipeline.errors import Replaced
from data_pipeline.storage.client import await_within, read_within

_ASK_EVERY_S = 60.0
_TAGS = ("ETag", "etag", "blob_id")
_TIMES = ("mtime", "LastModified", "last_modified", "Last-Modified", "updated", "created")
_BEHIND_THE_END = re.compile(
    r"InvalidRange|RequestedRangeNotSatisfiable|\b416\b|not satisfiable", re.IGNORECASE
)


@dataclass(frozen=True)
class Edition:
    """One content of an object."""

    size: int
    """Bytes; -1 where the server does not tell."""
    version: str
    """ETag, else time of the last change as the storage writes it; `None` where there is neither."""


def edition_of(info: Mapping[str, Any], size: int) -> Edition:
    """Edition in what a listing or an answer says of an object."""
    # Some servers send an empty one, and what lies between marks it as weak.
    tags = (str(info.get(name) or "").removeprefix("W/").strip('"') for name in _TAGS)
    tag = next((tag for tag in tags if tag), None)
    return Edition(size, tag or _time_in(info))


def _time_in(info: Mapping[str, Any]) -> str:
    return str(next((info[name] for name in _TIMES if info.get(name)), None))


def is_other(before: Edition, now: Edition) -> bool:
    """Whether these are two contents, as far as one can tell."""
    try:
        _require_same(before, now)
    except Replaced:
        return True
    return False


def look_at(fs: Any, path: str, *, deadline_s: float) -> Edition:
    """Which edition an object is of by now."""
    if "file" in fs.protocol:
        status = os.stat(path)
        return edition_of({"mtime": status.st_mtime}, status.st_size)
    info = _info(fs, path, deadline_s)
    return edition_of(info, int(info["size"] or 0))


class EditionReader:
    """Reads ranges of objects of an expected edition; one per process, for many threads."""

    def __init__(self) -> None:
        self._asked: dict[str, float] = {}

    def read(
        self, fs: Any, path: str, start: int, stop: int, *, expected: Edition, deadline_s: float
    ) -> bytes:
        """Bytes [start, stop), fewer where the server sends fewer.

        Raises:
            Replaced: the object has another content by now.
        """
        if hasattr(fs, "call_s3"):
            return bytes(await_within(deadline_s, fs, _from_s3, fs, path, start, stop, expected))
        if "file" in fs.protocol:
            return _from_disk(path, start, stop, expected)
        self._ask(fs, path, expected, deadline_s)
        return read_within(deadline_s, fs, path, start=start, end=stop)

    def begin(self, fs: Any, path: str, num_bytes: int, *, deadline_s: float) -> tuple[bytes, Edition]:
        """The first bytes of an object, at most so many (-1: all), and which edition they are of.

        One request to S3; fewer bytes where the server sends fewer.
        """
        if hasattr(fs, "call_s3"):
            begun: tuple[bytes, Edition] = await_within(deadline_s, fs, _begun_on_s3, fs, path, num_bytes)
            return begun
        if "file" in fs.protocol:
            with open(path, "rb") as file:
                data = file.read(num_bytes)
                status = os.fstat(file.fileno())
            return data, edition_of({"mtime": status.st_mtime}, status.st_size)
        edition = look_at(fs, path, deadline_s=deadline_s)
        self._asked[path] = time.monotonic()
        stop = edition.size if num_bytes < 0 else min(num_bytes, edition.size)
        return read_within(deadline_s, fs, path, start=0, end=stop) if stop else b"", edition

    def _ask(self, fs: Any, path: str, expected: Edition, deadline_s: float) -> None:
        asked = self._asked.get(path)
        if asked is not None and time.monotonic() - asked < _ASK_EVERY_S:
            return
        info = _info(fs, path, deadline_s)
        size = info.get("size")
        _compare(expected, info, -1 if size is None else int(size))
        self._asked[path] = time.monotonic()


def _info(fs: Any, path: str, deadline_s: float) -> Mapping[str, Any]:
    """What the storage says of an object."""
    found = await_within(deadline_s, fs, fs._info, path) if fs.async_impl else fs.info(path)
    return dict(found)


def _from_disk(path: str, start: int, stop: int, expected: Edition) -> bytes:
    with open(path, "rb") as file:
        file.seek(start)
        data = file.read(stop - start)
        # After the bytes: a writer that comes between would not be seen before them.
        status = os.fstat(file.fileno())
    _compare(expected, {"mtime": status.st_mtime}, status.st_size)
    return data


async def _begun_on_s3(fs: Any, path: str, num_bytes: int) -> tuple[bytes, Edition]:
    bucket, key, _ = fs.split_path(path)
    data = b""
    some = {} if num_bytes < 0 else {"Range": f"bytes=0-{num_bytes - 1}"}
    try:
        answer = await fs._call_s3("get_object", Bucket=bucket, Key=key, **some)
    except Exception as error:
        if not _BEHIND_THE_END.search(f"{error} {error.__cause__}"):  # an empty object has no first byte
            raise
    else:
        try:
            data = bytes(await answer["Body"].read())
        finally:
            answer["Body"].close()
        total = str(answer.get("ContentRange", "")).rpartition("/")[2]
        if not some or total.isdigit():
            return data, edition_of(answer, int(total) if some else len(data))
    info = await fs._info(path)
    return data, edition_of(info, int(info["size"]))


async def _from_s3(fs: Any, path: str, start: int, stop: int, expected: Edition) -> bytes:
    bucket, key, _ = fs.split_path(path)
    try:
        answer = await fs._call_s3("get_object", Bucket=bucket, Key=key, Range=f"bytes={start}-{stop - 1}")
    except Exception as error:
        if stop <= expected.size and _BEHIND_THE_END.search(f"{error} {error.__cause__}"):
            raise Replaced(f"it is shorter than the {expected.size} bytes that were indexed") from error
        raise
    try:
        total = str(answer.get("ContentRange", "")).rpartition("/")[2]
        _compare(expected, answer, int(total) if total.isdigit() else -1)
        return bytes(await answer["Body"].read())
    finally:
        answer["Body"].close()


def _compare(expected: Edition, info: Mapping[str, Any], size: int) -> None:
    found = edition_of(info, size)
    if _moment(expected.version) is not None:  # of a listing that gave no ETag
        found = Edition(size, _time_in(info))
    _require_same(expected, found)


def _require_same(expected: Edition, found: Edition) -> None:
    if -1 not in (expected.size, found.size) and expected.size != found.size:
        raise Replaced(f"it has {found.size} bytes, {expected.size} when it was indexed")
    if found.version == expected.version:
        return
    before, now = _moment(expected.version), _moment(found.version)
    if before is not None and now is not None:
        # A listing's fractions of a second are not in an answer's header; file systems always have them.
        on_disk = any(re.fullmatch(r"[0-9.]+", version) for version in (expected.version, found.version))
        whole_seconds = not on_disk and 0 in (before.microsecond, now.microsecond)
        if abs((now - before).total_seconds()) < (1.0 if whole_seconds else 1e-6):
            return
        raise Replaced(f"it was changed {found.version}, {expected.version} when it was indexed")
    if before is None and now is None and "None" not in (expected.version, found.version):
        raise Replaced(f"its ETag is {found.version}, {expected.version} when it was indexed")
    # One side has a tag and the other a time: nothing to compare.


def _moment(version: str) -> datetime | None:
    """The time that a version is, if it is one."""
    try:
        if re.fullmatch(r"[0-9]+\.[0-9]+", version):
            return datetime.fromtimestamp(float(version), UTC)
        if ":" not in version:
            return None
        moment = parsedate_to_datetime(version) if "," in version else datetime.fromisoformat(version)
    except (ValueError, OverflowError, OSError):
        return None
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)
