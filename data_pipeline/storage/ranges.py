"""Range reads in the background: by priority, with retries, patience and a bounded share of memory."""

from __future__ import annotations

import itertools
import logging
import queue
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, TypeVar

from data_pipeline.errors import (
    AccessDenied,
    DataError,
    Gone,
    NotFound,
    ReadFailed,
    Replaced,
    StorageOutage,
    in_a_line,
)
from data_pipeline.storage.client import filesystem, read_within
from data_pipeline.storage.editions import Edition, EditionReader, look_at
from data_pipeline.storage.listing import ListedFile
from data_pipeline.storage.retry import ShortBody, explain, is_transient, pause_before, require_range
from data_pipeline.storage.waits import tell, tell_end

logger = logging.getLogger(__name__)
T = TypeVar("T")

_IDLE_S = 0.5
_FORGET = 0.05
_SHORTEST_DEADLINE_S = 3.0
_DEADLINE_FACTOR = 10.0
_PROBES = 3
_ALONE = 2


class Closed(Exception):
    """The reader was closed meanwhile. It says nothing of what was asked for."""


class RangeReader:
    """Reads byte ranges of shards; one per process, used by many threads."""

    def __init__(
        self, *, timeout_s: float, tries: int, patience_s: float, probes: Sequence[str] = ()
    ) -> None:
        """`probes`: objects that tell, when one cannot be read, whether others can."""
        self._probes = probes
        self.timeout_s = timeout_s
        self.tries = tries
        self.patience_s = patience_s
        self.counts: Counter[str] = Counter()
        """requests, bytes, retries, failures"""
        self._last_success = time.monotonic()
        self._typical_s = 0.5
        self._closed = threading.Event()
        self._reading = EditionReader()

    def read(self, url: str, start: int, stop: int, expected: Edition | None = None) -> bytes:
        """Bytes [start, stop), of the object's `expected` edition where one is given.

        Raises:
            ReadFailed: only this object fails; Gone where it is not there.
            Replaced: it has another content by now.
            StorageOutage: all objects fail, for longer than `patience_s`.
        """

        def once(attempt: int) -> bytes:
            started = time.monotonic()
            data = self._once(url, start, stop, self._deadline(attempt), expected)
            self._count(data, time.monotonic() - started)
            return data

        return self._patiently(url, once)

    def read_all(self, url: str) -> bytes:
        """A whole small file, with the same patience."""
        return self.read(url, 0, -1)

    def read_if_there(self, url: str) -> bytes | None:
        """The same of a file that may be there; None where it is not, which is no failure."""
        try:
            return self.read_all(url)
        except Gone:
            self.counts["failures"] -= 1
            return None

    def edition_if_there(self, url: str) -> Edition | None:
        """Which edition a file is of that may be there; None where it is not."""

        def once(attempt: int) -> Edition:
            fs, path = filesystem(url, timeout_s=self.timeout_s)
            found = look_at(fs, path, deadline_s=self._deadline(attempt))
            self.counts["requests"] += 1
            return found

        try:
            return self._patiently(url, once)
        except Gone:
            self.counts["failures"] -= 1
            return None

    def begin(self, url: str, num_bytes: int) -> tuple[ListedFile, bytes]:
        """Size and version of an object that nobody has looked up, and its first bytes, at most so many.

        Raises ReadFailed, StorageOutage.
        """

        def once(attempt: int) -> tuple[ListedFile, bytes]:
            started = time.monotonic()
            fs, path = filesystem(url, timeout_s=self.timeout_s)
            data, found = self._reading.begin(fs, path, num_bytes, deadline_s=self._deadline(attempt))
            _check_length(url, data, min(num_bytes, found.size))
            self._count(data, time.monotonic() - started)
            return ListedFile(url, found.size, found.version), data

        return self._patiently(url, once)

    def _count(self, data: bytes, seconds: float) -> None:
        self._typical_s += _FORGET * (seconds - self._typical_s)
        self.counts["requests"] += 1
        self.counts["bytes"] += len(data)

    def _patiently(self, url: str, action: Callable[[int], T]) -> T:
        """What `action` returns in the end; it is given the number of the try."""
        began, told = time.monotonic(), False
        alone = 0  # tries in a row that failed while others were answered, once the first `tries` are over
        for attempt in itertools.count(1):
            if self._closed.is_set():
                raise Closed
            tried = time.monotonic()
            try:
                result = action(attempt)
            except Replaced as error:
                raise Replaced(f"{url} was replaced: {error}") from error
            except Exception as error:  # noqa: BLE001 - the libraries' exceptions have no common base
                self._require_transient(error, url)
                if attempt >= self.tries:
                    alone = alone + 1 if self._last_success > tried or self._others_answer(url) else 0
                    self._judge(error, url, attempt, alone, time.monotonic() - began)
                waited = time.monotonic() - began
                told |= tell(
                    waited,
                    f"{url} is not read after {waited:.0f} s ({in_a_line(error)}); tried again, at least "
                    f"{self.tries} times ({attempt} so far), and while nothing answers "
                    f"for {self.patience_s:.0f} s",
                )
            else:
                self._last_success = time.monotonic()
                if told:
                    tell_end(f"{url} is read, after {self._last_success - began:.0f} s")
                return result
            self.counts["retries"] += 1
            self._closed.wait(pause_before(min(attempt, 9)))
        raise AssertionError

    def _deadline(self, attempt: int) -> float:
        """Seconds for one try: ten times what is usual at first, more for each further one."""
        usual = max(_SHORTEST_DEADLINE_S, _DEADLINE_FACTOR * self._typical_s)
        return min(self.timeout_s, usual * 2.0 ** min(attempt - 1, 20))

    def _once(
        self, url: str, start: int, stop: int, deadline_s: float, expected: Edition | None = None
    ) -> bytes:
        fs, path = filesystem(url, timeout_s=self.timeout_s)
        if expected is not None:
            data = self._reading.read(fs, path, start, stop, expected=expected, deadline_s=deadline_s)
        else:
            data = read_within(deadline_s, fs, path, **({} if stop < 0 else {"start": start, "end": stop}))
        if stop >= 0:
            _check_length(url, data, stop - start)
        return data

    def _require_transient(self, error: Exception, url: str) -> None:
        """Return where another try may help; raise what the failure means where it cannot."""
        if isinstance(error, DataError):  # a mistake in the environment, or a server without ranges
            raise error
        if isinstance(error, PermissionError):
            raise explain(error, url) from error
        if not is_transient(error):
            explained = explain(error, url)
            if isinstance(explained, AccessDenied):
                raise explained from error
            self.counts["failures"] += 1
            if isinstance(explained, NotFound):
                raise Gone(str(explained)) from error
            raise ReadFailed(f"{url}: {explained}") from error

    def _judge(self, error: Exception, url: str, attempt: int, alone: int, waited: float) -> None:
        """After the usual tries: give up this object, give up the storage, or return to wait for it.

        What was answered before a try began says nothing of the storage as it is now: an outage would cost
        the objects that were asked for as it began. Nor does one failed try beside an answer: the outage may
        have ended between the two.
        """
        if alone >= _ALONE:
            self.counts["failures"] += 1
            raise ReadFailed(f"{url}: {attempt} tries failed, the last with {in_a_line(error)}") from error
        if alone:
            return
        if waited > self.patience_s:
            raise StorageOutage(
                f"Storage did not answer for {waited:.0f} s (data.patience_s={self.patience_s:.0f}), last "
                f"{url}: {in_a_line(error)}; run the same command again when it does."
            ) from error

    def _others_answer(self, url: str) -> bool:
        for other in [p for p in self._probes if p != url][:_PROBES]:
            try:
                self._once(other, 0, 1, _SHORTEST_DEADLINE_S)
            except Exception as error:  # noqa: BLE001 - the libraries' exceptions have no common base
                logger.debug("probe of %s: %s", other, error)
                continue
            self._last_success = time.monotonic()
            return True
        return False

    def close(self) -> None:
        """Wake sleeping retries so that threads end; whoever still asks meets `Closed`."""
        self._closed.set()


