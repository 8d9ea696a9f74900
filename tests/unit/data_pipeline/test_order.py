"""The order alone: exactly once, no dependence on layout, O(1) seek."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.errors import DataError
from data_pipeline.order.draws import permutation
from data_pipeline.order.lanes import Order, Part, choose_lanes, choose_window, deal, divisors, lanes_of


def lane_visits(order: Order, epoch: int, lane: int) -> list[tuple[int, int]]:
    """All (shard, row) of a lane in order, window by window."""
    offset, found = 0, []
    while offset < order.lane_size(lane):
        first, stop = order.window_of(lane, offset)
        assert first == offset
        shards, rows = order.visits(epoch, lane, first, stop)
        found += list(zip(shards.tolist(), rows.tolist(), strict=True))
        offset = stop
    return found


@settings(max_examples=150, deadline=None)
@given(
    counts=st.lists(st.integers(0, 40), min_size=1, max_size=12).filter(lambda c: sum(c) > 0),
    lanes=st.integers(1, 24),
    window=st.integers(1, 50),
    seed=st.integers(0, 2**63),
    epoch=st.integers(0, 5),
)
def test_every_sample_exactly_once_per_epoch(counts, lanes, window, seed, epoch) -> None:
    lanes = min(lanes, sum(counts))
    order = Order(np.asarray(counts), seed, lanes, window)
    found = list(itertools.chain.from_iterable(lane_visits(order, epoch, lane) for lane in range(lanes)))
    assert sorted(found) == [(s, r) for s, n in enumerate(counts) for r in range(n)]
    assert max(order.lane_size(x) for x in range(lanes)) - min(order.lane_size(x) for x in range(lanes)) <= 1


@settings(max_examples=100, deadline=None)
@given(
    counts=st.lists(st.integers(1, 40), min_size=1, max_size=12),
    lanes=st.integers(1, 24),
    window=st.integers(1, 50),
    at=st.floats(0, 1),
)
def test_any_window_can_be_entered_alone(counts, lanes, window, at) -> None:
    """Seek: the window around an offset gives the same visits as walking there."""
    lanes = min(lanes, sum(counts))
    order = Order(np.asarray(counts), 7, lanes, window)
    for lane in range(lanes):
        walked = lane_visits(order, 3, lane)
        offset = min(int(at * len(walked)), len(walked) - 1)
        first, stop = order.window_of(lane, offset)
        assert first <= offset < stop
        shards, rows = order.visits(3, lane, first, stop)
        assert list(zip(shards.tolist(), rows.tolist(), strict=True)) == walked[first:stop]


def test_ordinals_are_unique_over_epochs() -> None:
    order = Order(np.asarray([5, 9, 3]), 1, 4, 3)
    ordinals = [
        order.ordinal(epoch, lane, offset)
        for epoch in range(4)
        for lane in range(4)
        for offset in range(order.lane_size(lane))
    ]
    assert sorted(ordinals) == list(range(4 * 17))


def test_epochs_and_seeds_differ() -> None:
    orders = [
        lane_visits(Order(np.asarray([50] * 8), seed, 2, 16), epoch, 0)
        for seed, epoch in [(0, 0), (0, 1), (1, 0)]
    ]
    assert orders[0] != orders[1]
    assert orders[0] != orders[2]


def test_permutation_is_fixed_for_ever() -> None:
    """A change of this sequence would break every stored position."""
    assert permutation(42, 8).tolist() == [7, 4, 0, 2, 6, 5, 1, 3]
    assert permutation(2**63 + 5, 5).tolist() == [2, 3, 4, 1, 0]
    assert permutation(7, 1000)[:6].tolist() == [837, 984, 354, 427, 88, 891]
    assert sorted(permutation(42, 1000).tolist()) == list(range(1000))
    first = [permutation(key, 3).tolist() for key in range(600)]
    counts = [first.count(list(p)) for p in itertools.permutations(range(3))]
    assert min(counts) > 60  # 100 expected of each


def test_mixing_of_shards_per_batch() -> None:
    """With as many lanes as samples per batch, nearly every sample comes from another shard."""
    order = Order(np.asarray([1000] * 500), 3, 64, 256)
    picked = [int(order.visits(0, lane, *order.window_of(lane, 0))[0][0]) for lane in range(64)]
    assert len(set(picked)) >= 56


def test_seek_reads_no_more_than_one_window_at_scale() -> None:
    """200,000 shards, two thousand million samples: an offset deep in an epoch without walking there."""
    order = Order(np.full(200_000, 10_000), 5, 1024, 2048)
    lane, offset = 700, order.lane_size(700) - 5
    shards, rows = order.visits(3, lane, *order.window_of(lane, offset))
    assert len(shards) <= 2048
    assert rows.max() < 10_000


def test_lanes_are_chosen_and_refused() -> None:
    assert choose_lanes(0, 2048, 10**9) == 2048
    assert choose_lanes(0, 64, 50) == 32
    assert choose_lanes(16, 64, 1000) == 16
    with pytest.raises(DataError, match="does not divide global_batch_size=64; choose one of 1, 2, 4, 8"):
        choose_lanes(7, 64, 1000)
    with pytest.raises(DataError, match="exceeds the 10 samples"):
        choose_lanes(16, 64, 10)
    with pytest.raises(DataError, match="no samples"):
        choose_lanes(0, 64, 0)


@settings(deadline=None)
@given(
    units=st.integers(1, 4096),
    lane_units=st.integers(1, 6),
    ranks=st.integers(1, 1024),
    workers=st.integers(1, 9),
)
def test_every_lane_has_one_worker_of_one_rank(units: int, lane_units: int, ranks: int, workers: int) -> None:
    lanes = units * lane_units
    shares = deal(range(lanes), ranks, lane_units)
    dealt = [lane for share in shares for block in deal(share, workers) for lane in block]
    assert dealt == list(range(lanes))
    sizes = [len(share) for share in shares]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] - sizes[-1] in (0, lane_units)
    assert all(size % lane_units == 0 for size in sizes)


def test_a_lane_is_never_cut() -> None:
    """Micro-batches of 4 over lanes of 6 samples: two lanes stay together, as 12 is 3 micro-batches."""
    shares = [lanes_of(Part(rank, 3, together=4), 10, 60) for rank in range(3)]
    assert shares == [range(0, 4), range(4, 8), range(8, 10)]


def test_window_keeps_memory_bounded() -> None:
    assert choose_window(5, 10, 1e5) == 5
    assert choose_window(0, 2048, 1e5) == 16
    assert 1 <= choose_window(0, 32, 6e5) * 32 * 6e5 <= 1e9
    assert choose_window(0, 4, 10.0) == 2048


def test_divisors() -> None:
    assert divisors(12) == [1, 2, 3, 4, 6, 12]
    assert divisors(1) == [1]


def test_many_epochs_at_once_are_the_epochs_one_by_one() -> None:
    for seed in (0, 5, 2**63 + 11):
        order = Order(counts=np.array([6, 0, 4, 6]), seed=seed, lanes=4, window=3)
        shards, ends = order.streams(np.arange(40, 60))
        for i, epoch in enumerate(range(40, 60)):
            one_shards, one_ends = order.stream(epoch)
            assert (shards[i] == one_shards).all()
            assert (ends[i] == one_ends).all()
