"""Which held-out samples a run is measured on: chosen once per start, by rank 0, which tells the others.

shards in the order of a hash of their names     c  a  f  b  ...     as many indexes as it takes
what the index accepts of the validation side    c7 c9 | a3 | f1 f8 f9 | ...
of these the `count` with the smallest hashes    a3 c9 f8 ...        the same for every run on these shards
"""

from __future__ import annotations

import dataclasses
import logging
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from data_pipeline.config import DataConfig
from data_pipeline.errors import DataError, NoIndex
from data_pipeline.order.buckets import Buckets
from data_pipeline.shards.dataset import Dataset
from data_pipeline.shards.identities import hash_text
from data_pipeline.shards.opening import Progress, open_dataset, untold
from data_pipeline.shards.removals import read_removals
from data_pipeline.shards.selection import Selection, make_selection, removed_by, target_shapes
from data_pipeline.shards.sources import configs_of, sources_of
from data_pipeline.shards.split import places
from data_pipeline.shards.view import ShardView, ShardViews
from data_pipeline.storage.listing import list_files
from data_pipeline.storage.ranges import RangeReader
from data_pipeline.storage.urls import is_local, local_path, name_of

logger = logging.getLogger(__name__)

_LEAST_SHARDS = 64
"""Indexes that are looked at even if fewer hold enough samples: neighbours of one shard are alike."""
_MOST_SHARDS = 4096
"""Indexes that are looked at even if they do not: rank 0 reads them at every start."""
_READERS = 16
_ANY = (1 << 64) - 1
"""No hash of a key is larger."""


@dataclass(frozen=True)
class HeldOutSample:
    """One sample, and all that is known about it without reading it."""

    shard: int
    """Place in the data set of the choice."""
    key: str
    """As `Dataset.sample_key` spells it."""
    ordinal: int
    """Identity, by which everything about the sample is drawn; never that of a visit of training."""
    weight: float
    """How often an epoch of training has the samples of its source; where sources have weights, so much that
    those of a source weigh together what it weighs."""
    shape: tuple[int, int]
    """(height, width) of its batch."""
    extents: tuple[tuple[str, int, int], ...]
    """(extension, first byte, past the last) of the members that are read."""
    original: tuple[int, int] | None
    beside: dict[str, Any]
    late: tuple[str, ...]
    """Clauses of the filter that its json must still satisfy."""
    late_values: dict[str, Any]
    """Columns of those that the index has."""


@dataclass(frozen=True)
class HeldOut:
    """The samples that are measured, the same on every rank; small, and plain enough to be sent."""

    config: DataConfig
    """How they are read."""
    dataset: Dataset
    """Their shards alone."""
    samples: tuple[HeldOutSample, ...]
    """By shape, then by the hash of their keys."""

    @cached_property
    def configs(self) -> tuple[DataConfig, ...]:
        """How those of each source are read."""
        return configs_of(self.config)

    def __len__(self) -> int:
        return len(self.samples)

    def batches(self, size: int) -> list[tuple[int, ...]]:
        """Samples of each batch of `size`, all of one shape; the last of a shape repeats its own."""
        found = []
        for shape in sorted({sample.shape for sample in self.samples}):
            mine = [i for i, sample in enumerate(self.samples) if sample.shape == shape]
            for first in range(0, len(mine), size):
                part = mine[first : first + size]
                found.append(tuple(part[i % len(part)] for i in range(size)))
        return found


