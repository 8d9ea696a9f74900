"""Checkpoint files at any fsspec URL: streamed writes with checksums, range reads, clear errors."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import xxhash

from data_pipeline.errors import AccessDenied, MissingBucket
from data_pipeline.storage.retry import with_retries
from data_pipeline.storage.urls import explain, filesystem, join, scheme_of
from trainer.config.run import ConfigError
from trainer.exit_codes import RetryableFault

CHUNK_BYTES = 16 << 20
"""Unit of hashing and local writing."""
_PART_BYTES = 32 << 20  # of a multipart upload: 10,000 parts of this are 312 GiB
_TRIES = 30  # five to eight minutes, less than the watchdog grants a save
_QUICK_TRIES = 4  # where a person waits
_REMOTE_READS = 8
_HOPELESS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM}


def checksum_bytes(data: bytes) -> str:
    """XXH3-128, hexadecimal."""
    return str(xxhash.xxh3_128_hexdigest(data))


def chunked(view: memoryview) -> Iterator[memoryview]:
    """Consecutive parts of at most CHUNK_BYTES."""
    for start in range(0, len(view), CHUNK_BYTES):
        yield view[start : start + CHUNK_BYTES]


def write_stream(
    url: str, make_parts: Callable[[], Iterable[memoryview]], *, tries: int = _TRIES
) -> tuple[int, str]:
    """Write the parts, made anew at every try, as one file; (size, checksum).

    A local file appears under its name only when it is whole and on the disk; an S3 object likewise
    (multipart uploads appear when completed).

    Raises:
        ConfigError: what no retry will cure (full disk, no permission, no bucket).
        RetryableFault: storage failed for too long.
    """
    try:
        return with_retries(lambda: _write_once(url, make_parts()), tries=tries)
    except (ConfigError, RetryableFault):
        raise  # from reading what is written
    except Exception as error:
        raise failure(error, url, "written") from error


def write_whole(url: str, *parts: bytes | memoryview) -> tuple[int, str]:
    """The same for parts that are in memory."""
    return write_stream(url, lambda: [memoryview(part) for part in parts])


def _write_once(url: str, parts: Iterable[memoryview]) -> tuple[int, str]:
    fs, path = filesystem(url, timeout_s=60.0)
    hasher, size = xxhash.xxh3_128(), 0
    local = scheme_of(url) == "file"
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
    fs, path = filesystem(url, timeout_s=60.0)
    if scheme_of(url) == "file":
        with open(path, "rb") as file:
            for start, stop in ranges:
                file.seek(start)
                yield file.read(stop - start)
        return

    def fetch(bounds: tuple[int, int]) -> bytes:
        start, stop = bounds
        if start == stop:
            return b""
        return bytes(with_retries(lambda: fs.cat_file(path, start=start, end=stop), tries=_TRIES))

    with ThreadPoolExecutor(_REMOTE_READS) as pool:
        for first in range(0, len(ranges), _REMOTE_READS):
            yield from pool.map(fetch, ranges[first : first + _REMOTE_READS])


def measure(url: str, expected_size: int) -> tuple[int, str]:
    """(size, checksum) of a stored file, read in full; size -1 when there is none."""
    fs, path = filesystem(url, timeout_s=60.0)
    try:
        size = int(with_retries(lambda: fs.size(path), tries=_TRIES))
    except FileNotFoundError:
        return -1, ""
    if size != expected_size:  # not worth reading
        return size, ""
    hasher = xxhash.xxh3_128()
    bounds = [(start, min(size, start + CHUNK_BYTES)) for start in range(0, size, CHUNK_BYTES)]
    for chunk in read_ranges(url, bounds):
        hasher.update(chunk)
    return size, hasher.hexdigest()


def read_whole(url: str) -> bytes:
    """A small file that is known to be there. Raises like `write_stream`."""
    fs, path = filesystem(url)
    try:
        return bytes(with_retries(lambda: fs.cat_file(path), tries=_TRIES))
    except Exception as error:
        raise failure(error, url, "read") from error


def list_names(url: str, *, patient: bool = False) -> list[str]:
    """Names directly inside a folder, sorted; none when there is no folder.

    Args:
        patient: wait out an outage, as writers do, instead of a few seconds.
    """
    fs, path = filesystem(url)
    try:
        tries = _TRIES if patient else _QUICK_TRIES
        found = with_retries(lambda: fs.ls(path, detail=False), tries=tries)
    except FileNotFoundError:
        return []
    except Exception as error:
        raise failure(error, url, "listed") from error
    return sorted(name.rstrip("/").rpartition("/")[2] for name in found if name.rstrip("/") != path)


def remove(url: str) -> None:
    """Remove a file, or a folder with what is in it; quiet when it is not there."""
    fs, path = filesystem(url)
    try:
        with_retries(lambda: fs.rm(path, recursive=True), tries=_TRIES)
    except FileNotFoundError:
        return


def check_writable(folder: str) -> None:
    """Write and remove a small file.

    Raises:
        ConfigError, RetryableFault: it does not work; better known before the first checkpoint.
    """
    probe = join(folder, f".writable.{os.getpid()}")
    write_stream(probe, lambda: [memoryview(b"ok")], tries=_QUICK_TRIES)
    remove(probe)


def failure(error: BaseException, url: str, done: str) -> ConfigError | RetryableFault:
    """The sentence for a storage error, as the exception that decides whether a restart helps."""
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return ConfigError(
            f"{url} cannot be {done}: the disk is full; make room or choose another run_dir. "
            "Earlier checkpoints are intact."
        )
    if isinstance(error, OSError) and (
        error.errno in _HOPELESS
        or isinstance(error, (FileNotFoundError, NotADirectoryError, FileExistsError))
    ):
        explained = explain(error, url)
        if scheme_of(url) != "file":
            return ConfigError(str(explained))
        return ConfigError(
            f"{url} cannot be {done} ({error.strerror or error}); check run_dir and its permissions. "
            "Earlier checkpoints are intact."
        )
    explained = explain(error, url)
    if isinstance(explained, (AccessDenied, MissingBucket)):
        return ConfigError(str(explained))
    return RetryableFault(f"{url} cannot be {done}: {explained}")
