"""Aspect-ratio buckets: shapes, each accepted sample once per epoch, one shape per step, exact resume."""

from __future__ import annotations

import dataclasses
import io
import json
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.config import DataConfig
from data_pipeline.errors import DataError
from data_pipeline.loader import Part, build_loader, merge_positions
from data_pipeline.order.buckets import ASPECTS, Buckets, aspect_of, bucket_shapes, make_buckets
from data_pipeline.order.lanes import Order

SIZES = [(32, 32), (64, 32), (32, 64), (48, 32), (66, 33), (40, 38)]


@pytest.fixture
def shards(tmp_path: Path, tiny_picture) -> tuple[str, dict[str, tuple[int, int]]]:
    """Three shards of pictures with six aspects; sizes (width, height) by key."""
    sizes = {}
    for shard in range(3):
        with tarfile.open(tmp_path / f"{shard:05d}.tar", "w") as tar:
            for i in range(40):
                size = SIZES[(i * 5 + shard) % len(SIZES)]
                key = f"{shard:05d}{i:04d}"
                sizes[f"{shard:05d}/{key}"] = size
                record = {"width": size[0], "height": size[1], "score": i / 40}
                members = [
                    ("jpg", tiny_picture(i, size=size)),
                    ("txt", b"x"),
                    ("json", json.dumps(record).encode()),
                ]
                for name, body in members:
                    info = tarfile.TarInfo(f"{key}.{name}")
                    info.size = len(body)
                    tar.addfile(info, io.BytesIO(body))
    return str(tmp_path / "*.tar"), sizes


def run(url: str, steps: int, *, ranks: int = 1, position=None, rejected=None, **changes):
    """[(keys, ordinals, shape)] per step and the last position; rejections are added to `rejected`."""
    config = DataConfig(
        shards=url, image_size=32, bucket_step=8, buckets=True, workers=0, shuffle_window=7, lanes=6
    )
    config = dataclasses.replace(config, **changes)
    loaders = [
        build_loader(config, seed=2, global_batch_size=6, part=Part(r, ranks), position=position)
        for r in range(ranks)
    ]
    out = []
    for _ in range(steps):
        parts = [next(loader) for loader in loaders]
        assert len({p.pixels.shape[2:] for p in parts}) == 1  # one shape for the whole global batch
        ordinals = torch.cat([p.ordinals for p in parts]).tolist()
        out.append(([k for p in parts for k in p.keys], ordinals, tuple(parts[0].pixels.shape[2:])))
        position = merge_positions([json.loads(json.dumps(p.position)) for p in parts])
    for loader in loaders:
        if rejected is not None:
            rejected.update(loader.rejected)
        loader.close()
    return out, position


def seen(out, steps: int) -> Counter[str]:
    return Counter(key for keys, _, _ in out[:steps] for key in keys)


def test_every_sample_once_per_epoch_and_in_its_bucket(shards) -> None:
    url, sizes = shards
    out, position = run(url, 60)
    assert min(s[0] for s in position["states"]) >= 1
    counts = Counter(k for keys, ordinals, _ in out for k, o in zip(keys, ordinals, strict=True) if o < 120)
    assert counts == Counter(dict.fromkeys(sizes, 1))
    for keys, _, (height, width) in out:
        for key in keys:
            w, h = sizes[key]
            assert (w > h) == (width > height) or abs(np.log2(w / h)) < 0.4


def test_resume_at_another_layout_goes_on_exactly(shards) -> None:
    whole, _ = run(shards[0], 14)
    first, position = run(shards[0], 5, ranks=2)
    rest, _ = run(shards[0], 9, ranks=3, position=position)
    assert first + rest == whole
    assert len({shape for _, _, shape in whole}) >= 2


@settings(max_examples=100, deadline=None)
@given(size=st.sampled_from([64, 256, 512, 1024]), step=st.sampled_from([8, 32, 64]), aspect=st.floats(1, 4))
def test_shapes_hold_their_promises(size, step, aspect) -> None:
    shapes = bucket_shapes(size, step, aspect)
    assert (size, size) in shapes
    assert {(w, h) for h, w in shapes} == set(shapes)
    for height, width in shapes:
        assert height % step == width % step == 0
        assert height * width <= size * size
        assert max(height / width, width / height) <= aspect