def open_held_out(
    config: DataConfig,
    samples: int,
    *,
    seed: int,
    global_batch_size: int,
    dataset: Dataset | None = None,
    progress: Progress = untold,
) -> HeldOut:
    """Choose `samples` of data.validation, or all that there are.

    Args:
        seed, global_batch_size: of the run, which its buckets follow from.
        dataset: the training shards, if they are open.
        progress: see `open_dataset`.

    Raises:
        DataError: nothing is held out, a shard is in both sets, or what is named cannot be used.
    """
    own = config.validation
    if bool(own.shards) == bool(own.share):
        raise DataError(
            "Set exactly one of data.validation.shards and data.validation.share, e.g. "
            "data.validation.share=0.01."
        )
    reading = _reading(config)
    known = dataset is not None and not own.shards and not dataset.unindexed
    found = dataset if dataset is not None and known else _indexed(config, reading, progress)
    if own.shards:
        _check_apart(config, dataset, found)
    selections = [make_selection(each, removals=(), part="validation") for each in configs_of(reading)]
    shapes = target_shapes(config)
    if config.buckets:
        dataset = dataset or open_dataset(config, progress=progress)
        order = dataset.order(config, seed=seed, global_batch_size=global_batch_size)
        shapes = dataset.buckets(config, order).shapes
    chosen, of, reasons = _choose(reading, found, selections, samples, shapes)
    if not chosen:
        listed = ", ".join(f"{reason} ({count:,})" for reason, count in reasons.most_common(4))
        what = "loosen data.validation.filter" if own.shards else "raise data.validation.share"
        raise DataError(
            f"No sample is left to measure on of {sum(reasons.values()):,}, rejected: {listed}; {what}."
        )
    if len(chosen) < samples:
        logger.warning(
            "validation: %d samples are asked for, and the %d shards looked at hold %d out",
            samples,
            of,
            len(chosen),
        )
    return _only_theirs(reading, found, _weighted(found, chosen))


def _weighted(dataset: Dataset, chosen: list[HeldOutSample]) -> list[HeldOutSample]:
    """With the weights of their sources, where these have some."""
    if not dataset.shares:
        return chosen
    sources = [int(dataset.source_of[sample.shard]) for sample in chosen]
    each = [
        share * len(chosen) / max(1, sources.count(source)) for source, share in enumerate(dataset.shares)
    ]
    pairs = zip(chosen, sources, strict=True)
    return [dataclasses.replace(sample, weight=each[source]) for sample, source in pairs]


def _reading(config: DataConfig) -> DataConfig:
    """How held-out samples are read: as in training, without what is drawn anew at each visit."""
    own = config.validation
    sources = [
        dataclasses.replace(
            source,
            filter=source.filter if own.filter is None else None,
            crop=None,
            horizontal_flip=None,
        )
        for source in config.sources
    ]
    return dataclasses.replace(
        config,
        shards=own.shards or config.shards,
        sources=() if own.shards else tuple(sources),
        filter=config.filter if own.filter is None else own.filter,
        order="indexed",
        crop="center",
        horizontal_flip=False,
        reject_file=None,
        workers=0,
    )


def _indexed(config: DataConfig, reading: DataConfig, progress: Progress) -> Dataset:
    """The shards that held-out samples lie in."""
    try:
        return open_dataset(dataclasses.replace(reading, buckets=False), progress=progress)
    except NoIndex as error:
        own = (
            ""
            if config.validation.shards
            else (
                " Or measure shards of their own (data.validation.shards), of which few need one, instead of "
                "data.validation.share."
            )
        )
        raise DataError(f"Held-out samples are chosen by an index: {error}{own}") from error
    except DataError as error:
        if config.order == "indexed":
            raise
        raise DataError(
            "Held-out samples are read by an index, whatever data.order is; name plain tars by "
            f"data.validation.shards, since these cannot be indexed: {error}"
        ) from error


def _check_apart(config: DataConfig, dataset: Dataset | None, own: Dataset) -> None:
    """Raises DataError for a shard that is trained on and measured on."""
    if dataset is not None:
        trained = set(map(_place, dataset.urls))
    else:
        listed = [list_files(s.shards, timeout_s=config.request_timeout_s) for s in sources_of(config)]
        trained = {_place(shard.url) for shards in listed for shard in shards}
    both = [url for url in own.urls if _place(url) in trained]
    if both:
        raise DataError(
            f"{both[0]} is in data.validation.shards and among the training shards ({len(both)} shards are); "
            "leave them out of one, or hold a part of the samples out by data.validation.share."
        )


def _place(url: str) -> str:
    return os.path.realpath(local_path(url)) if is_local(url) else url


