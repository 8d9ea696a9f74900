"""The order of samples: a pure function of (seed, epoch, shard list), cut into lanes.

An epoch is one stream, the shards in a permutation of (seed, epoch), each in file order. The stream is
cut into equal lanes, whose number has nothing to do with ranks or workers, and each lane into windows that
are shuffled. Say three shards A, B, C of 6, 4 and 6 samples, four lanes, windows of three:

    stream    C0 C1 C2 C3 | C4 C5 A0 A1 | A2 A3 A4 A5 | B0 B1 B2 B3        epoch 0 takes C, A, B
    lane           0      |      1      |      2      |      3
    windows   [      ][ ] | [      ][ ] | [   ][    ] | [][       ]        later lanes start theirs earlier
    walked    C2 C1 C0 C3 | C5 C4 A0 A1 | A3 A2 A5 A4 | B0 B2 B1 B3

>>> order = Order(counts=np.array([6, 4, 6]), seed=2, lanes=4, window=3)
>>> for lane in range(4):
...     walked, offset = [], 0
...     while offset < order.lane_size(lane):
...         first, stop = order.window_of(lane, offset)
...         shards, rows = order.visits(0, lane, first, stop)
...         walked += [f"{'ABC'[shard]}{row}" for shard, row in zip(shards, rows)]
...         offset = stop
...     print(*walked)
C2 C1 C0 C3
C5 C4 A0 A1
A3 A2 A5 A4
B0 B2 B1 B3

A step of four samples takes the next of each lane: C2 C5 A3 B0, then C1 C4 A2 B2, and so on. Two ranks
have two lanes each, four ranks one, three ranks two, one and one; the steps are the same. Where a lane
stands is (epoch, raw offset), and where it goes on from there needs one window, however deep in the epoch
that is.

Why lanes are slices of one stream, and not a set of shards each: they differ by at most one sample, so
that they end an epoch together whatever the sizes of the shards, as long as they reject alike. And why
windows, not whole lanes, are shuffled: a window lies in one or a few shards, so a lane reads neighbouring
members in one range, and needs few indexes at a time.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from data_pipeline.errors import DataError
from data_pipeline.order.draws import Draw, fold, fold_array, permutation, permutations

_MAX_WINDOW = 2048
_MIN_WINDOW = 16
"""16 pictures of 50 KB are 0.8 MB, about what is read while one waits for a request: smaller windows would
cost requests. How well a batch is mixed does not depend on it, only how much the next one is like it
(`benchmarks/shuffle.py`)."""
_SHUFFLE_BYTES = 1_000_000_000
_SOURCE_BITS = 56
MAX_SOURCES = 64
"""Of a mixture by weights: what is left of an ordinal of 63 bits."""


@dataclass(frozen=True)
class Part:
    """Which part of every global batch is a rank's."""

    rank: int = 0
    ranks: int = 1
    together: int = 1
    """So many consecutive samples of a global batch, which it is a multiple of, stay on one rank."""


