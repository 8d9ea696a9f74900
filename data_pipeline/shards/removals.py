"""Removal lists: files that name samples never to be served.

What is kept of a list is 8 bytes per identifier, sorted; what its file may look like is in `removal_entries`.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from data_pipeline.shards.removal_entries import Entries
from data_pipeline.storage.files import read_bytes
from data_pipeline.storage.urls import name_of

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RemovalList:
    """What one file names."""

    name: str
    """Last part of its URL, or all of it where two lists end alike."""
    hashes: NDArray[np.uint64]
    """Sorted `hash_identity` of its keys, URLs and digests."""
    entries: NDArray[np.uint32] | None = None
    """Number of the line, row or entry each hash is from, where that was asked for."""
    unit: str = "line"

    def matches(self, hashes: NDArray[np.uint64]) -> NDArray[np.bool_]:
        """Which of the hashes are on the list."""
        if not len(self.hashes):
            return np.zeros(hashes.shape, np.bool_)
        place = np.searchsorted(self.hashes, hashes)
        return np.asarray(self.hashes[np.minimum(place, len(self.hashes) - 1)] == hashes)


def read_removals(urls: Sequence[str], *, numbered: bool = False) -> tuple[RemovalList, ...]:
    """Read the lists and log what each holds; numbered: with the line of each hash.

    Raises DataError for what cannot be read with certainty.
    """
    last = Counter(name_of(url) for url in set(urls))
    lists = []
    for url in dict.fromkeys(urls):
        entries = Entries(url)
        entries.read(read_bytes(url))
        kinds = ", ".join(f"{count:,} {kind}" for kind, count in sorted(entries.kinds.items()))
        if kinds:
            logger.info("removal list %s holds %s", url, kinds)
        else:
            logger.warning("removal list %s holds no entry: nothing is removed by it", url)
        name = name_of(url) if last[name_of(url)] == 1 else url
        hashes = np.asarray(entries.hashes, np.uint64)
        if numbered:
            order = np.argsort(hashes)
            numbers = np.asarray(entries.numbers, np.uint32)
            lists.append(RemovalList(name, hashes[order], numbers[order], entries.unit))
        else:
            lists.append(RemovalList(name, np.unique(hashes)))
    return tuple(lists)
