"""Keeps what shards hold when they have been read for training, so that nobody has to read them for an index.

    a lane has come to the end of a shard that it began     index of the whole (`TarPieces.whole`), written as
                                                            `ldm data index` writes it, its row kept
    a minute later, then after two, four, ... an hour,      rows of this process as one part of the manifest,
    and when the loader is closed                           in place of the one before

So the first epoch of a run without an index leaves one behind. Who comes to a shard whose index file is there
keeps nothing of it. A process that is killed loses the rows of its last hour at most: these shards count as
not indexed, and `ldm data index` reads them again. Where nothing can be written, as in a bucket that one may
only read, all goes to a folder of the run instead, and the log says how later runs have it. What fails for
the moment is tried again: the index of a shard when it is read again, rows with the next ones.

What files beside a shard promise (`beside.py`) is compared with what it has when that is known: before it, no
lane has a use for a count, and afterwards the index says it.
"""

from __future__ import annotations

import bisect
import logging
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Sequence

from data_pipeline.errors import AccessDenied, Failure, ReadFailed, UserError
from data_pipeline.shards.beside import promised
from data_pipeline.shards.index import ShardIndex
from data_pipeline.shards.manifest import ManifestRow, append_rows, index_name, store_index
from data_pipeline.shards.pieces import TarPieces
from data_pipeline.storage.files import exists
from data_pipeline.storage.urls import join, name_of

logger = logging.getLogger(__name__)

_FIRST_S, _LONGEST_S = 60.0, 3600.0
_PART_ROWS = 1000
"""From which on a part is left as it is, for what is written again and again would be much."""
_ASKED = 8
_MAX_TOLD = 20


class Recorder:
    """What one process has to write about the shards that it has read; used by many threads.

    folders: of each source, the number of its first shard and the folder of its index.
    instead: folder for what may not be written there; "": none.
    """

    def __init__(self, folders: Sequence[tuple[int, str]], instead: str = "") -> None:
        self._folders, self._instead = folders, instead
        self._moved = False
        self._rows: defaultdict[str, list[ManifestRow]] = defaultdict(list)
        self._part: dict[str, tuple[str, list[ManifestRow]]] = {}
        """By folder the part that the next one includes and replaces: its name, its rows."""
        self._lock = threading.Lock()
        self._flushing = threading.Lock()
        self._pause_s = _FIRST_S
        self._written = time.monotonic()
        self._without = 0
        """Shards in a row beside which no file says how many samples they have."""
        self._told: set[str] = set()
        self._kept: set[int] = set()
        self.refused = not folders
        """Whether nothing is kept: there is no place for it."""

    def has(self, shard: int, url: str) -> bool:
        """Whether the index of a shard is there."""
        if self.refused:
            return False
        try:
            return any(_is_there(place) for place in self.places(shard, url))
        except UserError as error:
            self._refuse(error)
        except Failure as error:  # for the moment
            logger.debug("%s", error)
        return False

    def places(self, shard: int, url: str) -> list[str]:
        """Where the index of a shard may lie."""
        if not self._folders:
            return []
        folders = dict.fromkeys(filter(None, (self._folder(shard), self._instead)))
        return [join(folder, index_name(url)) for folder in folders]

    def keep(self, shard: int, pieces: TarPieces) -> None:
        """Write the index of a shard that has been read to its end, if it was from its beginning."""
        if self.refused:
            return
        try:
            index = pieces.whole()
        except Failure as error:  # of the shard, or the parquet beside it, which whoever indexes it is told
            logger.debug("%s is not kept: %s", pieces.shard.url, error)
            return
        if index is None:
            return
        with self._lock:  # small sets come round again before the index of the first visit is written
            if shard in self._kept:
                return
            self._kept.add(shard)
        try:
            kept = self._stored(self._folder(shard), index)
        except UserError as error:
            self._refuse(error)
            return
        except Failure as error:
            logger.debug("%s is not kept this time: %s", pieces.shard.url, error)
            with self._lock:
                self._kept.discard(shard)
            return
        with self._lock:
            self._rows[kept[0]].append(kept[1])
            due = time.monotonic() - self._written > self._pause_s
            if due:
                self._pause_s = min(2 * self._pause_s, _LONGEST_S)
                self._written = time.monotonic()
        if due:
            self.flush()

    def difference(self, url: str, samples: int, read: Callable[[str], bytes | None]) -> str:
        """What files beside a shard promise, where that is not what it has; "": there is nothing to tell.

        read: gives the file at a URL, None where there is none; after some shards without, asked no more
        """
        if not self._folders or self._without >= _ASKED:
            return ""
        try:
            found = promised(url, read)
        except (Failure, ReadFailed) as error:  # which training meets as well, if it needs the storage
            logger.debug("what is promised of %s: %s", url, error)
            found = None
        with self._lock:
            self._without = 0 if found is not None else self._without + 1
        if found is None or found[0] == samples:
            return ""
        sentence = f"{name_of(found[1])} promises {found[0]:,} samples, the tar has {samples:,}"
        with self._lock:
            if url in self._told:
                return ""
            self._told.add(url)
            told = len(self._told)
        if told <= _MAX_TOLD:
            logger.warning(
                "%s: %s%s", url, sentence, " (further ones are not told)" if told == _MAX_TOLD else ""
            )
        return sentence

    def flush(self) -> None:
        """Write the rows that are kept; those that cannot be written now are kept on."""
        with self._flushing:
            with self._lock:
                waiting, self._rows = self._rows, defaultdict(list)
                self._written = time.monotonic()
            for folder, rows in waiting.items():
                try:
                    self._append(folder, rows)
                except Failure as error:
                    with self._lock:
                        self._rows[folder] = rows + self._rows[folder]
                        self._pause_s = _FIRST_S
                    if isinstance(error, UserError):
                        self._refuse(error)
                    else:
                        logger.warning("%d rows are not in the index yet: %s", len(rows), error)

    def _append(self, folder: str, rows: Sequence[ManifestRow]) -> None:
        """Write rows with those of this process's last part, so that there is one of each process."""
        part, before = self._part.get(folder, ("", []))
        whole = [*before, *rows]
        part = append_rows(folder, whole, instead_of=part)
        self._part[folder] = (part, whole) if len(whole) < _PART_ROWS else ("", [])

    def _stored(self, folder: str, index: ShardIndex) -> tuple[str, ManifestRow]:
        """The folder that an index is in, and its row. Raises UserError where neither takes it."""
        try:
            return folder, store_index(folder, index)
        except UserError as error:
            if not self._instead or folder == self._instead:
                raise
            row = store_index(self._instead, index)
            if not self._moved:
                self._moved = True
                logger.warning(
                    "what shards hold is kept in %s, since %s; later runs have it with data.index=%s",
                    self._instead,
                    error,
                    self._instead,
                )
            return self._instead, row

    def _folder(self, shard: int) -> str:
        if self._moved:
            return self._instead
        return self._folders[bisect.bisect_right(self._folders, shard, key=lambda each: each[0]) - 1][1]

    def _refuse(self, why: Failure) -> None:
        if not self.refused:
            self.refused = True
            logger.warning(
                "what shards hold is not kept for an index: %s data.index names another folder.", why
            )


def _is_there(url: str) -> bool:
    """Whether a file is there; what S3 refuses to tell of is not, as in a bucket that one may not list."""
    try:
        return exists(url)
    except AccessDenied:
        return False
