"""The order of shards of which only the names are known: lanes take turns at whole shards.

`lanes.py` cuts an epoch into equal lanes, for which it must know how many samples every shard has, and so
have read them all. Here a lane is a sequence of shards, and what a shard holds is learned when a lane comes
to it:

    epoch          0           |          1            | ...       3 shards A, B, C in a permutation of
    shards         C   A   B   |   B   C   A           | ...       (seed, epoch), one epoch after the other
    position       0   1   2   |   3   4   5           | ...
    lane           0   1   0   |   1   0   1           | ...       position p belongs to lane p mod 2

>>> turns = Turns(shards=3, seed=2, lanes=2, window=16)
>>> for lane in range(2):
...     print(*[f"{'ABC'[turns.entry(lane, turn)]} of epoch {turns.epoch(lane, turn)}," for turn in range(3)])
C of epoch 0, B of epoch 0, C of epoch 1,
A of epoch 0, B of epoch 1, A of epoch 1,

Turn k of lane l is position k * lanes + l. So each shard comes once per epoch, in one lane, and with it each
of its samples, whatever the shards hold and however many ranks read them. Lanes meet shards of different
sizes, so they are not at the same position: while one ends an epoch, others have begun the next. No lane
waits, and none falls behind for ever, since every lane has as many turns as any other, up to one.

Inside a turn, windows are shuffled, as they lie in the tar. A window is known when its bytes have come:
`first` samples came before it, and it has n. So the first ones of a turn are small, or the first batch of a
run would wait for a gigabyte; each is as large as all before it together, up to `window`. The very first
depends on the lane, so that not all lanes begin a window at the same step:

>>> for lane in range(2):
...     firsts = [0]
...     while firsts[-1] < 80:
...         firsts.append(firsts[-1] + turns.window_size(lane, firsts[-1]))
...     print(*firsts)
0 4 8 16 32 48 64 80
0 2 6 12 24 40 56 72 88
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
from numpy.typing import NDArray

from data_pipeline.errors import DataError
from data_pipeline.order.draws import Draw, fold, permutation
from data_pipeline.order.lanes import choose_lanes, source_key, source_ordinal

_FIRST_WINDOW = 4
MAX_SAMPLES = 1 << 24
"""Samples that a shard may have: so many ordinals belong to each turn."""


@dataclass(frozen=True, eq=False)
class Turns:
    """The endless sequence of shards of every lane."""

    shards: int
    """Entries of an epoch, S (a shard of a repeated source is several)."""
    seed: int
    lanes: int
    window: int
    shard_of: NDArray[np.int64] | None = None
    """[S] number of each entry's shard among all; None: they are all."""
    source: int | None = None
    """Of a mixture by weights, whose sources take turns each on their own: which one this is."""
    earlier: Turns | None = None
    """The turns of the epochs before `first_epoch`, when there were fewer shards."""
    first_epoch: int = 0

    def __post_init__(self) -> None:
        assert self.window >= 1
        assert 1 <= self.lanes <= self.shards

    def epoch(self, lane: int, turn: int) -> int:
        """Epoch in which a lane has this turn."""
        if (earlier := self._before(lane, turn)) is not None:
            return earlier.epoch(lane, turn)
        return self._place(lane, turn)[0]

    @cached_property
    def _first_place(self) -> int:
        """Position at which `first_epoch` begins."""
        if self.earlier is None:
            return 0
        return self.earlier._first_place + (self.first_epoch - self.earlier.first_epoch) * self.earlier.shards

    def _before(self, lane: int, turn: int) -> Turns | None:
        """The turns that this one belongs to, if it was before the set grew."""
        return self.earlier if turn * self.lanes + lane < self._first_place else None

    def _place(self, lane: int, turn: int) -> tuple[int, int]:
        """Epoch, and place in it."""
        epochs, place = divmod(turn * self.lanes + lane - self._first_place, self.shards)
        return self.first_epoch + epochs, place

    @cached_property
    def key(self) -> int:
        """What permutations are drawn from: sources with equally many shards have orders of their own."""
        return source_key(self.seed, self.source)

    def entry(self, lane: int, turn: int) -> int:
        """Entry of the epoch that a lane walks in this turn."""
        epoch, place = self._place(lane, turn)
        return int(_permuted(self.key, epoch, self.shards)[place])

    def shard(self, lane: int, turn: int) -> int:
        """Number among all of the shard that a lane walks in this turn."""
        if (earlier := self._before(lane, turn)) is not None:
            return earlier.shard(lane, turn)
        entry = self.entry(lane, turn)
        return entry if self.shard_of is None else int(self.shard_of[entry])

    def window_size(self, lane: int, first: int) -> int:
        """Samples of the window that begins after `first` samples of a turn, if the shard has as many."""
        least = min(_FIRST_WINDOW, self.window)
        return min(self.window, max(least, first)) if first else least - lane * least // self.lanes

    def shuffled(self, lane: int, turn: int, first: int, size: int) -> NDArray[np.int64]:
        """[size] rows of a window in the order in which they are visited, counted from its first."""
        return permutation(fold(self.key, turn, lane, first, int(Draw.WINDOW_ORDER)), size)

    def ordinal(self, turn: int, lane: int, offset: int) -> int:
        """Identity of one visit, unique over all epochs; `offset` counts the visits of a turn."""
        return source_ordinal(self.source, (turn * self.lanes + lane) * MAX_SAMPLES + offset)


@lru_cache(maxsize=64)  # lanes are in one epoch or the next, of each source
def _permuted(key: int, epoch: int, shards: int) -> NDArray[np.int64]:
    return permutation(fold(key, epoch, int(Draw.SHARD_ORDER)), shards)


def choose_turn_lanes(requested: int, global_batch_size: int, shards: int) -> int:
    """Number of lanes: `requested`, or the largest divisor of the batch that there are shards for.

    Raises DataError when it does not divide the global batch or exceeds the number of shards.
    """
    if requested > shards:
        raise DataError(
            f"data.lanes={requested} exceeds the {shards} shards, and without an index each lane needs one "
            "of its own; choose fewer lanes, or run `ldm data index` once."
        )
    return choose_lanes(requested, global_batch_size, shards)
