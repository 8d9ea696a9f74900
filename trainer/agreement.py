"""What all ranks must decide together, once a step: one small all-reduce that waits for no GPU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from trainer.distributed import collectives
from trainer.reliability.preemption import StopRequest


@dataclass(frozen=True)
class Agreed:
    """The same on every rank."""

    request: StopRequest
    """Strongest stop request of any rank."""
    data_lost: bool
    """Whether some rank cannot get its next batch."""
    losses: tuple[float, ...]
    """Means over ranks of the losses that were handed in; NaN where one rank's was."""


def agree(request: StopRequest, *, data_lost: bool, losses: Sequence[float]) -> Agreed:
    """Collective; every rank hands in equally many losses. With one rank, what was handed in."""
    ranks = collectives.world_size()
    if ranks == 1:
        return Agreed(request, data_lost, tuple(losses))
    # One slot per request level makes the maximum a sum, so a single reduction carries everything.
    levels = len(StopRequest)
    message = torch.zeros(levels + 1 + len(losses), dtype=torch.float64)
    message[int(request)] = 1
    message[levels] = float(data_lost)
    message[levels + 1 :] = torch.tensor(losses, dtype=torch.float64)
    dist.all_reduce(message)
    asked = max(level for level in StopRequest if message[int(level)] > 0)
    return Agreed(asked, bool(message[levels] > 0), tuple((message[levels + 1 :] / ranks).tolist()))


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
