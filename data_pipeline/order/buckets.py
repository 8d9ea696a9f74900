"""Aspect-ratio buckets: which exist, which sample belongs where, and which one step k uses.

A batch has one shape, so the buckets take turns, and no rank may have to ask another whose turn it is.

>>> shapes = bucket_shapes(64, step=16, max_aspect=2.0)
>>> shapes
[(48, 80), (64, 64), (80, 48)]

The index knows the aspects of the samples, here 60 of 1:1, 30 of 1.5:1 and 10 of 1:1.4 (bins of a
sixteenth of a factor of two). Each bucket gets as many steps as it has samples, spread evenly:

>>> buckets = make_buckets(shapes, {"0": 60, "9": 30, "-8": 10}, lanes=2)
>>> buckets.weights
(0.3, 0.6, 0.1)
>>> "".join("wst"[buckets.of_step(seed=0, step=k)] for k in range(20))        # wide, square, tall
'sswsstswsswswsswssts'

Step k takes the bucket in which the point (offset + k * golden ratio) mod 1 falls, when [0, 1) is divided
by the weights. The golden ratio is the number whose multiples are spread most evenly, so that after any
number of steps each bucket is within a few of its due; random turns would be off by the root of that number.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from data_pipeline.errors import DataError
from data_pipeline.order.draws import Draw, uniform

_GOLDEN = (math.sqrt(5.0) - 1.0) / 2.0
_PER_OCTAVE = 16
"""Bins of the histogram per factor of two of the aspect."""
_BIN_LIMIT = 3 * _PER_OCTAVE
"""All aspects beyond 8:1 share the outermost bins."""
_MIN_PER_LANE = 4
"""Samples that a bucket has in a lane on average at least; with fewer, some lane would have none."""


@dataclass(frozen=True)
class Buckets:
    """Picture shapes of a run; every global batch has one of them."""

    shapes: tuple[tuple[int, int], ...]
    """(height, width), from wide to tall."""
    weights: tuple[float, ...]
    """Share of the samples in each."""

    def assign(self, heights: NDArray[np.float64], widths: NDArray[np.float64]) -> NDArray[np.int16]:
        """[n] bucket of nearest aspect (in logarithm); unknown sizes go to bucket 0."""
        # In logarithm, since 2:1 and 1:2 are equally far from a square.
        edges = np.log2([w / h for h, w in self.shapes])
        with np.errstate(all="ignore"):
            aspects = np.log2(widths / heights)
        aspects = np.where(np.isfinite(aspects), aspects, edges[0])
        return np.abs(aspects[:, None] - edges[None, :]).argmin(axis=1).astype(np.int16)

    def of_step(self, seed: int, step: int) -> int:
        """Bucket of the whole global batch of a step: a low-discrepancy sequence, the same everywhere.

        Frequencies follow the weights within O(1) steps, so all buckets pass through the data alike.
        """
        point = (uniform(seed, 0, Draw.BUCKET) + step * _GOLDEN) % 1.0
        return min(int(np.searchsorted(np.cumsum(self.weights), point, side="right")), len(self.shapes) - 1)


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


def aspect_histogram(heights: NDArray[np.float64], widths: NDArray[np.float64]) -> dict[str, int]:
    """Counts of samples by aspect, 16 bins per factor of two: what a manifest keeps of the sizes."""
    with np.errstate(all="ignore"):
        bins = np.rint(np.log2(widths / heights) * _PER_OCTAVE)
    bins = np.clip(bins[np.isfinite(bins)], -_BIN_LIMIT, _BIN_LIMIT).astype(int)
    values, counts = np.unique(bins, return_counts=True)
    return {str(v): int(c) for v, c in zip(values, counts, strict=True)}


def make_buckets(shapes: Sequence[tuple[int, int]], histogram: Mapping[str, int], lanes: int) -> Buckets:
    """Buckets that enough samples fall into; rarer aspects go to their nearest neighbour.

    Raises DataError when the index knows no picture sizes.
    """
    if not histogram:
        raise DataError("data.buckets needs picture sizes in the index; run `ldm data index` again.")
    chosen = list(shapes)
    while True:
        trial = Buckets(tuple(chosen), (0.0,) * len(chosen))
        bins = np.asarray([float(b) / _PER_OCTAVE for b in histogram])
        counts = np.asarray(list(histogram.values()), np.float64)
        place = trial.assign(np.ones(len(bins)), 2.0**bins)
        totals = np.bincount(place, weights=counts, minlength=len(chosen))
        rare = int(totals.argmin())
        if len(chosen) == 1 or totals[rare] >= _MIN_PER_LANE * lanes:
            return Buckets(tuple(chosen), tuple((totals / totals.sum()).tolist()))
        del chosen[rare]
