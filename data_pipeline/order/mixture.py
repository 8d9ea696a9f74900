"""Which source each row of a batch comes from, where sources are mixed by weights.

Every lane walks every source, each on its own, so that a source is read as it would be alone. Row after row a
lane takes the next served sample of one of them, and which one is arithmetic on (lane, row):

    point of a row      u = lane's start + row * golden ratio            modulo 1
    weights 5 : 3 : 2   |          0          |      1      |    2    |
                        0                    .5            .8         1

A golden ratio further on each time, points fill the unit evenly whichever part of it is looked at. The starts
of the L lanes are the L-th parts of the unit, in an order in which neighbours, which are on one rank, lie
apart. So both are true at once:

- of the L rows that stand at one place of all lanes, a source has its share to within one row: every batch
  is mixed alike, and so is every rank's part of it;
- of any n rows of a lane, it has its share to within a few: lanes come to the end of a source together.

>>> mixture = Mixture((5.0, 3.0, 2.0), lanes=10, seed=0)
>>> for row in range(3):
...     print(*[mixture.source(lane, row) for lane in range(10)])
0 2 1 0 2 1 0 0 1 0
1 0 0 2 1 0 2 1 0 0
0 0 2 1 0 2 1 0 0 1
>>> [sum(mixture.source(4, row) == source for row in range(1000)) for source in range(3)]
[499, 300, 201]

Rows are served samples. What a filter, a removal list or a damaged picture takes moves the walk of its source
on and not the row, so weights are shares of what is trained on.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from itertools import accumulate

from data_pipeline.order.draws import Draw, fold

_UNIT = 1 << 64
_GOLDEN = 0x9E3779B97F4A7C15
"""2^64 over the golden ratio."""


@dataclass(frozen=True)
class Mixture:
    """Sources of the rows of all lanes; one source has them all."""

    weights: tuple[float, ...]
    """Of each source, above 0, in any unit."""
    lanes: int
    seed: int

    def source(self, lane: int, row: int) -> int:
        """Source of a lane's row, counted from the beginning of the run."""
        if not self._edges:
            return 0
        point = (self._start + self._turned(lane) * _UNIT // self.lanes + row * _GOLDEN) % _UNIT
        return bisect_right(self._edges, point)

    @cached_property
    def _edges(self) -> list[int]:
        """Where the parts of the sources but the first begin; exact, so the same on every machine."""
        sums = list(accumulate(Fraction(weight) for weight in self.weights))
        return [int(_UNIT * part / sums[-1]) for part in sums[:-1]]

    @cached_property
    def _start(self) -> int:
        return fold(self.seed, int(Draw.MIXTURE))

    def _turned(self, lane: int) -> int:
        return lane * self._step % self.lanes

    @cached_property
    def _step(self) -> int:
        """Places between the starts of neighbouring lanes, prime to their number: each start comes once."""
        near = round(self.lanes * _GOLDEN / _UNIT)
        apart = (near + sign * by for by in range(self.lanes) for sign in (1, -1))
        return next(step for step in apart if math.gcd(step, self.lanes) == 1)
