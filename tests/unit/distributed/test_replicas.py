"""Ownership of replicated tensors: every element exactly once, in equal shares."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from trainer.distributed.replicas import owned_runs, replicated_fragments, synchronise

sizes = st.lists(st.integers(0, 40), min_size=1, max_size=8)


@given(sizes, st.integers(1, 7))
def test_runs_cover_every_element_once_in_equal_shares(counts: list[int], world_size: int) -> None:
    owners = [torch.zeros(count) for count in counts]
    shares = []
    for rank in range(world_size):
        runs = owned_runs(counts, rank, world_size)
        shares.append(sum(run.stop - run.start for run in runs))
        for run in runs:
            owners[run.index][run.start : run.stop] += 1
    assert all((owner == 1).all() for owner in owners)
    assert max(shares) - min(shares) <= 1


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
