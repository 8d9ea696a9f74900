"""Sets that grow between starts of a run, in both orders, with weights and without."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.config import DataConfig, SourceConfig
from data_pipeline.errors import DataError

WriteShards = Callable[..., list[str]]
Run = Callable[..., Any]


def config_for(*sources: SourceConfig, **changes: Any) -> DataConfig:
    given = {"image_size": 16, "workers": 0, "shuffle_window": 6, "lanes": 3}
    return DataConfig(sources=sources, **{**given, **changes})


@pytest.mark.parametrize("order", ["indexed", "streamed"])
@pytest.mark.parametrize("weighted", [False, True])
def test_a_set_may_grow_between_resumes(
    run: Run, tmp_path: Path, write_shards: WriteShards, order: Any, weighted: bool
) -> None:
    """New shards join at the next epoch of all lanes, again and again, whoever goes on from where: until then
    each old sample comes once per epoch, and from then on each of all."""
    sources = [SourceConfig(str(tmp_path / "a"), weight=2.0), SourceConfig(str(tmp_path / "b"), weight=1.0)]
    config = (
        config_for(*sources, order=order) if weighted else config_for(order=order, shards=str(tmp_path / "a"))
    )
    counts = [9, 12, 8, 11]
    keys = [write_shards(tmp_path / "a", counts)]
    write_shards(tmp_path / "b", [21, 8, 15])
    out, position, _ = run(config, 3)
    for first in (4, 6):
        keys.append(write_shards(tmp_path / "a", [10, 7], first=first))
        stopped = position
        some, position, _ = run(config, 8, ranks=2, position=position)
        assert len(position["grown"]) == len(keys) - 1
        half, between, _ = run(config, 3, position=stopped, ranks=3)
        rest, again, _ = run(config, 5, position=between)
        assert half + rest == some  # a position in the midst of it has all that is needed
        assert again == position
        out += some
    more, position, _ = run(config, 24, position=position)
    out += more
    untils = [until[0] for _, until in position["grown"]]
    assert 0 < untils[0] < untils[1]
    visits = Counter[tuple[int, str]]()
    for served, ordinals, _ in out:
        for key, ordinal in zip(served, ordinals, strict=True):
            if key.startswith("a/") or not weighted:
                visits[epoch_of(order, ordinal, untils, counts), key.removeprefix("a/")] += 1
    assert set(visits.values()) == {1}
    known = list[str]()
    for number, (start, stop) in enumerate(itertools.pairwise((0, *untils, untils[-1] + 1))):
        known += keys[number]
        for epoch in range(start, stop):
            assert {key for e, key in visits if e == epoch} == set(known), epoch


def epoch_of(order: str, ordinal: int, untils: list[int], counts: list[int]) -> int:
    """Epoch of a visit of the set of the test above, which grew by two shards of 17 samples twice."""
    unit = 1 << 24 if order == "streamed" else 1
    sizes = [4, 6, 8] if order == "streamed" else [sum(counts) + 17 * number for number in range(3)]
    place, epoch = ordinal // unit, 0
    while True:
        size = sizes[sum(until <= epoch for until in untils)]
        if place < size:
            return epoch
        place, epoch = place - size, epoch + 1


def test_shards_that_join_must_be_known_apart(run: Run, tmp_path: Path, write_shards: WriteShards) -> None:
    write_shards(tmp_path / "a", [40, 30], first=3)
    config = config_for(shards=str(tmp_path / "a"))
    _, position, _ = run(config, 2)
    write_shards(tmp_path / "a", [10], first=9)
    bucketed = config_for(shards=str(tmp_path / "a"), buckets=True, bucket_step=8)
    with pytest.raises(DataError, match=r"grown from 2 to 3 shards, and the shares of data.buckets"):
        run(bucketed, 1, position=position)
    write_shards(tmp_path / "a", [10], first=1)
    with pytest.raises(DataError, match=r"another set of shards.*only be added, with names behind those"):
        run(config, 1, position=position)
