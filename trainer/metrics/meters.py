"""Running means on the device, reduced over ranks once per log interval."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


class Meters:
    """Sums 0-d tensors without synchronising; `reduce` is collective and empties the sums."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}

    def add(self, metrics: dict[str, Tensor]) -> None:
        """Take in one optimizer step's metrics (the same names on every rank)."""
        for name, value in metrics.items():
            value = value.detach().float()
            self._sums[name] = self._sums[name] + value if name in self._sums else value
            self._counts[name] = self._counts.get(name, 0) + 1

    def reduce(self) -> dict[str, float]:
        """Means over the steps since the last call and over ranks."""
        if not self._sums:
            return {}
        names = sorted(self._sums)
        means = torch.stack([self._sums[name] / self._counts[name] for name in names])
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(means)
            means /= dist.get_world_size()
        self._sums.clear()
        self._counts.clear()
        return dict(zip(names, means.tolist(), strict=True))
