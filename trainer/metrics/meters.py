"""Values that stay on the device: means until a log interval, a step's own until the next step."""

from __future__ import annotations

import torch
from torch import Tensor

from trainer.distributed import collectives


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
        means = collectives.reduce_sum(means) / collectives.world_size()
        self._sums.clear()
        self._counts.clear()
        return dict(zip(names, means.tolist(), strict=True))


class Delayed:
    """Hands values of the device to the host one step late, so that reading them stalls nothing."""

    def __init__(self) -> None:
        self._pending: list[tuple[int, dict[str, Tensor], Tensor]] = []

    def push(self, step: int, metrics: dict[str, Tensor], ordinals: Tensor) -> None:
        """Remember one step's metrics and this rank's sample ordinals."""
        self._pending.append((step, metrics, ordinals))

    def pop(self, *, everything: bool = False) -> list[tuple[int, dict[str, Tensor], Tensor]]:
        """Steps whose values may be read now: all but the newest, or all of them."""
        keep = 0 if everything else 1
        ready, self._pending = self._pending[: len(self._pending) - keep], self._pending[-keep:] * keep
        return ready
