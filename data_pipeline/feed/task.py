"""What one worker is told to do, and how the arrays that it fills lie in memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_pipeline.config import DataConfig
from data_pipeline.feed.conditions import condition_arrays
from data_pipeline.feed.sample import sample_arrays
from data_pipeline.moments.entry import NOTHING_ONCE, Moments, MomentsCache
from data_pipeline.order.buckets import Buckets
from data_pipeline.order.lanes import Order
from data_pipeline.order.position import LaneState
from data_pipeline.order.turns import Turns
from data_pipeline.shards.dataset import Dataset
from data_pipeline.shards.removals import RemovalList

_ALIGN = 64


@dataclass(frozen=True)
class ShareTask:
    """Everything a worker needs to know."""

    config: DataConfig
    dataset: Dataset
    order: Order | Turns
    lanes: range
    buckets: Buckets
    step: int
    """Steps done before."""
    states: tuple[LaneState, ...]
    """One per lane and walk of `buckets`, lane-major: walk w of the i-th lane is at i * walks + w."""
    per_lane: int
    """Samples per lane and step."""
    skip_ordinals: frozenset[int] = frozenset()
    """Visits that the trainer does not want again (loss spikes)."""
    removals: tuple[RemovalList, ...] | None = None
    """The removal lists as the rank has read them; None: the worker reads them itself."""
    moments: Moments = NOTHING_ONCE
    """What is encoded once."""

    @property
    def size(self) -> int:
        """Samples per step."""
        return len(self.lanes) * self.per_lane

    def layout(self, height: int = 0, width: int = 0) -> ShareLayout:
        """Layout of a share of this picture size; 0: the largest that occurs."""
        if height and width:
            return ShareLayout(self.config, self.size, height, width, self.moments.cache)
        layouts = [
            ShareLayout(self.config, self.size, h, w, self.moments.cache) for h, w in self.buckets.shapes
        ]
        return max(layouts, key=lambda layout: layout.bytes)


class ShareLayout:
    """Where the arrays of one share lie in a flat buffer."""

    def __init__(
        self, config: DataConfig, size: int, height: int, width: int, cache: MomentsCache | None = None
    ) -> None:
        self._fields: list[tuple[str, np.dtype[Any], tuple[int, ...], int]] = []
        position = 0
        spec = sample_arrays(height, width, cache) | condition_arrays(config, height, width)
        for name, (kind, shape) in spec.items():
            dtype = np.dtype(kind)
            self._fields.append((name, dtype, (size, *shape), position))
            count = int(np.prod((size, *shape), dtype=np.int64))
            position += -(-count * dtype.itemsize // _ALIGN) * _ALIGN
        self.bytes = position

    def arrays(self, buffer: memoryview) -> dict[str, NDArray[Any]]:
        """Views of a buffer of at least `bytes`."""
        return {
            name: np.frombuffer(
                buffer, dtype, count=int(np.prod(shape, dtype=np.int64)), offset=position
            ).reshape(shape)
            for name, dtype, shape, position in self._fields
        }
