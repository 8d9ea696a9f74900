"""The shards of a configuration with their indexes: what an order is made from."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from data_pipeline.config import DataConfig
from data_pipeline.errors import DataError
from data_pipeline.order.buckets import Buckets, WalkOrigin, make_buckets, mix_buckets
from data_pipeline.order.lanes import Order, choose_lanes, choose_window
from data_pipeline.order.position import Position, lanes_and_window, takes_turns
from data_pipeline.order.shard_set import Earlier, Fingerprint, KeptShard, ShardSet
from data_pipeline.order.turns import MAX_SAMPLES, Turns, choose_turn_lanes
from data_pipeline.shards.accepted import Accepted
from data_pipeline.shards.manifest import Former
from data_pipeline.shards.selection import target_shapes
from data_pipeline.storage.urls import name_of, shard_name


@dataclass(frozen=True)
class Dataset:
    """Shards in the order of the sources; a source of repeat r occurs r times in `shard_of`."""

    urls: tuple[str, ...]
    """[U] distinct shards."""
    index_urls: tuple[str, ...]
    """[U] their index files."""
    sizes: tuple[int, ...]
    """[U] bytes of the shards."""
    versions: tuple[str, ...]
    """[U] ETags or modification times."""
    checksums: tuple[str, ...]
    """[U] SHA-256 of the index files."""
    beside: tuple[str, ...]
    """[U] What was noted of the parquets beside the shards (`ShardIndex.beside`)."""
    shard_of: NDArray[np.int64]
    """[S] distinct shard of every entry of the epoch."""
    source_of: NDArray[np.int64]
    """[U] source of every distinct shard."""
    counts: NDArray[np.int64]
    """[S] raw samples of every entry."""
    mean_bytes: float
    """Mean size of a sample."""
    accepted: Accepted | None
    """What the index accepts of each distinct shard; None without buckets, which alone need it."""
    fingerprint: Fingerprint
    """Changes with anything the order depends on but the seed and lanes."""
    name_depth: int
    """Parts of a URL that make its short name unique."""
    unindexed: str = ""
    """Why nothing but names is known of the shards, a sentence; empty where an index tells. Without one, what
    stands for a shard above is empty, and `mean_bytes` is that of the first samples."""
    folders: tuple[tuple[int, str], ...] = ()
    """Of each source without an index: number of its first shard, and where its index goes."""
    record_in: str = ""
    """Folder for the index that a run without one leaves, where it may only read the shards; "": none."""
    shares: tuple[float, ...] = ()
    """How much of the served samples is of each source, which then has walks of its own; (): by `repeat`."""
    grown: tuple[Earlier, ...] = ()
    """What a run has known of the set before it grew."""
    former: Mapping[int, tuple[Former, ...]] = field(default_factory=dict)
    """Of distinct shards that were replaced: what they were (`ManifestRow.former`)."""
    kept: Mapping[int, Former] = field(default_factory=dict)
    """Of those that were replaced since the run began: as its fingerprint has them."""
    left_out: frozenset[int] = frozenset()
    """Those of which the run's order counts other samples than there are: none of theirs is served."""

    @property
    def shards(self) -> ShardSet:
        """As a position tells of them."""
        counted = np.bincount(self.source_of, minlength=len(self.shares))
        kept = (
            KeptShard(*self.place(shard), was.size, was.samples) for shard, was in sorted(self.kept.items())
        )
        return ShardSet(self.fingerprint, tuple(counted.tolist()), self.grown, tuple(kept))

    def place(self, shard: int) -> tuple[int, int]:
        """Source of a distinct shard, and which of that source's it is."""
        source = int(self.source_of[shard])
        return source, shard - int(np.searchsorted(self.source_of, source))

    def keeping(self, kept: Mapping[int, Former], *, counted: bool) -> Dataset:
        """The same for a run that began when shards were what is `kept` of them.

        counted: its order is one of raw samples, so that what a shard had decides where others come
        """
        if not kept:
            return self
        counts, has = self.counts.copy(), dict(zip(self.shard_of.tolist(), self.counts.tolist(), strict=True))
        other = frozenset(shard for shard, was in kept.items() if was.samples != has[shard] and counted)
        for shard in other:
            counts[self.shard_of == shard] = kept[shard].samples
        some = replace(self, kept=kept, counts=counts, left_out=other)
        return replace(some, fingerprint=some._printed(some._lines()))

    def first(self, shards: Sequence[int]) -> Dataset:
        """The same with the first so many shards of each source as its entries, numbered as ever."""
        starts = np.searchsorted(self.source_of, np.arange(len(shards)))
        kept = np.arange(len(self.urls)) - starts[self.source_of] < np.asarray(shards)[self.source_of]
        entries = kept[self.shard_of]
        some = replace(
            self,
            shard_of=self.shard_of[entries],
            counts=self.counts[entries] if len(self.counts) else self.counts,
        )
        return replace(some, fingerprint=some._printed(some._lines()))

    def _lines(self, *, names_alone: bool = False) -> list[str]:
        """What an order depends on of each entry."""
        shards = self.shard_of.tolist()
        if self.unindexed or names_alone:
            return [name_of(self.urls[shard]) for shard in shards]
        lines = []
        for shard, count in zip(shards, self.counts.tolist(), strict=True):
            was = self.kept.get(shard)
            count, size = (was.samples, was.size) if was is not None else (count, self.sizes[shard])
            lines.append(f"{name_of(self.urls[shard])} {count} {size}")
        return lines

    def _printed(self, lines: Sequence[str]) -> Fingerprint:
        """Fingerprint of a line for each entry: of all, or where sources have weights of those of each."""
        if not self.shares:
            return _fingerprint(lines)
        sources = self.source_of[self.shard_of]
        mine = (np.flatnonzero(sources == number).tolist() for number in range(len(self.shares)))
        return tuple(_fingerprint(lines[i] for i in some) for some in mine)

    def sample_key(self, shard: int, key: str) -> str:
        """How a sample is called in traces, reject files and removal lists: `shard/key`."""
        return f"{shard_name(self.urls[shard], self.name_depth)}/{key}"

    @property
    def epoch_samples(self) -> int:
        """Raw samples that lanes pass until each has come once, also those of the rarest source."""
        if not self.shares:
            return int(self.counts.sum())
        own = np.bincount(self.source_of, self.counts, minlength=len(self.shares))
        return int(np.ceil(own / self.shares).max())

    @property
    def epoch_ordinals(self) -> int:
        """Where sources have no weights, the ordinal from which on samples come again."""
        return len(self.shard_of) * MAX_SAMPLES if self.unindexed else int(self.counts.sum())

    def epoch_steps(self, order: Order | Turns, global_batch_size: int) -> int | None:
        """Steps until each sample has come; None without an index, which would tell."""
        return None if isinstance(order, Turns) else -(-self.epoch_samples // global_batch_size)

    def walk(
        self, config: DataConfig, *, seed: int, global_batch_size: int, position: Position = None
    ) -> Order | Turns:
        """Order of all samples, or turns at shards where there is no index or a run began without.

        Raises DataError for lanes that do not fit.
        """
        if (known := lanes_and_window(position)) is not None:
            # What follows from the set must not change with it.
            config = replace(
                config, lanes=config.lanes or known[0], shuffle_window=config.shuffle_window or known[1]
            )
        before = takes_turns(position)
        if not (self.unindexed or before):
            return self.order(config, seed=seed, global_batch_size=global_batch_size)
        if before is False:
            raise DataError(
                f"The checkpoint stopped in the order of an index. {self.unindexed} Go on with "
                "data.order=indexed and an index of all shards, or start a new run with init_from."
            )
        fewest = len(self.shard_of)
        if self.shares:
            fewest = int(np.bincount(self.source_of, minlength=len(self.shares)).min())
        lanes = choose_turn_lanes(config.lanes, global_batch_size, fewest)
        window = choose_window(config.shuffle_window, lanes, self.mean_bytes)
        return Turns(len(self.shard_of), seed, lanes, window, self.shard_of)

    def fingerprint_of(self, order: Order | Turns) -> Fingerprint:
        """Fingerprint of all that an order depends on: turns at shards on their names alone."""
        if self.unindexed or isinstance(order, Order):
            return self.fingerprint
        return self._printed(self._lines(names_alone=True))

    def order(self, config: DataConfig, *, seed: int, global_batch_size: int) -> Order:
        """Order of all samples, by the index. Raises DataError for lanes that do not fit."""
        assert not self.unindexed, self.unindexed
        counts = self.counts
        if self.accepted is not None and counts.sum():
            counts = self.accepted.aspects.sum(axis=1)[self.shard_of]
        total = int(counts.sum())
        if self.shares:
            total = int(np.bincount(self.source_of, counts, minlength=len(self.shares)).min())
        if self.accepted is not None and self.counts.sum() and total < max(1, config.lanes):
            enlarge = "set data.allow_enlarging=true, " if "too_small" in self.accepted.reasons else ""
            raise DataError(
                f"{self.accepted.sentence()}; {enlarge}loosen data.filter, lower data.lanes or correct "
                "the shards."
            )
        lanes = choose_lanes(config.lanes, global_batch_size, total)
        window = choose_window(config.shuffle_window, lanes, self.mean_bytes)
        return Order(self.counts, seed, lanes, window, shard_of=self.shard_of)

    def buckets(self, config: DataConfig, order: Order | Turns) -> Buckets:
        """Aspect-ratio buckets, or the one square shape. Raises DataError when they cannot be made.

        order: that of all samples, from `order` or `walk`
        """
        shapes = target_shapes(config)
        if not self.shares:
            if not config.buckets:
                return Buckets(shapes, (order,))
            assert isinstance(order, Order), "buckets need an index"
            assert self.accepted is not None, "opened with buckets"
            return make_buckets(shapes, self.accepted.aspects, order)
        orders = [self._of_source(order, source, share) for source, share in enumerate(self.shares)]
        if self.accepted is None or isinstance(order, Turns):
            walks = (WalkOrigin(0, source, share) for source, share in enumerate(self.shares))
            return Buckets(shapes, tuple(orders), mixed=tuple(walks))
        indexed = [order for order in orders if isinstance(order, Order)]
        return mix_buckets(shapes, self.accepted.aspects, indexed, self.shares)

    def _of_source(self, order: Order | Turns, source: int, share: float) -> Order | Turns:
        """The order of one source: a window of a rare one is as many steps as another's."""
        mine = np.flatnonzero(self.source_of[self.shard_of] == source)
        shards, window = self.shard_of[mine], max(1, round(order.window * share))
        if isinstance(order, Turns):
            return replace(order, shards=len(mine), window=window, shard_of=shards, source=source)
        return replace(order, counts=self.counts[mine], window=window, shard_of=shards, source=source)


def _fingerprint(lines: Iterable[str]) -> str:
    """Of a line for each entry of an epoch."""
    text = "".join(f"{line}\n" for line in lines)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
