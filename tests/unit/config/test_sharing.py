"""A global batch on any number of ranks: who has what, how many rows are computed, and what is refused."""

from __future__ import annotations

from math import lcm
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.batch import Batch
from data_pipeline.order.lanes import Part, lanes_of
from trainer.config.io import load_config
from trainer.config.run import ConfigError
from trainer.config.sharing import Sharing


@settings(deadline=None)
@given(
    lanes=st.integers(1, 4096),
    per_lane=st.integers(1, 8),
    ranks=st.integers(1, 1024),
    at_once=st.integers(1, 64),
    whole=st.booleans(),
)
def test_all_samples_once_in_as_many_passes_everywhere(
    lanes: int, per_lane: int, ranks: int, at_once: int, whole: bool
) -> None:
    if whole:  # a first stage: the batch is a multiple of the micro-batch
        lanes = lcm(lanes * per_lane, at_once) // per_lane
    batch = lanes * per_lane
    sharing = Sharing(batch, ranks, at_once, lcm(per_lane, at_once) if whole else per_lane)
    shares = [lanes_of(Part(rank, ranks, sharing.together), lanes, batch) for rank in range(ranks)]
    sizes = [len(share) * per_lane for share in shares]
    assert [lane for share in shares for lane in share] == list(range(lanes))
    assert max(sizes) == sharing.largest_share
    assert max(sizes) - min(sizes) in (0, sharing.together)
    assert sharing.rows <= at_once
    # One pass less would not do, nor one row less of each.
    assert (sharing.micro_batches - 1) * at_once < max(sizes) <= sharing.micro_batches * sharing.rows
    assert sharing.micro_batches * (sharing.rows - 1) < max(sizes)
    assert sharing.computed == ranks * sharing.micro_batches * sharing.rows
    assert sharing.gain == pytest.approx(1 / (1 - sharing.waste))
    if whole:
        assert sharing.rows == at_once
    if batch % (ranks * at_once) == 0 and batch // ranks % sharing.together == 0:
        found = (sharing.rows, sharing.micro_batches, sharing.gain, sharing.waste)
        assert found == (at_once, batch // ranks // at_once, 1.0, 0.0)
    fewest = Sharing(batch, sharing.fewest_ranks, at_once, sharing.together)
    assert fewest.ranks <= ranks
    assert (fewest.rows, fewest.micro_batches) == (sharing.rows, sharing.micro_batches)
    assert fewest.ranks == 1 or Sharing(
        batch, fewest.ranks - 1, at_once, sharing.together
    ).largest_share > max(sizes)


def batch_of(samples: int) -> Batch:
    """Sample i is i everywhere."""
    numbers = torch.arange(samples)
    pixels = (
        numbers.to(torch.uint8).view(-1, 1, 1, 1).expand(samples, 4, 6, 3).contiguous().permute(0, 3, 1, 2)
    )
    names = tuple(map(str, range(samples)))
    return Batch(pixels, names, {"size": numbers[:, None].float()}, names, numbers, numbers, {})


@settings(deadline=None)
@given(samples=st.integers(0, 20), size=st.integers(1, 9), more=st.integers(0, 3))
def test_micro_batches_are_filled_up_with_rows_of_the_rank(samples: int, size: int, more: int) -> None:
    count = -(-samples // size) + more
    parts = batch_of(samples).micro_batches(size, count)
    assert len(parts) == count
    assert all(len(part) == size for part in parts)
    real = [int(key) for part in parts for key in part.keys[: size - part.padding]]
    assert real == list(range(samples))
    assert sum(part.padding for part in parts) == count * size - samples
    for part in parts:
        expected = torch.tensor([int(key or 0) for key in part.keys])
        assert part.captions == part.keys
        assert torch.equal(part.ordinals, expected)
        assert torch.equal(part.slots, expected)
        assert torch.equal(part.conditions["size"], expected[:, None].float())
        assert torch.equal(part.pixels[:, 0, 0, 0].long(), expected)
        if samples and size > 1:
            assert part.pixels.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("name", ["sd2_base_256", "sd2_base_512", "sd2_768_v", "sd2_inpaint", "sd1_512"])
def test_shipped_configurations_train_on_any_allocation(name: str) -> None:
    config = load_config(f"configs/sd/{name}.yaml", [])
    for ranks in (1, 3, 7, 255, 256, 257, 504, 512, 1000, 1024, 2048):
        sharing = config.sharing(ranks)
        assert sharing.micro_batches * sharing.rows * ranks >= config.global_batch_size
    assert config.sharing(512).waste == config.sharing(1024).waste == 0
    assert config.sharing(504).waste < 0.34
    assert config.accumulation(64) == 2048 // 64 // config.micro_batch_size
    with pytest.raises(ConfigError, match="2049 ranks cannot share global_batch_size=2048; use 1 to 2048"):
        config.sharing(2049)


def test_a_first_stage_keeps_its_micro_batches() -> None:
    words = ["stage=autoencoder", "global_batch_size=24", "micro_batch_size=4"]
    config = load_config(None, words)
    three = config.sharing(4)  # 2, 2, 1 and 1 of six
    assert (three.rows, three.micro_batches, three.together, three.computed) == (4, 2, 4, 32)
    with pytest.raises(ConfigError, match=r"7 ranks .*micro-batches of 4 stay whole.*use 1 to 6 ranks"):
        config.sharing(7)
    with pytest.raises(ConfigError, match="multiple of micro_batch_size=5"):
        load_config(None, [*words[:2], "micro_batch_size=5"])


@pytest.mark.parametrize(
    ("overrides", "shape"),
    [
        (["global_batch_size=10", "micro_batch_size=4"], (4, 3)),
        (["global_batch_size=4", "micro_batch_size=8"], (4, 1)),
        (["global_batch_size=12", "micro_batch_size=12", "data.lanes=4"], (12, 1)),
    ],
)
def test_one_rank_takes_any_batch(overrides: list[Any], shape: tuple[int, int]) -> None:
    sharing = load_config(None, overrides).sharing(1)
    assert (sharing.rows, sharing.micro_batches) == shape


def test_lanes_bound_what_a_rank_may_have() -> None:
    sharing = load_config(None, ["global_batch_size=64", "micro_batch_size=64", "data.lanes=8"]).sharing(3)
    assert (sharing.together, sharing.largest_share) == (8, 24)
    assert sharing.sentence() == ("64 samples on 3 ranks are 1 x 24 each: 11.1 % of the rows are padding")
    assert (
        "; 8 ranks make a step as short"
        in load_config(None, ["global_batch_size=64", "data.lanes=8"]).sharing(9).sentence()
    )
