"""Aspect-ratio buckets: which exist, which sample belongs where, and which one step k uses.

A batch has one shape, so the buckets take turns, and no rank may have to ask another whose turn it is.

>>> shapes = bucket_shapes(64, step=16, max_aspect=2.0)
>>> shapes
[(48, 80), (64, 64), (80, 48)]

The index says how many samples are accepted and of which aspect, here 60 of 1:1, 30 of 1.5:1 and 10 of
1:1.4 in one shard. Each bucket is an order of its own over the samples that belong to it, and gets as many
steps as it has samples, spread evenly:

>>> aspects = np.zeros((1, ASPECTS), np.int64)
>>> aspects[0, aspect_of(np.array([1.0, 2.0, 7.0]), np.array([1.0, 3.0, 5.0]))] = 60, 30, 10
>>> raw = Order(np.array([150]), seed=0, lanes=2, window=16)
>>> buckets = make_buckets(shapes, aspects, raw)
>>> [(order.total, order.window) for order in buckets.orders]
[(30, 5), (60, 10), (10, 2)]
>>> "".join("wst"[buckets.of_step(k)] for k in range(20))        # wide, square, tall
'sswstswsswsswstswssw'

Turn j of a bucket with the share w of the samples is due at (j + p) / w, with a phase p in [0, 1) of its own,
and step k takes the turn that is due as the k-th. So a bucket had between w t - p and w t - p + 1 turns at
any time t, and is never further than the number of buckets from its due, in steps, however long the run.

The promise that follows, for what the index decides: lanes of one bucket differ by at most one sample, so no
sample of a bucket is served for the second time before all others were served once, up to the part of one
global batch. What is left of a bucket when it does not fill a batch is not dropped: it is filled up from the
bucket's next epoch.

Where sources are mixed by weights, a bucket has an order for each source that has enough samples for it, and
its steps take their rows from these by `mixture.py`. Its share of the steps is then what the sources' weights
give it. Aspects that are rare in one source join a neighbour there, and keep their bucket in the others.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from data_pipeline.errors import DataError
from data_pipeline.order.draws import Draw, uniform
from data_pipeline.order.lanes import Order
from data_pipeline.order.mixture import Mixture
from data_pipeline.order.turns import Turns

_PER_OCTAVE = 16
"""Classes of aspects per factor of two: 1 / 32 octave, 2 %, is the most by which a sample is misjudged."""
_LIMIT = 3 * _PER_OCTAVE
"""All aspects beyond 8:1 share the outermost classes."""
ASPECTS = 2 * _LIMIT + 1
_MIN_PER_LANE = 4
"""Samples that a bucket has in a lane on average at least; with fewer, its epochs would end all the time."""


class WalkOrigin(NamedTuple):
    """Whose samples an order has."""

    bucket: int
    source: int
    share: float
    """Of the served samples."""


@dataclass(frozen=True, eq=False)
class Buckets:
    """Picture shapes of a run; every global batch has one of them."""

    shapes: tuple[tuple[int, int], ...]
    """(height, width), from wide to tall."""
    orders: tuple[Order | Turns, ...]
    """The walks of a lane: through the samples of each shape, and of each source where they have weights."""
    accepted_only: bool = False
    """Whether the orders count the accepted samples of their bucket; else all raw samples (one shape)."""
    mixed: tuple[WalkOrigin, ...] = ()
    """What the orders are of where sources have weights, by bucket and source."""

    @cached_property
    def walks(self) -> tuple[WalkOrigin, ...]:
        """What the orders are of; without weights, all sources are one."""
        if self.mixed or len(self.orders) == 1:
            return self.mixed or (WalkOrigin(0, 0, 1.0),)
        everything = sum(self.totals)
        return tuple(WalkOrigin(bucket, 0, total / everything) for bucket, total in enumerate(self.totals))

    @cached_property
    def weights(self) -> tuple[float, ...]:
        """Share of each shape in the served samples."""
        return tuple(sum(walk.share for walk in self.walks[place]) for place in self._places)

    def walks_of(self, bucket: int) -> slice:
        """Places of a bucket's walks among those of a lane."""
        return self._places[bucket]

    @cached_property
    def _places(self) -> list[slice]:
        """Asked for by every step."""
        buckets = [walk.bucket for walk in self.walks]
        starts = [buckets.index(bucket) for bucket in range(len(self.shapes))]
        return [slice(start, start + buckets.count(bucket)) for bucket, start in enumerate(starts)]

    @cached_property
    def mixtures(self) -> tuple[Mixture, ...]:
        """Of each bucket: which of its walks the rows of a lane are from."""
        lanes, seed = self.orders[0].lanes, self.orders[0].seed
        shares = [tuple(walk.share for walk in self.walks[place]) for place in self._places]
        return tuple(Mixture(some, lanes, seed) for some in shares)

    @property
    def totals(self) -> list[int]:
        """Samples of an epoch of each walk; () where nobody knows."""
        return [order.total for order in self.orders if isinstance(order, Order)]

    @cached_property
    def digests(self) -> tuple[str, ...]:
        """Of each source with a weight, or of all: changes with anything that its walks depend on but the
        seed, lanes and shapes."""
        found = [hashlib.sha256() for _ in range(1 + max(walk.source for walk in self.walks))]
        for walk, order in zip(self.walks, self.orders, strict=True):
            assert isinstance(order, Order), "buckets need an index"
            found[walk.source].update(np.ascontiguousarray(order.counts, np.int64).tobytes())
        return tuple(digest.hexdigest()[:16] for digest in found)

    def assign(
        self, heights: NDArray[np.float64], widths: NDArray[np.float64], source: int = 0
    ) -> NDArray[np.int64]:
        """[n] bucket of nearest aspect, of those that a source has."""
        return self._nearest(source)[aspect_of(heights, widths)]

    def _nearest(self, source: int) -> NDArray[np.int64]:
        if not self.mixed:
            return nearest_shapes(self.shapes)
        own = [walk.bucket for walk in self.mixed if walk.source == source]
        return np.asarray(own)[nearest_shapes([self.shapes[bucket] for bucket in own])]

    def of_step(self, step: int) -> int:
        """Bucket of the whole global batch of a step, the same everywhere."""
        return self.turn_of_step(step)[0]

    def turn_of_step(self, step: int) -> tuple[int, int]:
        """The same, and the turns that this bucket has had before."""
        if len(self.shapes) == 1:
            return 0, step
        turns = self.turns(step)
        bucket = self._next(turns)
        return bucket, turns[bucket]

    def turns(self, step: int) -> list[int]:
        """Turns that each bucket has had before a step; late steps take no longer than early ones."""
        sure = step - len(self.shapes)  # at this time at most `step` turns have been due
        turns = [self._due_before(bucket, sure) for bucket in range(len(self.shapes))]
        while sum(turns) < step:
            turns[self._next(turns)] += 1
        return turns

    def _next(self, turns: Sequence[int]) -> int:
        return min(range(len(turns)), key=lambda bucket: self._due(bucket, turns[bucket]))

    def _due(self, bucket: int, turn: int) -> float:
        return (turn + self._phases[bucket]) / self.weights[bucket]

    def _due_before(self, bucket: int, time: float) -> int:
        turns = max(0, math.ceil(self.weights[bucket] * time - self._phases[bucket]))
        # By the very numbers that `_next` compares, whatever was rounded above.
        while turns > 0 and self._due(bucket, turns - 1) >= time:
            turns -= 1
        while self._due(bucket, turns) < time:
            turns += 1
        return turns

    @cached_property
    def _phases(self) -> list[float]:
        return [uniform(self.orders[0].seed, bucket, Draw.BUCKET) for bucket in range(len(self.shapes))]


