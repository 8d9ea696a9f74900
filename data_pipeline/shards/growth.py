"""Sets that change between the starts of a run.

Where they grow, what lanes are in ends as it began, and the next epoch has all:

    lane 0   epoch 3 of A B C   | epoch 4 of A B C D E      D and E were there when the run was started again,
    lane 1   epoch 3 of A B C   | epoch 4 of A B C D E      lanes 0 and 1 in epoch 3, lane 2 in epoch 2
    lane 2   epoch 2, then 3, of A B C | epoch 4 of A B C D E

The positions say which shards there were, and from which epoch on there are more, so that every later start
has the same. Shards that join go behind the others of their source, by which both are known: the first ones
must have the fingerprint that the position has. Without weights a source that joins is growth as well; with
weights it has walks of its own, and needs none of this.

A shard that was replaced by one of another size or number of samples keeps its place: the manifest says what
it was (`ManifestRow.former`), so that the fingerprint of the position is found again, and from then on the
positions say it (`kept`). With as many samples as before, or with buckets, whose orders go on at the same
share when what is accepted changes, the new ones are served; else they are left out to the end of the run,
since where all others come depends on how many they are.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from data_pipeline.config import DataConfig
from data_pipeline.errors import DataError
from data_pipeline.order.buckets import Buckets
from data_pipeline.order.lanes import Order
from data_pipeline.order.position import Position, last_epochs, shards_of, takes_turns, with_windows
from data_pipeline.order.shard_set import Earlier, Fingerprint, KeptShard, ShardSet
from data_pipeline.order.turns import Turns
from data_pipeline.shards.dataset import Dataset
from data_pipeline.shards.manifest import Former

logger = logging.getLogger(__name__)


def as_begun(config: DataConfig, dataset: Dataset, position: Position) -> Dataset:
    """The data set as the order of a position counts it, where shards were replaced since the run began."""
    known = shards_of(position)
    if known is None or dataset.unindexed or takes_turns(position):  # turns depend on names alone
        return dataset
    if dataset.fingerprint == known.fingerprint and not known.kept:
        return dataset  # as nearly always: a set of 200,000 shards is not printed again
    counted, kept = not config.buckets, _numbered(dataset, known.kept)
    times = {former.until for some in dataset.former.values() for former in some}
    for then in ({}, *(_before(dataset, known, until) for until in sorted(times, reverse=True))):
        found = dataset.keeping(then | kept, counted=counted)
        if _known_part(found, known) is not None:
            return found
    return dataset


def _numbered(dataset: Dataset, kept: Sequence[KeptShard]) -> dict[int, Former]:
    """What a position says of shards that were replaced, by their numbers; without those that are gone."""
    there = dataset.shards.shards
    return {
        int(np.searchsorted(dataset.source_of, source)) + place: Former(size, samples, 0.0)
        for source, place, size, samples in kept
        if source < len(there) and place < there[source]
    }


def _before(dataset: Dataset, known: ShardSet, until: float) -> dict[int, Former]:
    """What shards that a position knows were before a time, where they were something else."""
    found: dict[int, Former] = {}
    for shard, some in dataset.former.items():
        source, place = dataset.place(shard)
        was = next((former for former in some if former.until >= until), None)
        if was is not None and source < len(known.shards) and place < known.shards[source]:
            found[shard] = was
    return found


def _tell_replaced(dataset: Dataset) -> None:
    logger.warning(
        "%d shards were replaced since the run began, %d of them (first %s) by others with another number of "
        "samples: these are left out (shard_replaced) to the end of this run; under a new name behind the "
        "others they join at its next epoch",
        len(dataset.kept),
        len(dataset.left_out),
        dataset.urls[min(dataset.left_out or dataset.kept)],
    )


def walks_of(
    config: DataConfig, dataset: Dataset, order: Order | Turns, position: Position
) -> tuple[Dataset, Buckets, Fingerprint]:
    """The walks of a run that goes on from a position, with those of the epochs before the set grew.

    Returns the data set, which remembers what it was; the walks; and the fingerprint that the position must
    have. Raises DataError for a set with aspect buckets that grew.
    """
    if dataset.kept:
        _tell_replaced(dataset)
    dataset = replace(dataset, fingerprint=dataset.fingerprint_of(order))
    known = shards_of(position)
    now, fingerprint = dataset.shards.shards, dataset.fingerprint
    history = known.grown if known is not None else ()
    newly = _grown_from(dataset, order, known) if known is not None else None
    if newly is not None:
        if config.buckets:
            raise DataError(
                f"The set has grown from {sum(newly.shards)} to {sum(now)} shards, and the shares of "
                "data.buckets with it; add the new shards as a source with a weight of its own, or start a "
                "new run with init_from."
            )
        fingerprint = newly.fingerprint
        history = (*history, Earlier(newly.shards, ()))
    walks: Buckets | None = None
    for number, some in enumerate(_sets(dataset, history)):
        each = _walks(config, dataset.first(some), order, position)
        walks = each if walks is None else _linked(walks, each, history[number - 1].until)
    if newly is not None:
        assert walks is not None
        until = tuple(epoch + 1 for epoch in last_epochs(position, walks))
        history = (*history[:-1], Earlier(history[-1].shards, until))
        logger.warning(
            "the set has grown from %d to %d shards: the new ones join from epoch %s on",
            sum(history[-1].shards),
            sum(now),
            ", ".join(map(str, until)),
        )
    all_of_now = _walks(config, dataset, order, position)
    if walks is not None:
        all_of_now = _linked(walks, all_of_now, history[-1].until)
    return replace(dataset, grown=history), all_of_now, fingerprint


def _sets(dataset: Dataset, history: Sequence[Earlier]) -> list[tuple[int, ...]]:
    """Shards of each source that there is by now, of each time."""
    sets, later = list[tuple[int, ...]](), dataset.shards.shards
    for earlier in reversed(history):
        later = _padded(dataset, earlier.shards, later)
        sets.append(later)
    return sets[::-1]


def _padded(dataset: Dataset, shards: Sequence[int], later: Sequence[int]) -> tuple[int, ...]:
    """With those of sources that joined: of one that has a weight as many as later, of another none."""
    joined = later[len(shards) :]
    return (*shards, *(joined if dataset.shares else (0,) * len(joined)))


def _grown_from(dataset: Dataset, order: Order | Turns, known: ShardSet) -> ShardSet | None:
    """The shards of a position, among the sources of now, if they are the first of those that there are, and
    not all."""
    found = _known_part(dataset, known, order)
    return found if found is not None and found.shards != dataset.shards.shards else None


def _known_part(dataset: Dataset, known: ShardSet, order: Order | Turns | None = None) -> ShardSet | None:
    """The shards of a position, among the sources of now, if they are the first of those that there are."""
    now = dataset.shards.shards
    if len(known.shards) > len(now) or isinstance(known.fingerprint, str) == bool(dataset.shares):
        return None
    was = _padded(dataset, known.shards, now)
    if any(before > after for before, after in zip(was, now, strict=True)):
        return None
    part = dataset.first(was)
    found = part.fingerprint if order is None else part.fingerprint_of(order)
    return ShardSet(found, was) if found[: len(known.fingerprint)] == known.fingerprint else None


def _walks(config: DataConfig, dataset: Dataset, order: Order | Turns, position: Position) -> Buckets:
    if isinstance(order, Turns):
        order = replace(order, shards=len(dataset.shard_of), shard_of=dataset.shard_of)
    else:
        order = replace(order, counts=dataset.counts, shard_of=dataset.shard_of)
    return with_windows(position, dataset.buckets(config, order))


def _linked(earlier: Buckets, later: Buckets, until: Sequence[int]) -> Buckets:
    """The later walks, from an epoch on of each source; before it the earlier ones."""
    before = dict(zip((walk[:2] for walk in earlier.walks), earlier.orders, strict=True))
    orders = []
    for walk, order in zip(later.walks, later.orders, strict=True):
        known = before.get(walk[:2])
        if known is None:
            orders.append(order)
        elif isinstance(order, Turns):
            assert isinstance(known, Turns)
            same = known.shards == order.shards
            orders.append(known if same else replace(order, earlier=known, first_epoch=until[walk.source]))
        else:
            assert isinstance(known, Order)
            same = len(known.counts) == len(order.counts)
            orders.append(known if same else replace(order, earlier=known, first_epoch=until[walk.source]))
    return replace(later, orders=tuple(orders))
