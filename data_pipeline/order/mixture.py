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
from itertools import accumulate, pairwise

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
        point = (self._begin(lane) + row * _GOLDEN) % _UNIT
        return bisect_right(self._edges, point)

    def rows_before(self, lane: int, row: int) -> list[int]:
        """[sources] rows of each among a lane's first `row`; late ones take no longer than early ones."""
        begin = self._begin(lane)
        below = [0, *(_points_below(edge, begin, row) for edge in self._edges), row]
        return [after - before for before, after in pairwise(below)]

    def _begin(self, lane: int) -> int:
        return self._start + self._turned(lane) * _UNIT // self.lanes

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


def _points_below(edge: int, begin: int, rows: int) -> int:
    """How many of the first points of a lane lie below an edge of the unit.

    A point x mod 1 is below it where the whole part of x is more than that of x - edge.
    """
    return _whole_parts(begin, rows) - _whole_parts(begin + _UNIT - edge, rows) + rows


def _whole_parts(begin: int, rows: int) -> int:
    """Sum of the whole parts of begin + row * golden ratio over the first rows.

    The sum counts lattice points below a line. What the whole part of its slope leaves is counted along the
    other axis, as in Euclid's algorithm: a step for each digit, however many rows.
    """
    total, unit, slope = 0, _UNIT, _GOLDEN
    while True:
        total += rows * (rows - 1) // 2 * (slope // unit) + rows * (begin // unit)
        slope, begin = slope % unit, begin % unit
        last = slope * rows + begin
        if last < unit:
            return total
        rows, begin = divmod(last, unit)
        unit, slope = slope, unit
