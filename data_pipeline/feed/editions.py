"""Shards that are not the files that were indexed: stored again as they were, or replaced by others.

A copy of a set on another machine, a `touch`, an upload in parts of another size change the time or the ETag
and nothing else. So a shard of the indexed size is indexed again, in memory: the same index, and its reads go
on under the new time or ETag; another one, and its samples are left out, since offsets and the number of
samples, from which the order of the whole run follows, hold no longer.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import threading
from collections import defaultdict

from data_pipeline.errors import DataError, Failure, ReadFailed, Replaced
from data_pipeline.shards.dataset import Dataset
from data_pipeline.shards.read_index import read_index
from data_pipeline.storage.editions import Edition
from data_pipeline.storage.listing import look_up

logger = logging.getLogger(__name__)

_MAX_TOLD = 20
REINDEX = "run `ldm data index` on the set once, then start the run again"
"""What takes in shards with as many samples as before; of a run, nothing takes in others."""


class ShardEditions:
    """What the reads of each shard expect; one per process, for many threads."""

    def __init__(self, dataset: Dataset) -> None:
        self._dataset = dataset
        self._told = 0
        self._renewed: dict[int, Edition] = {}
        self._replaced: dict[int, str] = {}
        self._locks: defaultdict[int, threading.Lock] = defaultdict(threading.Lock)

    def expected(self, shard: int) -> Edition:
        """The indexed edition, or the one found to hold the same. Raises Replaced where none does."""
        if shard in self._replaced:
            raise Replaced(self._replaced[shard])
        return self._renewed.get(shard) or self._indexed(shard)

    def renew(self, shard: int, met: Edition, why: Replaced) -> Edition:
        """The edition to expect instead of `met`, which the shard is not any longer.

        Raises:
            Replaced: the shard has other samples; told once in the log.
            ReadFailed: it cannot be read just now.
        """
        with self._locks[shard]:
            if self.expected(shard) != met:  # another thread was quicker
                return self.expected(shard)
            try:
                found = self._with_the_same_samples(shard)
            except DataError:
                found = None  # gone, or no tar
            except Failure as error:
                raise ReadFailed(str(error)) from error
            if found is None:
                self._replaced[shard] = str(why)
                self._tell(
                    f"{why}; its samples are left out. With as many as before they are served from the next "
                    f"start on ({REINDEX}), else in new runs, or under a new name behind those of the set"
                )
                raise why
            self._renewed[shard] = found
            url = self._dataset.urls[shard]
            self._tell(f"{url} was stored again with the same samples; `ldm data index` takes note of it")
            return found

    def _tell(self, what: str) -> None:
        """A line for each shard, until it is clear that there are many."""
        self._told += 1
        if self._told <= _MAX_TOLD:
            logger.warning("%s%s", what, " (further ones are not told)" if self._told == _MAX_TOLD else "")

    def _indexed(self, shard: int) -> Edition:
        return Edition(self._dataset.sizes[shard], self._dataset.versions[shard])

    def _with_the_same_samples(self, shard: int) -> Edition | None:
        listed = look_up(self._dataset.urls[shard])
        if listed.size != self._dataset.sizes[shard]:
            return None
        index = dataclasses.replace(read_index(listed), version=self._dataset.versions[shard])
        # Whatever lies beside it by now; and by this version, or an earlier one.
        noted = dict.fromkeys((self._dataset.beside[shard], ""))
        told = [(streamed, beside) for streamed in (index.as_streamed, None) for beside in noted]
        written = (dataclasses.replace(index, as_streamed=s, beside=b) for s, b in told)
        digests = (hashlib.sha256(each.encode()).hexdigest() for each in written)
        return Edition(listed.size, listed.version) if self._dataset.checksums[shard] in digests else None
