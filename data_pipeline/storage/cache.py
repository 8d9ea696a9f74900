"""Optional local cache of shard bytes: aligned blocks as files, bounded, shared by all processes.

    <cache_dir>/1f/<object>.<block>     one MiB of a shard and its checksum, in one of up to 4096 folders
                                        by hash, each of which has an equal part of the limit
    <cache_dir>/1f/lock                 held while a block is moved in and the oldest make room for it

So a writer looks at the files of one folder, some hundreds, however large the cache is; and whatever number
of processes writes, or is killed while it does, the limit holds.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import math
import os
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from data_pipeline.errors import DataError
from data_pipeline.storage.urls import local_path

logger = logging.getLogger(__name__)

BLOCK = 1 << 20
_CHECK = 4
"""Bytes of a block's checksum, behind it: a machine that lost power may leave a file of the right size."""
_FOLDER_BLOCKS = 128
"""Blocks of a folder on average, when the cache is full."""
_MOST_FOLDERS = 4096
_LOCK = "lock"
_PAUSE_S = 60.0
"""Before a disk that took no block is tried again: each MiB that is read would be a try."""


class BlockCache:
    """Keeps blocks of 1 MiB under `folder`, at most `limit_bytes` in all; the least recently used go.

    Blocks appear by rename, so a reader never sees a torn one; any number of processes may share it. A
    full or failing disk only means that nothing more is kept for a while, which is told once.
    """

    def __init__(self, folder: str, limit_bytes: int) -> None:
        if limit_bytes < 16 * BLOCK:
            raise DataError(f"data.cache_bytes={limit_bytes} is too small; use at least {16 * BLOCK}.")
        self._folder = Path(local_path(folder))
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DataError(f"data.cache_dir={folder} cannot be made ({error}); choose another.") from error
        self._folders = min(_MOST_FOLDERS, max(1, limit_bytes // (_FOLDER_BLOCKS * BLOCK)))
        self._limit = limit_bytes // self._folders
        self._paused_until = -math.inf
        self._told = False

    def read(
        self, identity: str, size: int, start: int, stop: int, fetch: Callable[[int, int], bytes]
    ) -> bytes:
        """Bytes [start, stop) of the object `identity` of `size` bytes; `fetch` reads what is missing."""
        first, last = start // BLOCK, (stop - 1) // BLOCK
        name = hashlib.sha256(identity.encode()).hexdigest()[:24]
        found = {block: self._get(name, block, size) for block in range(first, last + 1)}
        missing = [block for block, data in found.items() if data is None]
        while missing:
            run = [missing.pop(0)]
            while missing and missing[0] == run[-1] + 1:
                run.append(missing.pop(0))
            data = fetch(run[0] * BLOCK, min(size, (run[-1] + 1) * BLOCK))
            for i, block in enumerate(run):
                found[block] = data[i * BLOCK : (i + 1) * BLOCK]
                self._put(name, block, data[i * BLOCK : (i + 1) * BLOCK])
        joined = b"".join(data for data in found.values() if data is not None)
        return joined[start - first * BLOCK : stop - first * BLOCK]

    def _path(self, name: str, block: int) -> Path:
        number = zlib.crc32(f"{name}.{block}".encode()) % self._folders
        return self._folder / f"{number:03x}" / f"{name}.{block}"

    def _get(self, name: str, block: int, size: int) -> bytes | None:
        path = self._path(name, block)
        try:
            stored = path.read_bytes()
            os.utime(path)
        except OSError:
            return None
        data, check = stored[:-_CHECK], stored[-_CHECK:]
        if len(data) != min(BLOCK, size - block * BLOCK) or check != _checksum(data):
            return None
        return data

    def _put(self, name: str, block: int, data: bytes) -> None:
        if time.monotonic() < self._paused_until:
            return
        path = self._path(name, block)
        temporary = path.with_name(f"{path.name}.{os.getpid()}.{threading.get_ident()}.part")
        try:
            path.parent.mkdir(exist_ok=True)
            with _locked(path.parent):
                self._make_room(path.parent, len(data) + _CHECK)
                temporary.write_bytes(data + _checksum(data))
                temporary.replace(path)
        except OSError as error:
            self._pause(error)
            with suppress(OSError):
                temporary.unlink(missing_ok=True)

    def _pause(self, why: OSError) -> None:
        self._paused_until = time.monotonic() + _PAUSE_S
        if not self._told:
            self._told = True
            logger.warning(
                "nothing more is cached in %s: %s; it is tried again once a minute, and not told again. On a "
                "full disk lower data.cache_bytes.",
                self._folder,
                why,
            )

    def _make_room(self, folder: Path, size: int) -> None:
        """Remove the oldest files until so many bytes fit, and what a killed process has left unfinished."""
        files = []
        for path in folder.iterdir():
            if path.suffix == ".part":  # whose writer held the lock, and is gone
                path.unlink(missing_ok=True)
            elif path.name != _LOCK:
                status = path.stat()
                files.append((status.st_mtime, status.st_size, path))
        total = size + sum(each for _, each, _ in files)
        for _, each, path in sorted(files):
            if total <= self._limit:
                return
            path.unlink(missing_ok=True)
            total -= each


def _checksum(data: bytes) -> bytes:
    return zlib.crc32(data).to_bytes(_CHECK, "little")


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One writer of a folder at a time; a killed one holds nothing."""
    file = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
    finally:
        os.close(file)
