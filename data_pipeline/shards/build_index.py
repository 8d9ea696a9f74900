"""Builds the index of a shard set: in parallel, resumable, only what is new or changed.

    list of shards --- size and ETag as in the manifest, the parquet's too? ---> its row is kept
          |  no
          v                          (one task per shard, in processes or threads)
    index_one     read_index         the shard (read_index.py)
                  writes <name>.npz, returns its manifest row
          |
          v
    append_rows                      every 30 s: what is written need not be read again
    merge_parts                      at the end (manifest.py)

Only a few tasks are under way at a time, and only the rows since the last part wait to be written, so a set
of a million shards takes no more memory than its manifest. An index file that no manifest names, left by a
build that was killed, is overwritten by the next.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import (
    FIRST_COMPLETED,
    Executor,
    Future,
    ProcessPoolExecutor,
    ThreadPoolExecutor,
    wait,
)
from dataclasses import dataclass, replace
from itertools import islice
from multiprocessing import get_context

from data_pipeline.errors import AccessDenied, NotATar
from data_pipeline.shards.beside import NO_PARQUET, edition_text, has_changed, is_key, parquet_of
from data_pipeline.shards.manifest import (
    ManifestRow,
    append_rows,
    bad_row,
    has_many,
    merge_parts,
    read_parts,
    store_index,
    succeeding,
    without_file,
)
from data_pipeline.shards.read_index import read_index
from data_pipeline.storage.files import open_stream
from data_pipeline.storage.listing import ListedFile, list_folder
from data_pipeline.storage.urls import is_http, name_of, parent

_SAVE_EVERY_S = 30.0
_SPEAK_EVERY_S = 1.0
_THREADS = 4
_READERS = 16
_QUEUED = 4
"""Shards that are handed to each worker ahead."""
_PROBED = 3
"""Shards that are indexed first and one by one, to see what the others will take."""
_WORTH_IT = 16
"""Shards from which on it is told in advance what they will take."""


@dataclass(frozen=True)
class Estimate:
    """What the index of a set will take, by some of its shards, which are indexed by now."""

    shards: int
    """That are still to be read."""
    workers: int
    requests: float
    """Per shard, as the other figures."""
    bytes: float
    wall_s: float
    cpu_s: float

    @property
    def seconds(self) -> float:
        """Of the whole build: what is waited for is shared by the workers, computing by the processors."""
        cores = min(self.workers, len(os.sched_getaffinity(0)))
        return self.shards * max(self.wall_s / self.workers, self.cpu_s / cores)

    def sentence(self) -> str:
        """The same in words."""
        return (
            f"a shard takes {self.bytes / 1e6:,.1f} MB in {self.requests:,.0f} requests and "
            f"{self.wall_s:.1f} s; {self.shards:,} are left: {self.shards * self.bytes / 1e9:,.1f} GB in "
            f"{self.shards * self.requests:,.0f} requests, about {_duration(self.seconds)} with "
            f"{self.workers} workers"
        )


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    if minutes == 0:
        return f"{seconds:.0f} s"
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min"


@dataclass(frozen=True)
class IndexReport:
    """Outcome of one `build_index`."""

    rows: dict[str, ManifestRow]
    """Manifest rows of the asked shards."""
    read: int
    """Shards that had to be read."""
    failed: dict[str, ManifestRow]
    """Rows of shards that could not be indexed, whose only problem is the reason."""
    other_parquets: int = 0
    """Shards beside which lies another parquet than their index is of, which was not to be restored."""


def build_index(
    shards: Sequence[ListedFile],
    folder: str,
    *,
    workers: int = 0,
    progress: Callable[[int, int], object] = lambda done, total: None,
    announce: Callable[[Estimate], object] = lambda estimate: None,
    timeout_s: float = 30.0,
    tries: int = 8,
    restore: bool = False,
) -> IndexReport:
    """Index what is new or changed and write the manifest to `folder`.

    Rows are saved every 30 s, so an interrupted build goes on where it was. A shard that is no tar is
    reported in `failed`, not raised; the manifest remembers it, and the next build reads it again.

    Args:
        workers: processes; 0 uses threads of this one.
        progress: called with the shards that are done and their number, about once a second also while none
            is finished.
        announce: called once, before most of many shards are read, with what they will take.
        restore: read shards, too, whose index file is gone (a damaged one is deleted to be made anew), or
            beside which another parquet has come. Their index files change, which a run that has begun with
            them notices; so it is a person's to ask for.
    """
    known, parts = read_parts(folder)
    gone = without_file(folder, known) if restore else set()
    stale = [s for s in shards if not is_current(s, known.get(s.url)) or known[s.url].is_bad or s.url in gone]
    parquets = _parquets_beside(shards, known, timeout_s)
    others = {url for url, now in parquets.items() if has_changed(known[url].beside, now)}
    unsaved: dict[str, ManifestRow] = {}
    if restore:
        lacking, unsaved = _note(known, parquets)
        known |= unsaved
        again = {s.url for s in stale} | others | lacking
        stale = [s for s in shards if s.url in again]
    failed: dict[str, ManifestRow] = {}
    began, done, saved = time.time(), len(shards) - len(stale), time.monotonic()
    progress(done, len(shards))
    for outcome in _index_all(stale, _ScanSettings(folder, timeout_s, tries), workers, announce):
        if outcome is not None:
            shard, row = outcome
            row = succeeding(row, known.get(shard.url), began)
            known[shard.url] = unsaved[shard.url] = row
            done += 1
            if row.is_bad:
                failed[shard.url] = row
        progress(done, len(shards))
        if unsaved and time.monotonic() - saved > _SAVE_EVERY_S:
            append_rows(folder, unsaved.values())
            unsaved, saved = {}, time.monotonic()
    if unsaved:
        append_rows(folder, unsaved.values())
    if stale or unsaved or (restore and has_many(parts)):
        whole, parts = read_parts(folder)  # others have written meanwhile
        merge_parts(folder, whole | unsaved, parts)
    rows = {s.url: known[s.url] for s in shards if not known[s.url].is_bad}
    return IndexReport(rows, len(stale), failed, 0 if restore else len(others))


def is_current(shard: ListedFile, row: ManifestRow | None) -> bool:
    """Whether a row is of the shard as it is listed now."""
    return row is not None and row.size == shard.size and row.version == shard.version


def _parquets_beside(
    shards: Sequence[ListedFile], known: Mapping[str, ManifestRow], timeout_s: float
) -> dict[str, str]:
    """`edition_text` of the parquet beside each shard that has a row; "" where it is not known.

    One listing of each folder, where that is possible.
    """
    urls = [s.url for s in shards if s.url in known and not known[s.url].is_bad]
    folders = {folder: _parquets_in(folder, timeout_s) for folder in {parent(url) for url in urls}}
    return {url: _edition_in(folders[parent(url)], url) for url in urls}


def _note(
    known: Mapping[str, ManifestRow], parquets: Mapping[str, str]
) -> tuple[set[str], dict[str, ManifestRow]]:
    """Of rows that earlier versions have left without a note of their parquet: the shards of those that lack
    a column of it, and the others with the note.
    """
    unknown = [url for url, now in parquets.items() if not known[url].beside and now not in ("", NO_PARQUET)]
    with ThreadPoolExecutor(_READERS) as pool:
        shown = dict(zip(unknown, pool.map(lambda url: _shows_parquet(known[url]), unknown), strict=True))
    lacking = {url for url, shows in shown.items() if shows is False}
    return lacking, {url: replace(known[url], beside=parquets[url]) for url, shows in shown.items() if shows}


def _parquets_in(folder: str, timeout_s: float) -> dict[str, ListedFile] | None:
    """The parquets of a folder by name; None where nobody can list it."""
    if is_http(folder):
        return None
    try:
        listed = list_folder(folder, timeout_s=timeout_s)
    except AccessDenied:  # who may read may not always list
        return None
    return {name: file for name, file in listed.items() if name.endswith(".parquet")}


def _edition_in(folder: Mapping[str, ListedFile] | None, shard: str) -> str:
    """`edition_text` of the parquet beside a shard; "" where that is not known."""
    return "" if folder is None else edition_text(folder.get(name_of(parquet_of(shard))))


def _shows_parquet(row: ManifestRow) -> bool | None:
    """Whether a row has the columns of the parquet beside its shard, so that it has been read; None where the
    parquet is not to be had now.
    """
    import pyarrow as pa  # half a second, for those who need it
    import pyarrow.parquet as pq

    try:
        with open_stream(parquet_of(row.shard)) as file:
            names = {str(name) for name in pq.read_schema(file).names}
    except pa.ArrowInvalid:  # whoever indexes the shard says that it is damaged
        return False
    except Exception:  # noqa: BLE001 - storage's errors, which say nothing of the file
        return None
    return {name for name in names if not is_key(name)} <= row.columns.keys()


@dataclass(frozen=True)
class _ScanSettings:
    """Where index files go, and how shards are read."""

    folder: str
    timeout_s: float
    tries: int


def _index_all(
    shards: Sequence[ListedFile], how: _ScanSettings, workers: int, announce: Callable[[Estimate], object]
) -> Iterator[tuple[ListedFile, ManifestRow] | None]:
    """Shards with their rows as they are done; None about once a second while none is."""
    first = _probed(len(shards)) if len(shards) >= _WORTH_IT else []
    counts, began, computing = Counter[str](), time.monotonic(), time.process_time()
    for at in first:
        yield shards[at], _row(shards[at], how, counts)
    if first:
        figures = (counts["requests"], counts["bytes"], time.monotonic() - began)
        means = [figure / len(first) for figure in (*figures, time.process_time() - computing)]
        announce(Estimate(len(shards) - len(first), workers or _THREADS, *means))
    pool: Executor
    if workers > 0:
        pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn"))
    else:
        pool = ThreadPoolExecutor(_THREADS)
    others = (shard for at, shard in enumerate(shards) if at not in first)
    with pool:
        running: dict[Future[ManifestRow], ListedFile] = {}
        try:
            while True:
                for shard in islice(others, _QUEUED * (workers or _THREADS) - len(running)):
                    running[pool.submit(_row, shard, how)] = shard
                if not running:
                    return
                ready = wait(running, timeout=_SPEAK_EVERY_S, return_when=FIRST_COMPLETED).done
                if not ready:
                    yield None
                for future in ready:
                    yield running.pop(future), future.result()
        finally:
            for future in running:
                future.cancel()


def _probed(shards: int) -> list[int]:
    """Places of a few shards, from all over."""
    return [(2 * i + 1) * shards // (2 * _PROBED) for i in range(_PROBED)]


def _row(shard: ListedFile, how: _ScanSettings, counts: Counter[str] | None = None) -> ManifestRow:
    """Row of a shard, that of one that is no tar too."""
    try:
        return index_one(shard, how.folder, how.timeout_s, how.tries, counts)
    except NotATar as error:
        return bad_row(shard.url, shard.size, shard.version, str(error))


def index_one(
    shard: ListedFile,
    folder: str,
    timeout_s: float = 30.0,
    tries: int = 8,
    counts: Counter[str] | None = None,
) -> ManifestRow:
    """Read one shard and write its index file. Raises NotATar or another DataError."""
    return store_index(folder, read_index(shard, timeout_s=timeout_s, tries=tries, counts=counts))
