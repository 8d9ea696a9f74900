"""Sets that grow between starts of a run, in both orders, with weights and without."""

from __future__ import annotations

import itertools
import shutil
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


@pytest.mark.parametrize("weighted", [False, True])
def test_a_run_goes_on_when_shards_are_replaced_between_its_starts(
    run: Run, tmp_path: Path, write_shards: WriteShards, weighted: bool
) -> None:
    """Whatever has other numbers of samples keeps its place, unserved; all others come once in each epoch, as
    they would have. With as many samples, the new ones are served."""
    sources = [SourceConfig(str(tmp_path / "a"), weight=2.0), SourceConfig(str(tmp_path / "b"), weight=1.0)]
    config = config_for(*sources) if weighted else config_for(shards=str(tmp_path / "a"))
    name = "a/" if weighted else ""
    known = [f"{name}{key}" for key in write_shards(tmp_path / "a", [9, 12, 8, 11])]
    write_shards(tmp_path / "b", [21, 8, 15])
    reference, _, _ = run(config, 10)
    out, position, _ = run(config, 1)
    write_shards(tmp_path / "a", [30], first=1)  # other samples
    path = tmp_path / "a" / "00003.tar"
    path.write_bytes(path.read_bytes() + bytes(10240))  # as many, of another size
    some, position, rejected = run(config, 2, position=position)
    out += some
    assert rejected.keys() <= {"shard_replaced"}
    write_shards(tmp_path / "a", [5], first=2)  # another one, and one that joins
    known_later = [f"{name}{key}" for key in write_shards(tmp_path / "a", [10], first=4)]
    some, position, _ = run(config, 3, ranks=2, position=position)
    out += some
    assert [kept[1] for kept in position["kept"]] == [1, 2, 3]
    half, again, _ = run(config, 4, position=position)
    shutil.rmtree(tmp_path / "a" / "_index")  # positions have what they need by now
    assert run(config, 4, position=position, ranks=3)[:2] == (half, again)
    write_shards(tmp_path / "a", [1], first=4)  # what has joined may be replaced like the others
    write_shards(tmp_path / "a", [3], first=1)
    rest, position, _ = run(config, 30, position=again)
    out += half + rest
    assert [kept[1] for kept in position["kept"]] == [1, 2, 3, 4]
    planned = {
        ordinal: key for keys, ordinals, _ in reference for key, ordinal in zip(keys, ordinals, strict=True)
    }
    served = [pair for keys, ordinals, _ in out for pair in zip(ordinals, keys, strict=True)]
    assert len(set(served)) == len(served)
    own = [(ordinal, key) for ordinal, key in served if not key.startswith("b/")]
    before = [(ordinal, key) for ordinal, key in own if ordinal < 40 * position["grown"][0][1][0]]
    assert all(planned.get(ordinal, key) == key for ordinal, key in before)
    replaced = (f"{name}00001/", f"{name}00002/")
    first = [key for ordinal, key in own if ordinal < 40 and not key.startswith(replaced)]
    assert sorted(first) == [key for key in known if not key.startswith(replaced)]
    later = {key for ordinal, key in own if ordinal >= 40}
    assert later == {key for key in (*known, *known_later) if not key.startswith(replaced)}


def test_a_shard_that_is_no_tar_any_longer_keeps_its_place(
    run: Run, tmp_path: Path, write_shards: WriteShards
) -> None:
    """Where data.max_bad_shards takes it; also for those who begin after it."""
    keys = write_shards(tmp_path / "a", [9, 12, 8])
    config = config_for(shards=str(tmp_path / "a"), max_bad_shards=0.4)
    _, position, _ = run(config, 1)
    (tmp_path / "a" / "00001.tar").write_bytes(b"no tar" * 1000)
    out, _, rejected = run(config, 6, position=position)
    assert {key for served, _, _ in out for key in served} == {key for key in keys if "00001/" not in key}
    assert rejected.keys() == {"shard_replaced"}
    out, position, rejected = run(config, 3)
    assert not rejected
    write_shards(tmp_path / "a", [5], first=1)
    out, _, rejected = run(config, 6, position=position)
    assert {key for served, _, _ in out for key in served} == {key for key in keys if "00001/" not in key}
    assert rejected == {}  # of the shard this run counts none


def test_buckets_go_on_with_a_shard_that_was_replaced(
    run: Run, tmp_path: Path, write_shards: WriteShards
) -> None:
    write_shards(tmp_path / "a", [30, 40, 30])
    config = config_for(shards=str(tmp_path / "a"), buckets=True, bucket_step=8)
    _, position, _ = run(config, 2)
    keys = write_shards(tmp_path / "a", [50], first=1)
    out, later, rejected = run(config, 20, position=position)
    assert {key for served, _, _ in out for key in served} >= set(keys)
    assert not rejected
    assert run(config, 1, position=later)[0]
