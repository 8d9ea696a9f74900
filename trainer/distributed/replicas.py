"""Who owns which elements of tensors that every rank holds whole, and how replicas follow."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from trainer.distributed.engine import Fragment


@dataclass(frozen=True)
class Share:
    """Elements [start, stop) of the flattened tensor number `index`."""

    index: int
    start: int
    stop: int


def owned_shares(sizes: list[int], rank: int, world_size: int) -> list[Share]:
    """The shares of `rank` when all elements, laid end to end, are cut into `world_size` equal parts.

    Over all ranks they cover every element exactly once.
    """
    total = sum(sizes)
    first, last = total * rank // world_size, total * (rank + 1) // world_size
    shares, offset = [], 0
    for index, size in enumerate(sizes):
        start, stop = max(first, offset), min(last, offset + size)
        if start < stop:
            shares.append(Share(index, start - offset, stop - offset))
        offset += size
    return shares


def replicated_fragments(
    names: list[str],
    masters: list[Tensor],
    moments: list[dict[str, Tensor]],
    *,
    rank: int,
    world_size: int,
) -> list[Fragment]:
    """Views of this rank's share of contiguous tensors that every rank holds whole."""
    assert all(master.is_contiguous() for master in masters)
    return [
        Fragment(
            name=names[share.index],
            shape=tuple(masters[share.index].shape),
            start=share.start,
            master=masters[share.index].detach().view(-1)[share.start : share.stop],
            moments={
                key: value.view(-1)[share.start : share.stop] for key, value in moments[share.index].items()
            },
        )
        for share in owned_shares([master.numel() for master in masters], rank, world_size)
    ]


@torch.no_grad()
def synchronise(
    tensors: list[Tensor], rank: int, world_size: int, *, group: dist.ProcessGroup | None = None
) -> None:
    """Give every rank (of the group) the elements that their owners hold, in place."""
    if world_size == 1:
        return
    flat = [tensor.detach().view(-1) for tensor in tensors]
    sizes = [tensor.numel() for tensor in tensors]
    for owner in range(world_size):
        parts = [flat[s.index][s.start : s.stop] for s in owned_shares(sizes, owner, world_size)]
        if not parts:
            continue
        packed = torch.cat(parts)
        dist.broadcast(packed, group=group, group_src=owner)
        if owner != rank:
            torch._foreach_copy_(parts, list(packed.split([part.numel() for part in parts])))
