"""Writes moments to the cache in the background of training: a thread, a bounded queue, a part at a time.

    step        put(labels, fetch)          never waits; what does not fit is left for a later visit
    thread      fetch()                     waits for the copy from the device
                pack                        entries gather until they fill a part, or are five minutes old
                commit_part                 tar, table, rows of each shard

A kill loses what was not committed. Storage that fails is said once, and tried again with later samples.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, TypeAlias

from numpy.typing import NDArray

from data_pipeline.errors import Failure
from data_pipeline.moments.entry import Label, MomentsCache, pack
from data_pipeline.moments.parts import commit_part

logger = logging.getLogger(__name__)

PART_BYTES = 64_000_000
_PART_AGE_S = 300.0
_QUEUED_BYTES = 256_000_000
_REMEMBERED = 200_000
_POLL_S = 0.5
_END_S = 60.0
_Batch: TypeAlias = tuple[list[tuple[int, Label]], Callable[[], NDArray[Any]], int]


class MomentsWriter:
    """Takes moments as they are encoded; close it to commit the last part."""

    def __init__(
        self,
        cache: MomentsCache,
        *,
        allowance: int | None = None,
        part_bytes: int = PART_BYTES,
        part_age_s: float = _PART_AGE_S,
        patient: bool = False,
    ) -> None:
        """`allowance`: bytes that this writer may add, None for no bound.

        patient: `put` waits for room, and `close` for the last part
        """
        self.counts: Counter[str] = Counter()
        """written, bytes, parts, dropped, failed"""
        self._cache, self._allowance = cache, allowance
        self._part_bytes, self._part_age_s = part_bytes, part_age_s
        self._queue: queue.Queue[_Batch | None] = queue.Queue()
        self._queued_bytes = 0
        self._patient = patient
        self._room = threading.Condition()
        self._recent: OrderedDict[str, None] = OrderedDict()
        self._pending: list[tuple[Label, bytes]] = []
        self._pending_bytes, self._oldest_s = 0, 0.0
        self._taken, self._done = 0, 0  # entries that were put, and those of which it is known what became
        self._told: set[str] = set()
        self._full = allowance is not None and allowance <= 0
        if self._full:
            self._tell_full()
        self._thread = threading.Thread(target=self._run, name="moments", daemon=True)
        self._thread.start()

    def wants(self, label: Label | None) -> bool:
        """Whether an entry is to be stored: it has a label, there is room, and it was not stored just now."""
        return label is not None and not self._full and label.key not in self._recent

    def put(self, labels: Sequence[Label | None], fetch: Callable[[], NDArray[Any]], num_bytes: int) -> None:
        """Store the rows of `fetch()` [B, C, h, w] whose label is wanted; returns at once unless patient.

        fetch: called in the thread; gives the bits of the cache's dtype
        num_bytes: what the batch takes until it is packed
        """
        rows = [(row, label) for row, label in enumerate(labels) if label is not None and self.wants(label)]
        if not rows:
            return
        with self._room:
            if self._patient:
                self._room.wait_for(lambda: self._has_room(num_bytes) or not self._thread.is_alive())
            elif not self._has_room(num_bytes):
                self.counts["dropped"] += len(rows)
                self._tell(
                    "slow",
                    "its storage is slower than the encoding; what it misses is stored at a later visit",
                )
                return
            self._queued_bytes += num_bytes
        self._taken += len(rows)
        for _, label in rows:
            self._recent[label.key] = None
        while len(self._recent) > _REMEMBERED:
            self._recent.popitem(last=False)
        self._queue.put((rows, fetch, num_bytes))

    def close(self) -> None:
        """Commit what was put; safe to call twice.

        In bounded time: within a minute, or, if patient, as long as storage is tried. What is not stored by
        then has failed.
        """
        self._queue.put(None)
        self._thread.join(None if self._patient else _END_S)
        if left := self._taken - self._done:
            self._done += left
            self.counts["failed"] += left
            self._tell("unfinished", f"{left} samples are not stored at its end; a later visit stores them")

    def _has_room(self, num_bytes: int) -> bool:
        return self._queued_bytes == 0 or self._queued_bytes + num_bytes <= _QUEUED_BYTES

    def _run(self) -> None:
        while True:
            with suppress(queue.Empty):
                batch = self._queue.get(timeout=_POLL_S)
                if batch is None:
                    self._commit()
                    return
                rows, fetch, num_bytes = batch
                self._pack(rows, fetch)
                with self._room:
                    self._queued_bytes -= num_bytes
                    self._room.notify_all()
            old = bool(self._pending) and time.monotonic() - self._oldest_s > self._part_age_s
            if old or self._pending_bytes >= self._part_bytes:
                self._commit()

    def _pack(self, rows: list[tuple[int, Label]], fetch: Callable[[], NDArray[Any]]) -> None:
        try:
            values = fetch()
        except RuntimeError as error:  # of the device, which the step meets as well
            logger.debug("%s", error)
            self._done += len(rows)
            return
        if not self._pending:
            self._oldest_s = time.monotonic()
        for row, label in rows:
            data = pack(label, values[row], self._cache.dtype)
            self._pending.append((label, data))
            self._pending_bytes += len(data) + 1024

    def _commit(self) -> None:
        entries, size = self._pending, self._pending_bytes
        self._pending, self._pending_bytes = [], 0
        if not entries:
            return
        if not self._full and self._allowance is not None:
            self._full = size > self._allowance - self.counts["bytes"]
        if self._full:
            self._done += len(entries)
            self._tell_full()
            return
        try:
            table = commit_part(self._cache.folder, entries)
        except Failure as error:
            self._done += len(entries)
            self.counts["failed"] += len(entries)
            self._tell("failed", f"{error} Training goes on; the samples are stored at a later visit")
            for label, _ in entries:
                self._recent.pop(label.key, None)
            return
        self._done += len(entries)
        self.counts.update(written=len(entries), bytes=table.size, parts=1)

    def _tell_full(self) -> None:
        self._tell("full", "it has first_stage.cache_bytes and nothing more is added; what is there stays")

    def _tell(self, kind: str, what: str) -> None:
        """Say it once."""
        if kind not in self._told:
            self._told.add(kind)
            logger.warning("the cache %s: %s", self._cache.folder, what)
