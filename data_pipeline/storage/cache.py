"""Optional local cache of shard bytes: aligned blocks as files, bounded, shared by all processes."""

from __future__ import annotations

import hashlib
import logging
import os
import threading
from collections.abc import Callable
from pathlib import Path

from data_pipeline.errors import DataError
from data_pipeline.storage.urls import local_path

logger = logging.getLogger(__name__)

BLOCK = 1 << 20
_CHECK_EVERY = 8
_KEEP_SHARE = 0.9


class BlockCache:
    """Keeps blocks of 1 MiB under `folder`, at most `limit_bytes` in all; the least recently used go.

    Blocks appear by rename, so a reader never sees a torn one; any number of processes may share it. A
    full or failing disk only means that nothing more is kept.
    """

    def __init__(self, folder: str, limit_bytes: int) -> None:
        if limit_bytes < 16 * BLOCK:
            raise DataError(f"data.cache_bytes={limit_bytes} is too small; use at least {16 * BLOCK}.")
        self._folder = Path(local_path(folder))
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DataError(f"data.cache_dir={folder} cannot be made ({error}); choose another.") from error
        self._limit = limit_bytes
        self._writes = 0
        self._lock = threading.Lock()

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
        return self._folder / name[:2] / f"{name}.{block}"

    def _get(self, name: str, block: int, size: int) -> bytes | None:
        path = self._path(name, block)
        try:
            data = path.read_bytes()
            os.utime(path)
        except OSError:
            return None
        if len(data) != min(BLOCK, size - block * BLOCK):
            return None
        return data

    def _put(self, name: str, block: int, data: bytes) -> None:
        path = self._path(name, block)
        temporary = path.with_name(f"{path.name}.{os.getpid()}.{threading.get_ident()}.part")
        try:
            path.parent.mkdir(exist_ok=True)
            temporary.write_bytes(data)
            temporary.replace(path)
        except OSError as error:
            logger.warning("nothing more is cached in %s: %s", self._folder, error)
            temporary.unlink(missing_ok=True)
            return
        with self._lock:
            self._writes += 1
            due = self._writes % _CHECK_EVERY == 1
        if due:
            self._evict()

    def _evict(self) -> None:
        files = []
        for path in self._folder.glob("*/*"):
            try:
                status = path.stat()
            except OSError:
                continue  # another process was quicker
            files.append((status.st_mtime, status.st_size, path))
        limit = self._limit - _CHECK_EVERY * BLOCK  # room for what is written until the next check
        total = sum(size for _, size, _ in files)
        if total <= limit:
            return
        for _, size, path in sorted(files):
            path.unlink(missing_ok=True)
            total -= size
            if total <= _KEEP_SHARE * limit:
                return
