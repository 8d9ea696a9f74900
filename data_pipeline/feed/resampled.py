"""data.order=resampled: plain webdataset streaming of resampled shards, for tars that cannot be indexed."""

from __future__ import annotations

import logging
import lzma
import queue
import tarfile
import threading
import time
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from types import TracebackType
from typing import Any

import numpy as np
import torch
import webdataset as wds

from data_pipeline.batch import FIRST, Batch, Tally, remedy
from data_pipeline.config import DataConfig
from data_pipeline.errors import (
    AccessDenied,
    DataError,
    Failure,
    NotATar,
    Rejected,
    StorageOutage,
    in_a_line,
)
from data_pipeline.feed.conditions import check_conditions, condition_arrays
from data_pipeline.feed.sample import Known, draw_crop, fill_sample, sample_arrays
from data_pipeline.feed.tar_stream import samples_of
from data_pipeline.order.draws import fold
from data_pipeline.order.lanes import Part, lanes_of
from data_pipeline.pictures.headers import picture_size
from data_pipeline.shards.filter_columns import unknown_column
from data_pipeline.shards.filter_values import as_column, to_numbers
from data_pipeline.shards.filters import Filter
from data_pipeline.shards.identities import hash_text
from data_pipeline.shards.index import ORIGINAL, PICTURE
from data_pipeline.shards.records import parse_record
from data_pipeline.shards.removals import read_removals
from data_pipeline.shards.selection import identities_in, make_selection, picture_members, removed_by
from data_pipeline.shards.sources import configs_of, shares_of, sources_of
from data_pipeline.shards.split import REASONS, is_held_out
from data_pipeline.storage.files import open_stream
from data_pipeline.storage.listing import list_files
from data_pipeline.storage.urls import distinguishing_depth, shard_name

logger = logging.getLogger(__name__)

_TAKE_S = 1.0
_FRUITLESS_ROUNDS = 3
"""Times that as many shards as there are may be opened in a row without a single sample in them."""