def bucket_shapes(image_size: int, step: int, max_aspect: float) -> list[tuple[int, int]]:
    """(height, width) multiples of `step` with at most image_size ** 2 pixels, from wide to tall.

    Raises DataError when no bucket fits.
    """
    if step < 1 or image_size % step or max_aspect < 1.0:
        raise DataError(
            f"data.bucket_step={step} must divide data.image_size={image_size}, and data.bucket_max_aspect "
            "must be at least 1."
        )
    wide = set()
    for height in range(step, image_size + 1, step):
        width = image_size * image_size // height // step * step
        if width / height <= max_aspect:
            wide.add((height, width))
    return sorted(wide | {(w, h) for h, w in wide}, key=lambda s: s[0] / s[1])


def aspect_of(heights: NDArray[np.float64], widths: NDArray[np.float64]) -> NDArray[np.int64]:
    """[n] class of the aspect, 0 (tall) to ASPECTS - 1 (wide); unknown sizes count as square."""
    with np.errstate(all="ignore"):
        classes = np.rint(np.log2(widths / heights) * _PER_OCTAVE)
    classes = np.where(np.isfinite(classes), classes, 0.0)
    return np.clip(classes, -_LIMIT, _LIMIT).astype(np.int64) + _LIMIT


def aspect_histogram(heights: NDArray[np.float64], widths: NDArray[np.float64]) -> dict[str, int]:
    """Counts of samples by aspect, in sixteenths of a factor of two: what a manifest keeps of the sizes."""
    with np.errstate(all="ignore"):
        known = np.isfinite(np.log2(widths / heights))
    values, counts = np.unique(aspect_of(heights[known], widths[known]) - _LIMIT, return_counts=True)
    return {str(v): int(c) for v, c in zip(values, counts, strict=True)}


