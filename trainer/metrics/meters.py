"""Values that stay on the device: means until a log interval, a step's own until the next step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

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


@dataclass(frozen=True)
class LateValues:
    """One step's metrics on their way to the host."""

    step: int
    ordinals: Tensor
    """int64 [B]: this rank's samples of the step."""
    keys: tuple[str, ...]
    """Their names."""
    names: tuple[str, ...]
    values: Tensor
    """Host memory that the device fills; pinned where there is a GPU."""
    arrived: torch.cuda.Event | None

    def read(self) -> dict[str, float]:
        """The metrics; waits for this step's kernels, and not for those of later steps behind them."""
        if self.arrived is not None:
            self.arrived.synchronize()
        return dict(zip(self.names, self.values.tolist(), strict=True))


class Delayed:
    """Hands values of the device to the host one step late, so that reading them stalls nothing.

    A copy to pinned memory is queued with the step itself. `.item()` one step later would queue its copy
    behind everything launched since, and so stop the host until the device has nothing left to do.
    """

    def __init__(self) -> None:
        self._pending: list[LateValues] = []

    def push(self, step: int, metrics: dict[str, Tensor], ordinals: Tensor, keys: Sequence[str] = ()) -> None:
        """Remember one step's 0-d metrics and this rank's samples."""
        values = torch.stack([value.detach().float() for value in metrics.values()])
        arrived = None
        if values.is_cuda:
            values = values.to("cpu", non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record()
        self._pending.append(LateValues(step, ordinals, tuple(keys), tuple(metrics), values, arrived))

    def pop(self, *, everything: bool = False) -> list[LateValues]:
        """Steps whose values may be read now: all but the newest, or all of them."""
        keep = 0 if everything else 1
        ready, self._pending = self._pending[: len(self._pending) - keep], self._pending[-keep:] * keep
        return ready