@pytest.mark.parametrize("keep", ["width > height", "width >= height or score > 0.7", "score < 0.3"])
def test_a_filter_leaves_each_accepted_sample_once_per_epoch(shards, keep: str, tmp_path: Path) -> None:
    """In every bucket: none twice up to its last whole batch, all after the one that begins the next."""
    url, sizes = shards
    file, rejected = tmp_path / "rejected.jsonl", Counter()
    out, _ = run(url, 60, filter=keep, reject_file=str(file), rejected=rejected, lanes=3)
    scores = {key: int(key[-4:]) / 40 for key in sizes}
    accepted = {
        key
        for key, (width, height) in sizes.items()
        if {"width > height": width > height, "score < 0.3": scores[key] < 0.3}.get(
            keep, width >= height or scores[key] > 0.7
        )
    }
    assert seen(out, 60).keys() == accepted
    for shape in {shape for _, _, shape in out}:
        steps = [step for step in out if step[2] == shape]
        own = seen(steps, len(steps)).keys()
        assert max(seen(steps, len(own) // 6).values(), default=1) == 1
        assert len(seen(steps, -(-len(own) // 6))) == len(own)
    # Over all buckets: at the end of an epoch, at most a batch per bucket is behind or ahead.
    shapes = len({shape for _, _, shape in out})
    assert len(accepted) - len(seen(out, len(accepted) // 6)) <= 6 * (shapes + 1)
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert rejected[f"filter: {keep}"] == len(lines)
    assert {line["key"] for line in lines} == sizes.keys() - accepted
    assert max(Counter((line["key"], line["ordinal"]) for line in lines).values()) == 1


def test_removal_lists_do_not_shift_the_order(shards, tmp_path: Path) -> None:
    whole, position = run(shards[0], 6, filter="width > height")
    gone = whole[1][0][0]
    (tmp_path / "gone.txt").write_text(gone)
    lists = (str(tmp_path / "gone.txt"),)
    removed = Counter()
    out, later = run(shards[0], 6, filter="width > height", removal_lists=lists, rejected=removed)
    assert later["accepted"] == position["accepted"]
    assert gone not in seen(out, 6)
    assert removed["removed: gone.txt"] >= 1
    run(shards[0], 1, filter="width > height", removal_lists=lists, position=position)


def test_nothing_accepted_is_told_at_the_start(shards) -> None:
    with pytest.raises(
        DataError, match=r"^0 of 120 samples are accepted, filter: score == 5 \(120\); loosen"
    ):
        run(shards[0], 1, filter="score == 5")
    with pytest.raises(DataError, match=r"^3 of 120 samples are accepted"):
        run(shards[0], 1, filter="score == 0.5")


def test_a_position_of_other_accepted_samples_goes_on_at_the_same_share(shards, caplog) -> None:
    """An older version's positions with buckets counted raw offsets; a filter may be changed on purpose."""
    out, position = run(shards[0], 6, bucket_max_aspect=1.0)
    assert [step[2] for step in out] == [(32, 32)] * 6
    older = {k: v for k, v in position.items() if k not in ("accepted", "totals")}
    _, same = run(shards[0], 1, position=older, bucket_max_aspect=1.0)
    assert "a few samples come twice or not at all" in caplog.text
    assert same == run(shards[0], 1, position=position, bucket_max_aspect=1.0)[1]
    _, filtered = run(shards[0], 1, position=position, bucket_max_aspect=1.0, filter="score < 0.5")
    assert {tuple(state) for state in filtered["states"]} == {(0, 4)}  # 6 of 20 became 3 of 10


@settings(max_examples=60, deadline=None)
@given(
    data=st.data(),
    lanes=st.sampled_from([1, 2, 6]),
    per_lane=st.sampled_from([1, 2]),
    seed=st.integers(0, 99),
)
def test_each_sample_once_per_epoch_of_its_bucket_whatever_the_counts(data, lanes, per_lane, seed) -> None:
    shapes = bucket_shapes(64, 16, 2.0)
    rows = data.draw(st.lists(st.tuples(*[st.integers(0, 40)] * 3), min_size=1, max_size=5))
    aspects = np.zeros((len(rows), ASPECTS), np.int64)
    aspects[:, aspect_of(np.asarray([1.0, 2, 7]), np.asarray([1.0, 3, 5]))] = rows
    if aspects.sum() < lanes:
        return
    raw = Order(aspects.sum(axis=1) + 3, seed, lanes, 8)
    buckets = make_buckets(shapes, aspects, raw)
    assert sum(order.total for order in buckets.orders) == aspects.sum()
    ordinals: set[int] = set()
    for order in buckets.orders:
        walks = [_walk(order, lane, 2) for lane in range(lanes)]
        batch = lanes * per_lane
        for turns in (order.total // batch, -(-order.total // batch)):
            served = Counter(visit for walk in walks for visit in walk[: turns * per_lane])
            assert max(served.values(), default=1) == 1 or turns * batch > order.total
            assert len(served) == order.total or turns * batch < order.total
        for lane in range(lanes):
            mine = {order.ordinal(epoch, lane, o) for epoch in (0, 1) for o in range(order.lane_size(lane))}
            assert not mine & ordinals
            ordinals |= mine
    assert ordinals == set(range(2 * int(aspects.sum())))


def _walk(order: Order, lane: int, epochs: int) -> list[tuple[int, int]]:
    """(shard, row) of a lane, epoch after epoch."""
    visits: list[tuple[int, int]] = []
    for epoch in range(epochs):
        offset = 0
        while offset < order.lane_size(lane):
            first, stop = order.window_of(lane, offset)
            visits += zip(*(each.tolist() for each in order.visits(epoch, lane, first, stop)), strict=True)
            offset = stop
    return visits


@settings(max_examples=60, deadline=None)
@given(totals=st.lists(st.integers(1, 10**6), min_size=1, max_size=9), seed=st.integers(0, 99))
def test_turns_follow_the_samples_and_need_no_history(totals, seed) -> None:
    orders = tuple(Order(np.asarray([total]), seed, 1, 8) for total in totals)
    buckets = Buckets(((1, 1),) * len(totals), orders)
    turns = [0] * len(totals)
    for step in range(300):
        assert buckets.turns(step) == turns
        for count, weight in zip(turns, buckets.weights, strict=True):
            assert abs(count - weight * step) <= 1 + weight * len(totals)
        turns[buckets.of_step(step)] += 1
    late = buckets.turns(10**9)
    assert sum(late) == 10**9
    assert all(
        abs(c - w * 10**9) <= 1.01 + w * len(totals) for c, w in zip(late, buckets.weights, strict=True)
    )


def test_rare_shapes_are_merged_and_missing_sizes_refused(tmp_path: Path, write_tar) -> None:
    aspects = np.zeros((1, ASPECTS), np.int64)
    aspects[0, aspect_of(np.asarray([64.0, 20.0]), np.asarray([64.0, 40.0]))] = 500, 1
    raw = Order(np.asarray([600]), 0, 8, 16)
    assert make_buckets(bucket_shapes(64, 16, 2.0), aspects, raw).shapes == ((64, 64),)
    write_tar(tmp_path / "0.tar", [(f"{i}.jpg", b"x") for i in range(9)])
    with pytest.raises(DataError, match="ldm data index"):
        run(str(tmp_path / "0.tar"), 1)
    with pytest.raises(DataError, match="bucket_step=48"):
        bucket_shapes(64, 48, 2.0)


def test_counts_are_kept_beside_the_index_and_hold_for_their_settings_alone(shards, caplog) -> None:
    folder = Path(shards[0]).parent / "_index"
    first, _ = run(shards[0], 3, filter="score < 0.5")
    assert len(list(folder.glob("accepted-*.npz"))) == 1
    with caplog.at_level("INFO"):
        assert run(shards[0], 3, filter="score < 0.5")[0] == first
        assert "counting" not in caplog.text
        run(shards[0], 3, filter="score < 0.6")
    assert "counting" in caplog.text
    (stored,) = set(folder.glob("accepted-*.npz")) - set(sorted(folder.glob("accepted-*.npz"))[1:])
    for file in folder.glob("accepted-*.npz"):
        file.write_bytes(stored.read_bytes()[:100])
    assert run(shards[0], 3, filter="score < 0.5")[0] == first