def nearest_shapes(shapes: Sequence[tuple[int, int]]) -> NDArray[np.int64]:
    """[ASPECTS] place of the shape that is nearest to each class, in logarithm: 2:1 and 1:2 are equally far
    from a square."""
    classes = (np.arange(ASPECTS) - _LIMIT) / _PER_OCTAVE
    edges = np.log2([width / height for height, width in shapes])
    return np.abs(classes[:, None] - edges[None, :]).argmin(axis=1)


def make_buckets(shapes: Sequence[tuple[int, int]], aspects: NDArray[np.int64], raw: Order) -> Buckets:
    """Buckets that enough samples fall into; rarer aspects go to their nearest neighbour.

    aspects: [U, ASPECTS] accepted samples of each distinct shard, by aspect
    raw: the order of all samples, with no more lanes than are accepted; each bucket's has its seed, lanes and
        share of its window
    """
    chosen = _frequent(shapes, aspects, raw)
    return Buckets(tuple(chosen), tuple(_by_shape(chosen, aspects, raw)), accepted_only=True)


def mix_buckets(
    shapes: Sequence[tuple[int, int]],
    aspects: NDArray[np.int64],
    sources: Sequence[Order],
    weights: Sequence[float],
) -> Buckets:
    """The same where sources have weights.

    sources: the order of all samples of each, with no more lanes than are accepted of it
    weights: of each, how much of the served samples is its own; they sum to 1
    """
    own, walks = [_frequent(shapes, aspects, source) for source in sources], list[tuple[WalkOrigin, Order]]()
    chosen = [shape for shape in shapes if any(shape in some for some in own)]
    for number, (source, weight, some) in enumerate(zip(sources, weights, own, strict=True)):
        orders = _by_shape(some, aspects, source)
        everything = sum(order.total for order in orders)
        for shape, order in zip(some, orders, strict=True):
            walks.append((WalkOrigin(chosen.index(shape), number, weight * order.total / everything), order))
    walks.sort(key=lambda pair: pair[0][:2])
    mixed, orders_of = zip(*walks, strict=True)
    return Buckets(tuple(chosen), orders_of, accepted_only=True, mixed=mixed)


def _frequent(
    shapes: Sequence[tuple[int, int]], aspects: NDArray[np.int64], raw: Order
) -> list[tuple[int, int]]:
    """Shapes of which each lane has some samples."""
    times = np.bincount(raw.shards(np.arange(len(raw.counts))), minlength=len(aspects))
    totals = times @ aspects  # [ASPECTS]
    assert totals.sum() >= raw.lanes, (totals.sum(), raw.lanes)
    chosen = list(shapes)
    while True:
        sizes = np.bincount(nearest_shapes(chosen), weights=totals, minlength=len(chosen))
        rare = int(sizes.argmin())
        if len(chosen) == 1 or sizes[rare] >= _MIN_PER_LANE * raw.lanes:
            return chosen
        del chosen[rare]


def _by_shape(chosen: Sequence[tuple[int, int]], aspects: NDArray[np.int64], raw: Order) -> list[Order]:
    """Orders of the accepted samples of each shape, instead of one of all."""
    shards = raw.shards(np.arange(len(raw.counts)))
    place, everything = nearest_shapes(chosen), int(aspects.sum(axis=1)[shards].sum())
    orders, first = [], 0
    for bucket in range(len(chosen)):
        counts = aspects[:, place == bucket].sum(axis=1)[shards]
        total = int(counts.sum())
        # A window of a rare bucket then lies in as many shards as one of all samples would.
        window = max(1, round(raw.window * total / everything))
        orders.append(
            replace(raw, counts=counts, window=window, first_ordinal=first, epoch_ordinals=everything)
        )
        first += total
    return orders