def _choose(
    config: DataConfig,
    dataset: Dataset,
    selections: Sequence[Selection],
    count: int,
    shapes: Sequence[tuple[int, int]],
) -> tuple[list[HeldOutSample], int, Counter[str]]:
    """(samples, shards looked at, why others were not chosen)."""
    reader = RangeReader(
        timeout_s=config.request_timeout_s, tries=config.max_retries, patience_s=config.patience_s
    )
    buckets = Buckets(tuple(shapes), (), accepted_only=True)
    removals = read_removals(config.removal_lists)  # asked about few samples, and not about whole shards
    views = ShardViews(
        dataset, selections, buckets, reader, capacity=2 * _READERS, with_identities=bool(removals)
    )
    weights = np.bincount(dataset.shard_of, minlength=len(dataset.urls))
    # By name, so that shards that join or leave the set leave the others' samples where they are.
    order = np.argsort(places(name_of(url).encode() for url in dataset.urls), kind="stable").tolist()[
        :_MOST_SHARDS
    ]
    chosen: list[tuple[int, HeldOutSample]] = []
    last = _ANY
    reasons: Counter[str] = Counter()
    looked = 0
    with ThreadPoolExecutor(_READERS) as pool:
        for first in range(0, len(order), _READERS):
            if len(chosen) >= count and looked >= _LEAST_SHARDS:
                break
            some = order[first : first + _READERS]
            for shard, view in zip(some, pool.map(views.get, some), strict=True):
                reasons += view.decided.counted()
                for hashed, row, shape in _candidates(view, buckets, last):
                    if why := removed_by(
                        removals, view.key(row), dataset.urls[shard], view.identities_of(row)
                    ):
                        reasons[why] += 1
                    else:
                        sample = _sample(dataset, shard, view, row, shape, int(weights[shard]))
                        chosen.append((hashed, sample))
                if len(chosen) >= count:
                    chosen = sorted(chosen, key=lambda pair: (pair[0], pair[1].ordinal))[:count]
                    last = chosen[-1][0]
            looked += len(some)
    chosen.sort(key=lambda pair: (pair[1].shape, pair[0], pair[1].ordinal))
    return [sample for _, sample in chosen], looked, reasons


def _candidates(view: ShardView, buckets: Buckets, last: int) -> Iterator[tuple[int, int, tuple[int, int]]]:
    """(hash of the key, row, shape) of all samples of a shard whose hash is at most `last`."""
    for shape, rows in zip(buckets.shapes, view.rows, strict=True):
        hashes = places(view.keys[rows])
        near = hashes <= np.uint64(last)
        for hashed, row in zip(hashes[near].tolist(), rows[near].tolist(), strict=True):
            yield hashed, row, shape


def _sample(
    dataset: Dataset, shard: int, view: ShardView, row: int, shape: tuple[int, int], weight: int
) -> HeldOutSample:
    starts, sizes = view.offsets[:, row].tolist(), view.sizes[:, row].tolist()
    extents = zip(view.members, starts, sizes, strict=True)
    late = view.late
    return HeldOutSample(
        shard=shard,
        key=dataset.sample_key(shard, view.key(row)),
        ordinal=hash_text(f"{name_of(dataset.urls[shard])} {view.key(row)}") >> 1,
        weight=weight,
        shape=shape,
        extents=tuple((e, start, start + size) for e, start, size in extents if start >= 0),
        original=view.original(row),
        beside=view.captions(row),
        late=tuple(clause.text for clause in late.clauses) if late is not None else (),
        late_values={name: column[row] for name, column in view.late_columns.items()},
    )


def _only_theirs(config: DataConfig, dataset: Dataset, chosen: Sequence[HeldOutSample]) -> HeldOut:
    """With the shards of the samples alone."""
    shards = sorted({sample.shard for sample in chosen})
    place = {shard: i for i, shard in enumerate(shards)}
    some = dataclasses.replace(
        dataset,
        urls=tuple(dataset.urls[i] for i in shards),
        index_urls=tuple(dataset.index_urls[i] for i in shards),
        sizes=tuple(dataset.sizes[i] for i in shards),
        versions=tuple(dataset.versions[i] for i in shards),
        checksums=tuple(dataset.checksums[i] for i in shards),
        shard_of=np.arange(len(shards)),
        source_of=dataset.source_of[shards],
        counts=np.zeros(len(shards), np.int64),
        accepted=None,
    )
    return HeldOut(config, some, tuple(dataclasses.replace(s, shard=place[s.shard]) for s in chosen))