def _check_length(url: str, data: bytes, wanted: int) -> None:
    """Raises DataError where the server does not answer ranges, ShortBody where it sent too little."""
    require_range(url, len(data), wanted)
    if len(data) != wanted:
        raise ShortBody(f"short body: {len(data)} of {wanted} bytes")


class Background:
    """A few daemon threads that take the most urgent task first."""

    def __init__(self, threads: int) -> None:
        self._queue: queue.PriorityQueue[tuple[float, int, Any]] = queue.PriorityQueue()
        self._count = itertools.count()
        self._closed = threading.Event()
        self._threads = [threading.Thread(target=self._run, daemon=True) for _ in range(threads)]
        for thread in self._threads:
            thread.start()

    def submit(self, priority: float, action: Callable[[], T]) -> Future[T]:
        """Run `action` in a thread; smaller priorities first."""
        future: Future[T] = Future()
        self._queue.put((priority, next(self._count), (future, action)))
        return future

    def _run(self) -> None:
        while not self._closed.is_set():
            try:
                _, _, (future, action) = self._queue.get(timeout=_IDLE_S)
            except queue.Empty:
                continue
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(action())
            except BaseException as error:  # noqa: BLE001 - handed to whoever waits for the result
                future.set_exception(error)

    def close(self) -> None:
        """Drop what has not begun; running reads end by themselves."""
        self._closed.set()
        while True:
            try:
                _, _, (future, _) = self._queue.get_nowait()
            except queue.Empty:
                return
            future.cancel()
