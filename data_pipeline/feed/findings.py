"""What a loader without an index finds out about its shards, and which rejections go with which sample.

Threads read ahead of what is served, and many of them on many ranks reject thousands of samples before the
first batch is through. Counted at once, these would stand beside the few that are served by then, and a set
that loses a third would look like one that loses nearly all. So what is rejected between two samples of a
stream goes with the second one, through the shuffle and the queue, and counts when that is served.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from data_pipeline.batch import FIRST, Tally, remedy
from data_pipeline.config import DataConfig
from data_pipeline.errors import DataError, NotATar, in_a_line
from data_pipeline.shards.filter_columns import unknown_column

logger = logging.getLogger(__name__)

_FRUITLESS_ROUNDS = 3
"""Times that as many shards as there are may be opened in a row without a single sample in them."""
_REJECTED = "__rejected__"


class StreamFindings:
    """What a loader without an index finds out about its shards while it reads them.

    With an index the start knows which shards are no tars, which columns there are and what the filter
    leaves. Here only reading tells, and a loader that met nothing usable would read for ever. So the threads
    of a rank report here, and what can only mean a mistake of the user's is raised as one: every method may
    raise DataError, which ends the loader.
    """

    def __init__(self, config: DataConfig, urls: Sequence[str], columns: Iterable[str]) -> None:
        """columns: those that the filter names"""
        self.tally = Tally()
        """What was rejected so far, ahead of what is served."""
        self._limit = config.max_bad_shards
        self._shards = len(set(urls))
        self._lock = threading.Lock()
        self._bad: dict[str, None] = {}
        self._fruitless = 0
        self._accepted = False
        self._seen: set[str] = set()
        self._records = 0
        self._unseen = set(columns)

    def opening(self, url: str) -> bool:
        """A shard is about to be read; False: it was found to be no tar before."""
        with self._lock:
            self._fruitless += 1
            if self._fruitless > _FRUITLESS_ROUNDS * self._shards + FIRST:
                raise DataError(
                    f"None of the {self._shards} shards of data.shards holds a sample; correct it."
                )
            return url not in self._bad

    def unreadable(self) -> None:
        """A shard could not be opened."""
        with self._lock:
            self.tally.rejected["shard_unreadable"] += 1

    def broken(self, url: str, samples: int, error: Exception) -> str:
        """Reading a shard failed after so many samples; returns the reason for which it counts."""
        told = in_a_line(error)
        with self._lock:
            if samples:
                self.tally.rejected["shard_cut_short"] += 1
                logger.warning("%s is cut short: %s", url, told)
                return "shard_cut_short"
            self._bad[url] = None
            self.tally.rejected["shard_unreadable"] += 1
            names = ", ".join(self._bad)
            if len(self._bad) > self._limit * self._shards:
                raise NotATar(
                    f"{names}: no tar archive ({told}), {len(self._bad)} of {self._shards} shards; remove "
                    f"what is none, or raise data.max_bad_shards={self._limit:g}."
                )
            logger.warning(
                "left out, %d of %d shards: %s is no tar archive", len(self._bad), self._shards, url
            )
            return "shard_unreadable"

    def columns(self, names: Iterable[str]) -> None:
        """A sample's record has these fields."""
        if not self._unseen:
            return
        with self._lock:
            self._seen.update(names)
            self._records += 1
            self._unseen -= self._seen
            if self._unseen and self._records >= FIRST:
                where = f"any of the first {self._records} samples"
                raise DataError(unknown_column(min(self._unseen), self._seen, where))

    def accepted(self) -> None:
        """A sample is served."""
        with self._lock:
            self._fruitless, self._accepted = 0, True

    def rejected(self, reason: str) -> None:
        """A sample is not, or a member of one."""
        with self._lock:
            self._fruitless = 0
            self.tally.rejected[reason] += 1
            if self.tally.lost >= FIRST:
                self._check_some_are_accepted()

    def waited(self) -> None:
        """No sample came for as long as there was patience: storage is not to blame where it gave some."""
        with self._lock:
            if self.tally.lost:
                self._check_some_are_accepted()

    def _check_some_are_accepted(self) -> None:
        if not self._accepted:
            _, _, why = self.tally.sentence().partition("; rejected: ")
            raise DataError(
                f"In data.order=resampled every sample was rejected: {why}. {remedy(self.tally.rejected)}."
            )


class StreamProgress:
    """Of one thread: which shard it is in, how many of its samples have come, and what was rejected between
    them."""

    def __init__(self, findings: StreamFindings) -> None:
        self._findings = findings
        self._url = ""
        self._samples = 0
        self._met: Counter[str] = Counter()
        """Since the last sample of the stream."""
        self._passed: Counter[str] = Counter()
        """Since the last one that was handed over, up to the one that is at hand."""

    def begin(self, url: str) -> None:
        """A shard was opened."""
        self._url, self._samples = url, 0

    def unreadable(self) -> None:
        """A shard could not be opened."""
        self._findings.unreadable()
        self._met["shard_unreadable"] += 1

    def broken(self, error: Exception, *, is_content: bool) -> None:
        """Reading the shard failed, by what it holds or by the storage. Raises NotATar."""
        reason = self._findings.broken(self._url, self._samples if is_content else 1, error)
        self._met[reason] += 1

    def rejected(self, reason: str) -> None:
        """A sample of the stream, or a member of one, is left out. Raises DataError."""
        self._findings.rejected(reason)
        self._met[reason] += 1

    def counted(self, samples: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """The samples as they come, with what was rejected before each."""
        for sample in samples:
            self._samples += 1
            before, self._met = self._met, Counter()
            yield {**sample, _REJECTED: before}

    def reached(self, sample: dict[str, Any]) -> None:
        """A sample has come through the shuffle."""
        self._passed += sample[_REJECTED]

    def passed(self, reason: str) -> None:
        """It is rejected after all. Raises DataError."""
        self._findings.rejected(reason)
        self._passed[reason] += 1

    def handed_over(self) -> Counter[str]:
        """It is served; returns what was rejected before."""
        before, self._passed = self._passed, Counter()
        return before
