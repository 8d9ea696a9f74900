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
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from types import TracebackType
from typing import Any

import numpy as np
import torch
import webdataset as wds

from data_pipeline.batch import Batch, Tally
from data_pipeline.config import DataConfig
from data_pipeline.errors import (
    AccessDenied,
    DataError,
    Failure,
    Rejected,
    StorageOutage,
)
from data_pipeline.feed.conditions import check_conditions, condition_arrays
from data_pipeline.feed.findings import StreamFindings, StreamProgress
from data_pipeline.feed.sample import Known, draw_crop, fill_sample, sample_arrays
from data_pipeline.feed.tar_stream import samples_of
from data_pipeline.order.draws import fold
from data_pipeline.order.lanes import Part, lanes_of
from data_pipeline.pictures.headers import picture_size
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
        self.tally = Tally()
        """Samples served and rejected, of this rank, since the loader was opened: what threads have rejected
        ahead of what is served counts when that is."""
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
            reading = StreamProgress(self._findings)
            samples = samples_of(
                self._opened(shards, reading),
                self._selection,
                broken=partial(self._skip, reading),
                reject=reading.rejected,
            )
            samples = reading.counted(samples)
            for sample in wds.shuffle(window, initial=min(window, 100), seed=seed)(samples):
                if self._stop.is_set():
                    return
                self._put(sample, reading)
        except BaseException as error:  # noqa: BLE001 - raised by __next__
            self._hand_over(error)

    def _opened(self, shards: Iterable[dict[str, Any]], reading: StreamProgress) -> Iterator[dict[str, Any]]:
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
                reading.unreadable()
                continue
            failing_since = None
            reading.begin(shard["url"])
            with stream:
                yield {**shard, "stream": stream}

    def _skip(self, reading: StreamProgress, error: Exception) -> None:
        """Go on with the next shard. Raises DataError where too many are no tars."""
        # Storage that fails in the middle says nothing about what the shard is.
        is_content = isinstance(error, (tarfile.TarError, EOFError, zlib.error, lzma.LZMAError, ValueError))
        reading.broken(error, is_content=is_content)

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

    def _put(self, sample: dict[str, Any], reading: StreamProgress) -> None:
        reading.reached(sample)
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
            reading.passed(error.reason)
            return
        self._findings.accepted()
        self._hand_over((row, caption, key, reading.handed_over()))

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
            name: torch.from_numpy(np.concatenate([row[name] for row, *_ in rows])) for name in rows[0][0]
        }
        tensors.pop("ordinals")
        slots = torch.arange(self._slots.start, self._slots.stop)
        ordinals = self._step * self._global + slots
        self._step += 1
        self.tally.served += self._size
        for *_, rejected in rows:
            self.tally.rejected += rejected
        return Batch(
            pixels=tensors.pop("pixels").permute(0, 3, 1, 2),
            captions=tuple(caption for _, caption, *_ in rows),
            conditions=tensors,
            keys=tuple(key for _, _, key, _ in rows),
            ordinals=ordinals,
            slots=slots,
            position={"format": 1, "order": "resampled", "step": self._step},
        )

    def _take(self) -> tuple[dict[str, Any], str, str, Counter[str]]:
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