class _ShardProgress:
    """Which shard a thread is in, and how many of its samples have come."""

    url = ""
    samples = 0

    def counted(self, samples: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """The samples as they come."""
        for sample in samples:
            self.samples += 1
            yield sample


def original_size(record: Mapping[str, Any]) -> tuple[int, int] | None:
    """Height and width before the picture was stored, if its json says so: `ShardIndex.original_sizes`."""
    values = np.empty(len(ORIGINAL), dtype=object)
    values[:] = [record.get(name) for name in ORIGINAL]
    height, width = to_numbers(as_column(values)).values.tolist()
    usable = all(1 <= edge < 1 << 31 for edge in (height, width))
    return (int(height), int(width)) if usable else None


class ResampledLoader(Iterator[Batch]):
    """Endless batches of one rank; shards are drawn with replacement, so resume is approximate.

    What is kept: the number of samples seen seeds the next start, so a resumed run does not repeat the
    beginning. What is not: exactly-once, an order that is free of the world size, the ledger.
    """

    def __init__(
        self,
        config: DataConfig,
        *,
        seed: int,
        global_batch_size: int,
        part: Part,
        position: dict[str, Any] | None = None,
    ) -> None:
        check_conditions(config)
        if config.buckets:
            raise DataError("data.buckets needs data.order=indexed.")
        if shares_of(config) or any(each != config for each in configs_of(config)):
            raise DataError(
                "data.order=resampled reads all sources alike and knows repeat alone; set data.order=indexed "
                "(or streamed), or remove what data.sources have besides shards and repeat."
            )
        self._slots = lanes_of(part, global_batch_size, global_batch_size)
        if not self._slots:
            raise DataError(
                f"global_batch_size={global_batch_size} has no sample for each of {part.ranks} ranks."
            )
        logger.warning("data.order=resampled: shards are drawn with replacement and resume is approximate")
        self._config = config
        self._urls = [
            shard.url
            for source in sources_of(config)
            for shard in list_files(source.shards, timeout_s=config.request_timeout_s)
            for _ in range(source.repeat)
        ]
        self._name_depth = distinguishing_depth(self._urls)
        edge = config.image_size
        self._arrays = sample_arrays(edge, edge) | condition_arrays(config, edge, edge)
        self._seed, self._rank = seed, part.rank
        self._size = len(self._slots)
        self._global = global_batch_size
        self._step = int(position["step"]) if position else 0
        self._filter = Filter(config.filter)
        self._findings = StreamFindings(config, self._urls, self._filter.columns)
        self._removals = read_removals(config.removal_lists)
        self._selection = make_selection(config, self._removals)
        self.tally = self._findings.tally
        """Samples served and rejected, of this rank, since the loader was opened."""
        self.counts: Counter[str] = Counter()
        self.wait_s = 0.0
        self._stop = threading.Event()
        self._queue: queue.Queue[Any] = queue.Queue(maxsize=max(2, config.prefetch) * self._size)
        self._threads = [
            threading.Thread(target=self._run, args=(i, max(1, config.workers), self._step), daemon=True)
            for i in range(max(1, config.workers))
        ]
        for thread in self._threads:
            thread.start()

    @property
    def rejected(self) -> Counter[str]:
        """Rejected samples by reason; shard_* count shards."""
        return self.tally.rejected

    def _run(self, worker: int, workers: int, step: int) -> None:
        seed = fold(self._seed, self._rank, worker, workers, step)
        try:
            window = max(2, self._config.shuffle_window or 1000)
            shards = wds.ResampledShards(
                self._urls, seed=seed, worker_seed=lambda: worker, deterministic=True
            )
            reading = _ShardProgress()
            samples = samples_of(
                self._opened(shards, reading),
                self._selection,
                broken=partial(self._skip, reading),
                reject=self._findings.rejected,
            )
            samples = reading.counted(samples)
            for sample in wds.shuffle(window, initial=min(window, 100), seed=seed)(samples):
                if self._stop.is_set():
                    return
                self._put(sample)
        except BaseException as error:  # noqa: BLE001 - raised by __next__
            self._hand_over(error)

    def _opened(self, shards: Iterable[dict[str, Any]], reading: _ShardProgress) -> Iterator[dict[str, Any]]:
        """Open shards; an outage is tried for `patience_s`."""
        failing_since: float | None = None
        for shard in shards:
            if self._stop.is_set():
                return
            if not self._findings.opening(shard["url"]):
                continue
            try:
                stream = open_stream(shard["url"], timeout_s=self._config.request_timeout_s)
            except AccessDenied:
                raise
            except Failure as error:
                failing_since = failing_since or time.monotonic()
                if time.monotonic() - failing_since > self._config.patience_s:
                    raise StorageOutage(
                        f"{error} Nothing could be read for {self._config.patience_s:.0f} s."
                    ) from error
                self._findings.unreadable()
                continue
            failing_since = None
            reading.url, reading.samples = shard["url"], 0
            with stream:
                yield {**shard, "stream": stream}

    def _skip(self, reading: _ShardProgress, error: Exception) -> None:
        """Go on with the next shard. Raises DataError where too many are no tars."""
        # Storage that fails in the middle says nothing about what the shard is.
        is_content = isinstance(error, (tarfile.TarError, EOFError, zlib.error, lzma.LZMAError, ValueError))
        self._findings.broken(reading.url, reading.samples if is_content else 1, error)

    def _late(self, members: dict[str, bytes], record: Mapping[str, Any]) -> Filter | None:
        """The filter for one sample; raises DataError when records keep coming without one of its columns.

        No index tells the columns here, so the records do. picture_* are what an index would read.
        """
        if not self._filter.clauses:
            return None
        picture: dict[str, int | None] = dict.fromkeys(PICTURE)
        if self._filter.columns & picture.keys():
            head = next((members[e] for e in picture_members(self._config) if e in members), b"")
            picture = dict(zip(PICTURE, picture_size(head) or (None, None), strict=True))
        self._findings.columns({*record, *picture})
        return self._filter.given(picture)

    def _put(self, sample: dict[str, Any]) -> None:
        members = {k: v for k, v in sample.items() if isinstance(v, bytes)}
        edge = self._config.image_size
        row = {name: np.zeros((1, *shape), kind) for name, (kind, shape) in self._arrays.items()}
        record = parse_record(members.get("json")) or {}
        own_key, url = str(sample["__key__"]), str(sample.get("__url__", ""))
        key = f"{shard_name(url, self._name_depth)}/{own_key}"
        try:
            if why := removed_by(self._removals, own_key, url, identities_in(record)):
                raise Rejected(why)
            if is_held_out(own_key, self._config.validation.share):
                raise Rejected(REASONS["training"])
            ordinal = fold(self._step, hash_text(key)) >> 1
            place = draw_crop(self._config, own_key, 0, seed=self._seed, ordinal=ordinal)
            caption, _ = fill_sample(
                self._config,
                members,
                # a stream has no parquet beside it
                Known(self._late(members, record), original_size(record)),
                target=(edge, edge),
                draws=(self._seed, ordinal, place),
                out=row,
                row=0,
            )
        except Rejected as error:
            self._findings.rejected(error.reason)
            return
        self._findings.accepted()
        self._hand_over((row, caption, key))

    def _hand_over(self, item: Any) -> None:
        while not self._stop.is_set():
            try:
                self._queue.put(item, timeout=_TAKE_S)
                return
            except queue.Full:
                continue

    def __next__(self) -> Batch:
        began = time.monotonic()
        rows = [self._take() for _ in range(self._size)]
        self.wait_s += time.monotonic() - began
        tensors = {
            name: torch.from_numpy(np.concatenate([row[name] for row, _, _ in rows])) for name in rows[0][0]
        }
        tensors.pop("ordinals")
        slots = torch.arange(self._slots.start, self._slots.stop)
        ordinals = self._step * self._global + slots
        self._step += 1
        self.tally.served += self._size
        return Batch(
            pixels=tensors.pop("pixels").permute(0, 3, 1, 2),
            captions=tuple(caption for _, caption, _ in rows),
            conditions=tensors,
            keys=tuple(key for _, _, key in rows),
            ordinals=ordinals,
            slots=slots,
            position={"format": 1, "order": "resampled", "step": self._step},
        )

    def _take(self) -> tuple[dict[str, Any], str, str]:
        deadline = time.monotonic() + self._config.patience_s + self._config.request_timeout_s
        while True:
            try:
                item = self._queue.get(timeout=_TAKE_S)
            except queue.Empty:
                if time.monotonic() > deadline:
                    self._findings.waited()
                    raise StorageOutage(
                        "No sample arrived within data.patience_s; check the storage."
                    ) from None
                continue
            if isinstance(item, BaseException):
                raise item
            return item

    def close(self) -> None:
        """Stop the threads."""
        self._stop.set()

    def __enter__(self) -> ResampledLoader:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


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

    def broken(self, url: str, samples: int, error: Exception) -> None:
        """Reading a shard failed after so many samples."""
        told = in_a_line(error)
        with self._lock:
            if samples:
                self.tally.rejected["shard_cut_short"] += 1
                logger.warning("%s is cut short: %s", url, told)
                return
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
