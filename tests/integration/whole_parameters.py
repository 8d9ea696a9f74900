"""Whole parameters on rank 0 from the fragments that all ranks own: how tests look at an engine's state."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from trainer.distributed.collectives import rank, world_size
from trainer.distributed.engine import Engine, Fragment


@torch.no_grad()
def gather_full(
    shapes: dict[str, tuple[int, ...]], fragments: Sequence[Fragment], device: torch.device
) -> Iterator[tuple[str, Tensor]]:
    """Every parameter of `shapes` whole, fp32, on the CPU of rank 0, one at a time.

    Collective: every rank must run through the iterator, other ranks get nothing from it.

    Args:
        shapes: all trained parameters, in the same order on every rank.
    """
    owned: dict[str, list[Fragment]] = {}
    for fragment in fragments:
        owned.setdefault(fragment.name, []).append(fragment)
    for name, shape in shapes.items():
        whole = torch.zeros(shape, dtype=torch.float32, device=device)
        for fragment in owned.get(name, []):
            stop = fragment.start + fragment.master.numel()
            whole.view(-1)[fragment.start : stop] = fragment.master
        if world_size() > 1:
            # Exactly one rank adds something other than zero to each element: the sum is exact.
            dist.reduce(whole, dst=0)
        if rank() == 0:
            yield name, whole.cpu()


def whole_weights(engine: Engine) -> dict[str, Tensor]:
    """Every trained parameter of an engine, fp32, on the CPU of rank 0 (others: empty). Collective."""
    return dict(gather_full(engine.parameter_shapes, engine.fragments(), engine.device))
