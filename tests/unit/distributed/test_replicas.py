"""Ownership of replicated tensors: every element exactly once, in equal shares."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from trainer.distributed.replicas import owned_shares, replicated_fragments, synchronise

sizes = st.lists(st.integers(0, 40), min_size=1, max_size=8)


@given(sizes, st.integers(1, 7))
def test_shares_cover_every_element_once_in_equal_shares(counts: list[int], world_size: int) -> None:
    owners = [torch.zeros(count) for count in counts]
    totals = []
    for rank in range(world_size):
        shares = owned_shares(counts, rank, world_size)
        totals.append(sum(share.stop - share.start for share in shares))
        for share in shares:
            owners[share.index][share.start : share.stop] += 1
    assert all((owner == 1).all() for owner in owners)
    assert max(totals) - min(totals) <= 1


def test_fragments_are_views() -> None:
    master, moment = torch.zeros(2, 3), torch.zeros(2, 3)
    fragments = replicated_fragments(["w"], [master], [{"exp_avg": moment}], rank=1, world_size=2)
    assert [(f.name, f.shape, f.start, f.master.numel()) for f in fragments] == [("w", (2, 3), 3, 3)]
    fragments[0].master.fill_(1.0)
    fragments[0].moments["exp_avg"].fill_(2.0)
    assert master.tolist() == [[0, 0, 0], [1, 1, 1]]
    assert moment.tolist() == [[0, 0, 0], [2, 2, 2]]


def test_one_rank_needs_no_process_group() -> None:
    tensors = [torch.ones(3)]
    synchronise(tensors, rank=0, world_size=1)
    assert tensors[0].tolist() == [1, 1, 1]
