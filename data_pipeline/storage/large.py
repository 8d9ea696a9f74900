"""Large files: written in parts with a checksum, read back by ranges, and measured."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import xxhash

from data_pipeline.errors import NotFound
from data_pipeline.storage.client import filesystem
from data_pipeline.storage.retry import PATIENT_TRIES, QUICK_TRIES, guarded, guarded_change
from data_pipeline.storage.urls import is_local, is_s3

CHUNK_BYTES = 16 << 20
"""Unit of hashing and local writing."""
_PART_BYTES = 32 << 20  # of a multipart upload: 10,000 parts of this are 312 GiB
_TIMEOUT_S = 60.0
_REMOTE_READS = 8


def checksum_bytes(*parts: bytes | memoryview) -> str:
    """XXH3-128 of the parts as one, hexadecimal."""
    hasher = xxhash.xxh3_128()
    for part in parts:
        hasher.update(part)
    return str(hasher.hexdigest())


def chunked(view: memoryview) -> Iterator[memoryview]:
    """Consecutive parts of at most CHUNK_BYTES."""
    for start in range(0, len(view), CHUNK_BYTES):
        yield view[start : start + CHUNK_BYTES]


def write_stream(
    url: str, make_parts: Callable[[], Iterable[memoryview]], *, tries: int = PATIENT_TRIES
) -> tuple[int, str]:
    """Write the parts, made anew at every try, as one file; (size, checksum).

    A local file appears under its name only when it is whole and on the disk; an S3 object likewise
    (multipart uploads appear when completed).

    Raises:
        UserError: what no retry will cure (full disk, no permission, no bucket).
        RetryableFault: storage failed for too long.
    """
    return guarded_change(lambda: _write_once(url, make_parts()), url, done="written", tries=tries)


def write_whole(url: str, *parts: bytes | memoryview) -> tuple[int, str]:
    """The same for parts that are in memory."""
    return write_stream(url, lambda: [memoryview(part) for part in parts])


def _write_once(url: str, parts: Iterable[memoryview]) -> tuple[int, str]:
    fs, path = filesystem(url, timeout_s=_TIMEOUT_S)
    hasher, size = xxhash.xxh3_128(), 0
    local = is_local(url)
    file: Any  # a raw file or one of fsspec's
    if local:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        file = open(f"{path}.part", "wb", buffering=0)  # noqa: SIM115 - both kinds close below
    else:
        file = fs.open(path, "wb", block_size=_PART_BYTES)
    try:
        for part in parts:
            for chunk in chunked(part):
                hasher.update(chunk)
                size += len(chunk)
                _write_all(file, chunk)
        if local:
            os.fsync(file.fileno())
    except BaseException:
        if local:
            file.close()
            os.unlink(f"{path}.part")
        else:
            # Closing the file, or losing it to the garbage collector, would complete the upload.
            file.closed = True
            with contextlib.suppress(Exception):
                file.discard()
        raise
    file.close()
    if local:
        os.replace(f"{path}.part", path)
        _sync_folder(os.path.dirname(path))
    return size, hasher.hexdigest()


def abort_uploads(folder: str, is_dead: Callable[[str], bool]) -> int:
    """End multipart uploads below an S3 folder whose writers are gone; how many there were.

    Their parts are in no listing, and are kept and paid for until somebody ends them.

    Args:
        is_dead: of the URL that an upload would have made.

    Raises:
        UserError, RetryableFault: storage does not list or end them.
    """
    if not is_s3(folder):
        return 0
    fs, path = filesystem(folder, timeout_s=_TIMEOUT_S)
    bucket, _, prefix = path.partition("/")

    def once() -> int:
        found: list[dict[str, Any]] = []
        place: dict[str, str] = {}
        while True:
            page = fs.call_s3("list_multipart_uploads", Bucket=bucket, Prefix=f"{prefix}/", **place)
            found += page.get("Uploads") or []
            if not page.get("IsTruncated"):
                break
            place = {"KeyMarker": page["NextKeyMarker"], "UploadIdMarker": page["NextUploadIdMarker"]}
        dead = [each for each in found if is_dead(f"s3://{bucket}/{each['Key']}")]
        for each in dead:
            fs.call_s3("abort_multipart_upload", Bucket=bucket, Key=each["Key"], UploadId=each["UploadId"])
        return len(dead)

    return guarded_change(once, folder, done="cleaned of uploads", tries=QUICK_TRIES)


def _write_all(file: Any, chunk: memoryview) -> None:
    while len(chunk):
        written = file.write(chunk)
        chunk = chunk[written:]


def _sync_folder(path: str) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_ranges(url: str, ranges: list[tuple[int, int]]) -> Iterator[bytes]:
    """The bytes [start, stop) of each range, in order; several at a time from remote storage."""
    fs, path = filesystem(url, timeout_s=_TIMEOUT_S)
    if is_local(url):
        with open(path, "rb") as file:
            for start, stop in ranges:
                file.seek(start)
                yield file.read(stop - start)
        return

    def fetch(bounds: tuple[int, int]) -> bytes:
        start, stop = bounds
        if start == stop:
            return b""
        return bytes(guarded(lambda: fs.cat_file(path, start=start, end=stop), url, tries=PATIENT_TRIES))

    with ThreadPoolExecutor(_REMOTE_READS) as pool:
        for first in range(0, len(ranges), _REMOTE_READS):
            yield from pool.map(fetch, ranges[first : first + _REMOTE_READS])


def measure(url: str, expected_size: int) -> tuple[int, str]:
    """(size, checksum) of a stored file, read in full; size -1 when there is none."""
    fs, path = filesystem(url, timeout_s=_TIMEOUT_S)
    try:
        size = int(guarded(lambda: fs.size(path), url, tries=PATIENT_TRIES))
    except NotFound:
        return -1, ""
    if size != expected_size:  # not worth reading
        return size, ""
    hasher = xxhash.xxh3_128()
    bounds = [(start, min(size, start + CHUNK_BYTES)) for start in range(0, size, CHUNK_BYTES)]
    for chunk in read_ranges(url, bounds):
        hasher.update(chunk)
    return size, hasher.hexdigest()
