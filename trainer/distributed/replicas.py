"""Who owns which elements of tensors, and how replicas follow where several ranks hold the same."""

from __future__ import annotations

from collections.abc import Sequence
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


@dataclass(frozen=True)
class OwnedPart:
    """What this rank updates of one parameter."""

    fragment: Fragment
    owner: Tensor
    """The optimizer's tensor that the fragment is a view of, which has the gradient."""
    offset: int
    """First element in it."""

    @property
    def gradient(self) -> Tensor:
        """[n], a view."""
        assert self.owner.grad is not None
        return self.owner.grad.view(-1).narrow(0, self.offset, self.fragment.master.numel())


def owned_parts(fragments: Sequence[Fragment], owners: Sequence[Tensor]) -> list[OwnedPart]:
    """The fragments, each with the tensor, of the optimizer's, that it lies in."""
    by_storage: dict[int, list[Tensor]] = {}
    for owner in owners:
        by_storage.setdefault(owner.untyped_storage().data_ptr(), []).append(owner)
    parts = []
    for fragment in fragments:
        begin = int(fragment.master.storage_offset())
        for owner in by_storage.get(fragment.master.untyped_storage().data_ptr(), []):
            offset = begin - int(owner.storage_offset())
            if 0 <= offset < owner.numel():
                parts.append(OwnedPart(fragment, owner, offset))
                break
        else:
            raise AssertionError(f"{fragment.name} lies in none of the optimizer's tensors")
    return parts


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