@dataclass(frozen=True, eq=False)
class Order:
    """The endless walk of every lane over an epoch's samples, repeated with new permutations.

    Lane l walks the slice [l N / L, (l + 1) N / L) of the stream; inside it, windows of `window` samples
    are shuffled. A raw offset counts every sample of the slice, also those that are rejected later, so no
    rejection can shift anything. Of a set that grew this is the order of the shards that there are now.
    """

    counts: NDArray[np.int64]
    """[S] raw samples of each shard (a shard of a repeated source occurs several times)."""
    seed: int
    lanes: int
    window: int
    first_ordinal: int = 0
    """Ordinals of an epoch that other walks have, before those of this one (buckets: one walk each)."""
    epoch_ordinals: int = 0
    """Ordinals of an epoch of all walks; 0: this one alone."""
    shard_of: NDArray[np.int64] | None = None
    """[S] number of each shard among all; None: they are all."""
    source: int | None = None
    """Of a mixture by weights, whose sources have an order each: which one this is."""
    earlier: Order | None = None
    """The order of the epochs before `first_epoch`, when there were fewer shards."""
    first_epoch: int = 0

    def __post_init__(self) -> None:
        assert self.window >= 1
        assert 1 <= self.lanes <= self.total

    def at(self, epoch: int) -> Order:
        """The order of one epoch, of the shards that it has."""
        order = self
        while order.earlier is not None and epoch < order.first_epoch:
            order = order.earlier
        return order

    @cached_property
    def total(self) -> int:
        """Samples of an epoch, N. Kept: every sample asks for it, and there may be 200,000 shards."""
        return int(self.counts.sum())

    @cached_property
    def key(self) -> int:
        """What permutations are drawn from: orders of several sources over the same names differ."""
        return source_key(self.seed, self.source)

    def lane_slice(self, lane: int) -> tuple[int, int]:
        """First and past-the-last stream position of a lane, in every epoch."""
        total = self.total
        return lane * total // self.lanes, (lane + 1) * total // self.lanes

    def lane_size(self, lane: int) -> int:
        """Raw samples of a lane per epoch."""
        start, stop = self.lane_slice(lane)
        return stop - start

    def window_of(self, lane: int, offset: int) -> tuple[int, int]:
        """Raw offsets [first, stop) of the shuffle window that holds `offset`.

        Lanes are staggered, so that not all of them reach a new window, and ask for new ranges, at the
        same step: the first window of lane l is l / lanes shorter than the others.
        """
        shift = lane * self.window // self.lanes
        start = (offset + shift) // self.window * self.window - shift
        return max(0, start), min(self.lane_size(lane), start + self.window)

    def visits(
        self, epoch: int, lane: int, first: int, stop: int
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Shards, as `shard_of` numbers them, and rows of the raw offsets [first, stop): whole windows."""
        if epoch < self.first_epoch:
            return self.at(epoch).visits(epoch, lane, first, stop)
        positions = []
        offset = first
        while offset < stop:
            low, high = self.window_of(lane, offset)
            assert (low, min(high, stop)) == (offset, high), (lane, low, offset, high, stop)
            # The key names the window by its first offset, so entering here or walking here is the same.
            key = fold(self.key, epoch, lane, low, int(Draw.WINDOW_ORDER))
            positions.append(low + permutation(key, high - low))
            offset = high
        stream = self.lane_slice(lane)[0] + np.concatenate(positions)
        shards, ends = _epoch_shards(self, epoch)
        # Shards without samples have the end of the one before: side="right" passes over them.
        place = np.searchsorted(ends, stream, side="right")
        entries = shards[place]
        return self.shards(entries), stream - (ends[place] - self.counts[entries])

    def shards(self, entries: NDArray[np.int64]) -> NDArray[np.int64]:
        """Numbers among all shards of entries of an epoch."""
        return entries if self.shard_of is None else self.shard_of[entries]

    def stream(self, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """[S] entries in the order of an epoch, and the stream position past the last sample of each."""
        return _epoch_shards(self, epoch)

    def streams(self, epochs: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The same of many epochs at once, [E, S] each."""
        shards = permutations(fold_array(self.key, epochs, int(Draw.SHARD_ORDER)), len(self.counts))
        return shards, np.cumsum(self.counts[shards], axis=1)

    def ordinal(self, epoch: int, lane: int, offset: int) -> int:
        """Identity of one visit, unique over all epochs: the epoch's base plus the walk position."""
        if epoch < self.first_epoch:
            return self.at(epoch).ordinal(epoch, lane, offset)
        return source_ordinal(self.source, self._epoch_start(epoch) + self.lane_slice(lane)[0] + offset)

    def _epoch_start(self, epoch: int) -> int:
        before = self.earlier._epoch_start(self.first_epoch) if self.earlier is not None else 0
        epochs = epoch - self.first_epoch
        return before + epochs * (self.epoch_ordinals or self.total) + self.first_ordinal


def source_key(seed: int, source: int | None) -> int:
    """What the order of a source is drawn from."""
    return seed if source is None else fold(seed, source, int(Draw.SOURCE_ORDER))


def source_ordinal(source: int | None, ordinal: int) -> int:
    """Ordinals of a source of a mixture, apart from those of the others whatever joins or grows."""
    return ordinal if source is None else (source << _SOURCE_BITS) + ordinal


@lru_cache(maxsize=256)  # each source and bucket has an order; lanes that reject more are in a later epoch
def _epoch_shards(order: Order, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Shards in the order of an epoch, and the stream position past the last sample of each."""
    shards = permutation(fold(order.key, epoch, int(Draw.SHARD_ORDER)), len(order.counts))
    return shards, np.cumsum(order.counts[shards])


def choose_lanes(requested: int, global_batch_size: int, total: int) -> int:
    """Number of lanes: `requested`, or the largest divisor of the batch that the data can fill.

    Raises DataError when it does not divide the global batch or exceeds the number of samples.
    """
    if total == 0:
        raise DataError("The shards hold no samples; check data.shards with `ldm data inspect`.")
    if requested:
        if global_batch_size % requested:
            valid = ", ".join(str(d) for d in divisors(global_batch_size) if d <= total)
            raise DataError(
                f"data.lanes={requested} does not divide global_batch_size={global_batch_size}; choose one "
                f"of {valid}."
            )
        if requested > total:
            raise DataError(f"data.lanes={requested} exceeds the {total} samples; choose at most {total}.")
        return requested
    return max(d for d in divisors(global_batch_size) if d <= total)


def choose_window(requested: int, lanes: int, mean_bytes: float) -> int:
    """Shuffle window per lane: `requested`, or what keeps all windows together near 1 GB."""
    if requested:
        return requested
    fitting = int(_SHUFFLE_BYTES / (lanes * max(1.0, mean_bytes)))
    return max(_MIN_WINDOW, min(_MAX_WINDOW, fitting // _MIN_WINDOW * _MIN_WINDOW))


def deal(lanes: range, parts: int, together: int = 1) -> list[range]:
    """`lanes` cut into contiguous blocks that differ by one lane at most, the longer ones first.

    With more parts than lanes the last ones are empty. Blocks are multiples of `together` lanes, and differ
    by so many.

    >>> deal(range(4), 3)
    [range(0, 2), range(2, 3), range(3, 4)]
    >>> deal(range(8), 3, together=2)
    [range(0, 4), range(4, 6), range(6, 8)]
    """
    each, longer = divmod(len(lanes) // together, parts)
    ends = [together * (part * each + min(part, longer)) for part in range(parts + 1)]
    return [lanes[start:stop] for start, stop in pairwise(ends)]


def lanes_of(part: Part, lanes: int, global_batch_size: int) -> range:
    """The lanes of a rank. A lane is never cut, whatever samples stay together."""
    per_lane = global_batch_size // lanes
    together = math.lcm(part.together, per_lane) // per_lane
    return deal(range(lanes), part.ranks, together)[part.rank]


def divisors(n: int) -> list[int]:
    """All divisors, ascending."""
    small = [d for d in range(1, int(n**0.5) + 1) if n % d == 0]
    return sorted({*small, *(n // d for d in small)})
