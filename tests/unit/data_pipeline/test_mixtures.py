"""Sources with weights: shares of what is served, each source an exact order of its own, in both orders."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_pipeline.config import DataConfig, HeldOutConfig, SourceConfig
from data_pipeline.errors import DataError
from data_pipeline.loader import build_loader, open_dataset, open_held_out
from data_pipeline.order.mixture import Mixture
from data_pipeline.shards import view
from data_pipeline.shards.manifest import decode_listed
from data_pipeline.tools.trace import explain_step

BATCH = 12
COUNTS = {"a": [14, 9, 17, 12], "b": [21, 8, 15], "c": [9, 16, 11]}
WriteShards = Callable[..., list[str]]
Run = Callable[..., Any]


def config_for(*sources: SourceConfig, **changes: Any) -> DataConfig:
    given = {"image_size": 16, "workers": 0, "shuffle_window": 6, "lanes": 3}
    return DataConfig(sources=sources, **{**given, **changes})


@pytest.fixture(scope="module", name="folder")
def folder_fixture(tmp_path_factory: pytest.TempPathFactory, write_shards: WriteShards) -> Path:
    """Three sources, whose shards have the same names and keys."""
    folder = tmp_path_factory.mktemp("sources")
    for name, counts in COUNTS.items():
        bad = frozenset({"00001/000010003", "00000/000000001"}) if name == "b" else frozenset()
        write_shards(folder / name, counts, corrupt=bad)
    return folder


def source_of(key: str) -> str:
    return key.split("/")[0]


def shares(batches: list[Any]) -> dict[str, float]:
    served = Counter(source_of(key) for keys, *_ in batches for key in keys)
    return {name: count / sum(served.values()) for name, count in served.items()}


@settings(max_examples=60, deadline=None)
@given(
    weights=st.lists(st.floats(0.01, 100.0), min_size=1, max_size=5),
    lanes=st.sampled_from([1, 2, 7, 12, 64]),
    seed=st.integers(0, 99),
    first=st.integers(0, 10**9),
)
def test_every_batch_and_every_lane_has_the_shares(
    weights: list[float], lanes: int, seed: int, first: int
) -> None:
    mixture, total = Mixture(tuple(weights), lanes, seed), sum(weights)
    for row in range(first, first + 5):
        batch = Counter(mixture.source(lane, row) for lane in range(lanes))
        assert all(abs(batch[s] - lanes * w / total) < 1 for s, w in enumerate(weights))
    lane, seen = seed % lanes, Counter[int]()
    for number, row in enumerate(range(first, first + 300), 1):
        seen[mixture.source(lane, row)] += 1
        assert all(abs(seen[s] - number * w / total) < 4 for s, w in enumerate(weights))


@settings(max_examples=60, deadline=None)
@given(
    weights=st.lists(st.floats(0.01, 100.0), min_size=1, max_size=5),
    lanes=st.sampled_from([1, 7, 64]),
    seed=st.integers(0, 99),
    first=st.integers(0, 10**12),
)
def test_rows_of_each_source_are_counted_without_walking(
    weights: list[float], lanes: int, seed: int, first: int
) -> None:
    """Of the first rows, and of those between two late ones, as they are dealt one by one."""
    mixture, lane = Mixture(tuple(weights), lanes, seed), seed % lanes
    for begin in (0, first):
        dealt = Counter(mixture.source(lane, row) for row in range(begin, begin + 50))
        before, after = mixture.rows_before(lane, begin), mixture.rows_before(lane, begin + 50)
        assert [b - a for a, b in zip(before, after, strict=True)] == [dealt[s] for s in range(len(weights))]
        assert sum(before) == begin


@pytest.mark.parametrize("order", ["indexed", "streamed"])
@settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    weights=st.lists(st.floats(0.1, 5.0), min_size=2, max_size=3),
    layouts=st.lists(st.integers(1, 5), min_size=2, max_size=3),
    stop=st.integers(1, 4),
    seed=st.integers(0, 99),
    window=st.integers(1, 9),
)
def test_the_same_batches_at_any_layout_and_restart(
    run: Run,
    folder: Path,
    order: Any,
    weights: list[float],
    layouts: list[int],
    stop: int,
    seed: int,
    window: int,
) -> None:
    sources = [
        SourceConfig(str(folder / name), weight=weight, filter="score < 0.75" if name == "a" else None)
        for name, weight in zip(COUNTS, weights, strict=False)
    ]
    config = config_for(*sources, order=order, shuffle_window=window)
    whole, _, _ = run(config, stop * len(layouts), seed=seed)
    parts, position = [], None
    for ranks in layouts:  # killed after so many steps, again and again, at other numbers of ranks
        some, position, _ = run(config, stop, ranks=ranks, position=position, seed=seed)
        parts += some
    assert parts == whole


@pytest.mark.parametrize("order", ["indexed", "streamed"])
def test_loader_processes_give_the_same_batches(run: Run, folder: Path, order: Any) -> None:
    sources = [SourceConfig(str(folder / name), weight=weight) for name, weight in (("a", 2.0), ("b", 1.0))]
    plain, _, _ = run(config_for(*sources, order=order), 6)
    two, position, _ = run(config_for(*sources, order=order, workers=2), 2)
    three, position, _ = run(config_for(*sources, order=order, workers=3), 2, ranks=2, position=position)
    rest, _, _ = run(config_for(*sources, order=order, workers=1), 2, ranks=3, position=position)
    assert two + three + rest == plain


def test_indexes_are_kept_of_as_many_shards_as_lanes_walk_in_all_sources(
    run: Run, tmp_path: Path, write_shards: WriteShards, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = Counter[str]()

    def counted(data: bytes, url: str, checksum: str) -> Any:
        read[url] += 1
        return decode_listed(data, url, checksum)

    monkeypatch.setattr(view, "decode_listed", counted)
    sources = [SourceConfig(str(tmp_path / name), weight=1.0) for name in "abc"]
    for name in "abc":
        write_shards(tmp_path / name, [60] * 16)
    run(config_for(*sources, lanes=12, shuffle_window=16), 60)
    assert len(read) > 32  # two of each lane
    assert set(read.values()) == {1}


@pytest.mark.parametrize("order", ["indexed", "streamed"])
def test_each_source_comes_once_per_epoch_and_weights_are_of_what_is_served(
    run: Run, tmp_path: Path, folder: Path, order: Any
) -> None:
    """Half of `a` is filtered, some of `b` are damaged, one is removed: the shares stay those of the weights,
    and in each epoch of a source each of its samples is served or rejected once."""
    removed = tmp_path / "removed.txt"
    removed.write_text("c/00001/000010004\n")
    rejects = tmp_path / "rejects.jsonl"
    weights = {"a": 0.5, "b": 0.3, "c": 0.2}
    sources = [
        SourceConfig(str(folder / name), weight=weight, filter="score < 0.55" if name == "a" else None)
        for name, weight in weights.items()
    ]
    config = config_for(*sources, order=order, removal_lists=(str(removed),), reject_file=str(rejects))
    batches, _, _ = run(config, 60)
    for steps in (5, 20, 60):
        found = shares(batches[:steps])
        # Of each lane's rows no source is more than four away from its share.
        assert all(abs(found[n] - w) * steps * BATCH < 4 * config.lanes for n, w in weights.items())
    visits: Counter[tuple[str, int, str]] = Counter()
    unit = 1 << 56

    def count(key: str, ordinal: int) -> None:
        name, place = "abc"[ordinal // unit], ordinal % unit
        assert source_of(key) == name
        size = len(COUNTS[name]) << 24 if order == "streamed" else sum(COUNTS[name])
        visits[name, place // size, key] += 1

    for keys, ordinals, _ in batches:
        for key, ordinal in zip(keys, ordinals, strict=True):
            count(key, ordinal)
    reasons = Counter[str]()
    for record in map(json.loads, rejects.read_text().splitlines()):
        count(record["key"], record["ordinal"])
        reasons[record["reason"]] += 1
    assert {"filter: score < 0.55", "not_an_image", "removed: removed.txt"} == set(reasons)
    for name, counts in COUNTS.items():
        all_keys = {f"{name}/{s:05d}/{s:05d}{i:04d}" for s, n in enumerate(counts) for i in range(n)}
        epochs = {epoch for source, epoch, _ in visits if source == name}
        assert max(visits[name, epoch, key] for epoch in epochs for key in all_keys) == 1
        assert {key for source, epoch, key in visits if (source, epoch) == (name, 0)} == all_keys
    assert not any("000010004" in key for keys, *_ in batches for key in keys if source_of(key) == "c")


def test_a_source_has_captions_crop_and_conditions_of_its_own(
    tmp_path: Path, write_tar: Any, tiny_picture: Any
) -> None:
    for name in ("plain", "labelled"):
        members = []
        for i in range(30):
            record = {"long": f"long {name} {i}", "class_label": i, "score": i % 2}
            members += [
                (f"{i:04d}.jpg", tiny_picture(i, size=(48, 24))),
                (f"{i:04d}.json", json.dumps(record).encode()),
                (f"{i:04d}.txt", f"short {name} {i}".encode()),
            ]
        write_tar(tmp_path / name / "0.tar", members)
    labelled = SourceConfig(str(tmp_path / "labelled"))
    plain = SourceConfig(
        str(tmp_path / "plain"),
        captions=("long",),
        crop="random",
        horizontal_flip=True,
        filter="score == 1",
        conditions=(),
    )
    common = {"conditions": ("class_label", "layout"), "caption_weights": (1.0,), "max_layout_boxes": 2}
    labelled = SourceConfig(labelled.shards, conditions=("class_label",))
    sources = labelled, plain
    for weights in ((None, None), (1.0, 2.0)):  # by repeat, and by weight
        mine = [
            SourceConfig(**{**vars(source), "weight": weight})
            for source, weight in zip(sources, weights, strict=True)
        ]
        with build_loader(config_for(*mine, **common), seed=1, global_batch_size=BATCH) as loader:
            batches = list(itertools.islice(loader, 12))
        rows = [
            (key, caption, label, tuple(size), box)
            for batch in batches
            for key, caption, label, size, box in zip(
                batch.keys,
                batch.captions,
                batch.conditions["class_label"].tolist(),
                batch.conditions["size"].tolist(),
                batch.conditions["layout"].tolist(),
                strict=True,
            )
        ]
        assert {source_of(key) for key, *_ in rows} == {"plain", "labelled"}
        for key, caption, label, _, boxes in rows:
            number = int(key.split("/")[-1])
            if source_of(key) == "plain":
                assert caption == f"long plain {number}"
                assert number % 2
                assert label == -1
            else:
                assert caption == f"short labelled {number}"
                assert label == number
            assert boxes == [[-1.0, 0.0, 0.0, 0.0, 0.0]] * 2  # neither has a layout
        lefts = {
            name: {size[3] for key, _, _, size, _ in rows if source_of(key) == name}
            for name in ("plain", "labelled")
        }
        assert lefts["labelled"] == {8}  # of 32 x 16, the middle 16
        assert len(lefts["plain"]) > 3
    measured = open_held_out(
        config_for(
            SourceConfig(**{**vars(labelled), "weight": 1.0}),
            SourceConfig(**{**vars(plain), "weight": 2.0}),
            **common,
            validation=HeldOutConfig(share=0.4),
        ),
        100,
        seed=1,
        global_batch_size=BATCH,
    )
    weight = Counter[str]()
    for sample in measured.samples:
        weight[source_of(sample.key)] += sample.weight
        assert source_of(sample.key) == "labelled" or int(sample.key.split("/")[-1]) % 2
    assert weight["plain"] == pytest.approx(2 * weight["labelled"])
    assert sum(weight.values()) == pytest.approx(len(measured))


def test_buckets_of_sources_with_weights(run: Run, tmp_path: Path, write_tar: Any, tiny_picture: Any) -> None:
    """Each source keeps its share over all shapes, each accepted sample comes once per epoch of its walk, and
    a shape that one source has not is left to the others."""
    shapes = {"a": [(32, 16)] * 30 + [(22, 22)] * 30, "b": [(22, 22)] * 40 + [(30, 17)] * 2}
    for name, sizes in shapes.items():
        members = []
        for i, size in enumerate(sizes):
            members += [
                (f"{i:04d}.jpg", tiny_picture(i, size=size)),
                (f"{i:04d}.json", json.dumps({"score": i % 10}).encode()),
                (f"{i:04d}.txt", b"caption"),
            ]
        write_tar(tmp_path / name / "0.tar", members)
    sources = [
        SourceConfig(str(tmp_path / "a"), weight=0.6, filter="score < 8"),
        SourceConfig(str(tmp_path / "b"), weight=0.4),
    ]
    config = config_for(*sources, buckets=True, image_size=64, bucket_step=16, lanes=2, allow_enlarging=True)
    batches, position, _ = run(config, 80)
    assert position["walks"] == [[0, 0], [1, 0], [1, 1]]
    found = shares(batches)
    assert found["a"] == pytest.approx(0.6, abs=0.03)
    wide = [keys for keys, _, pixels in batches if len(pixels[0][0]) != len(pixels[0][0][0])]
    assert {source_of(key) for keys in wide for key in keys} == {"a"}
    visits = Counter(
        (ordinal >> 56, (ordinal & ((1 << 56) - 1)) // (48, 42)[ordinal >> 56], key)
        for keys, ordinals, _ in batches
        for key, ordinal in zip(keys, ordinals, strict=True)
    )
    assert set(visits.values()) == {1}
    first = {source: {key for s, e, key in visits if (s, e) == (source, 0)} for source in (0, 1)}
    assert {source: len(keys) for source, keys in first.items()} == {0: 48, 1: 42}
    some, stopped, _ = run(config, 30, ranks=2)
    rest, _, _ = run(config, 50, position=stopped)
    assert some + rest == batches


def place_of(order: str, counts: dict[str, list[int]], ordinal: int) -> tuple[str, int]:
    """Source and epoch of a visit of a set that did not grow."""
    name, place = "abc"[ordinal >> 56], ordinal & ((1 << 56) - 1)
    return name, place // (len(counts[name]) << 24 if order == "streamed" else sum(counts[name]))


@pytest.mark.parametrize("order", ["indexed", "streamed"])
def test_weights_may_change_and_sources_may_join_at_a_resume(run: Run, folder: Path, order: Any) -> None:
    """Each source goes on where it was: over all of it, each sample comes once in each of its epochs."""

    def mixed(**weights: float) -> DataConfig:
        sources = (SourceConfig(str(folder / name), weight=weight) for name, weight in weights.items())
        return config_for(*sources, order=order, shuffle_window=9)

    before, position, _ = run(mixed(a=1.0, b=1.0), 4)
    after, later, _ = run(mixed(a=1.0, b=3.0, c=1.0), 10, ranks=2, position=position)
    assert shares(after)["b"] == pytest.approx(0.6, abs=0.1)
    last, _, _ = run(mixed(a=5.0, b=1.0, c=1.0), 12, ranks=3, position=later)
    assert shares(last)["a"] == pytest.approx(5 / 7, abs=0.1)
    visits = Counter(
        (place_of(order, COUNTS, ordinal), key)
        for keys, ordinals, _ in before + after + last
        for key, ordinal in zip(keys, ordinals, strict=True)
    )
    assert set(visits.values()) == {1}
    assert {key for place, key in visits if place == ("a", 0)} == {
        f"a/{shard:05d}/{shard:05d}{i:04d}" for shard, count in enumerate(COUNTS["a"]) for i in range(count)
    }
    with pytest.raises(DataError, match="another set of shards"):
        run(mixed(a=1.0, b=1.0), 1, position=later)
    plain = (SourceConfig(str(folder / name)) for name in "ab")
    unweighted = config_for(*plain, order=order, shuffle_window=9)
    with pytest.raises(
        DataError, match=r"a set with weights of its sources, this run is one without; restore"
    ):
        run(unweighted, 1, position=position)


def bad(folder: Path, *given: dict[str, Any], **changes: Any) -> DataConfig:
    sources = [SourceConfig(str(folder / name), **own) for name, own in zip("abc", given, strict=False)]
    return config_for(*sources, **changes)


@pytest.mark.parametrize(
    ("given", "changes", "told"),
    [
        ([{"weight": 1.0}, {}], {}, r"b has no weight and .*a has one; give each a weight, or none"),
        ([{"weight": 1.0, "repeat": 2}, {"weight": 1.0}], {}, r"a has a weight and repeat=2"),
        ([{"caption_weights": (1.0, 2.0)}, {}], {}, r"caption_weights=\[1.0, 2.0\] of .*a must be one"),
        ([{"conditions": ("depth",)}, {}], {}, r"a has the condition depth, which the model does not read"),
        ([{"conditions": ()}, {}], {"conditions": ("depth",)}, r"a leaves out depth, and there is no depth"),
        ([{"weight": 1.0}, {"weight": 1.0}], {"order": "resampled"}, r"knows repeat alone; set data.order"),
        ([{"filter": "scor < 1"}, {}], {}, r"the column scor, which is not in any of .*nearest is score"),
        ([{"filter": "score <"}, {}], {"order": "streamed"}, r"not valid"),
        ([{"captions": ("long",)}, {}], {}, r"data.captions names long"),
        (
            [{"weight": 1.0}, {"weight": 1.0, "filter": "score > 5"}],
            {},
            r"Every sample of lane \d of source 1",
        ),
    ],
)
def test_what_contradicts_itself_is_one_sentence(
    run: Run, folder: Path, given: list[dict[str, Any]], changes: dict[str, Any], told: str
) -> None:
    with pytest.raises(DataError, match=told):
        run(bad(folder, *given, **changes), 1)


@pytest.mark.parametrize("buckets", [False, True])
def test_a_mixture_by_weights_is_explained_as_it_is_served(run: Run, folder: Path, buckets: bool) -> None:
    """Over the epochs of both sources; the damaged pictures of b are known by the reject file."""
    given = [{"weight": 2.5, "filter": "score < 0.75"}, {"weight": 1.0}]
    shape = {"buckets": True, "bucket_step": 4, "allow_enlarging": True} if buckets else {}
    known = bad(folder, *given, reject_file=str(folder / f"rejects-{buckets}.jsonl"), **shape)
    served, _, rejected = run(known, 16)
    assert rejected["not_an_image"] >= 1
    for step, (keys, ordinals, _) in enumerate(served):
        told = list(explain_step(known, 3, BATCH, step))
        assert [(r["slot"], r["key"], r["ordinal"]) for r in told] == [
            (slot, *pair) for slot, pair in enumerate(zip(keys, ordinals, strict=True))
        ]
    late = list(explain_step(bad(folder, *given, **shape), 3, BATCH, 10**6))  # in sums
    assert {source_of(record["key"]) for record in late} == {"a", "b"}
    assert min(record["epoch"] for record in late) > 10**4


def test_a_mixture_by_weights_is_explained_by_the_index_alone(run: Run, folder: Path) -> None:
    strict = SourceConfig(str(folder / "c"), weight=2.0, filter="score < 0.4")
    config = config_for(SourceConfig(str(folder / "a"), weight=1.0), strict)
    served, _, _ = run(config, 20)
    for step, (keys, ordinals, _) in enumerate(served):
        told = list(explain_step(config, 3, BATCH, step))
        assert [(r["key"], r["ordinal"]) for r in told] == list(zip(keys, ordinals, strict=True))


def test_a_filter_of_a_source_is_explained(run: Run, folder: Path) -> None:
    own = bad(folder, {"filter": "score < 0.4"}, {})
    told = [record["key"] for record in explain_step(own, 3, BATCH, 2)]
    damaged = {"b/00001/000010003", "b/00000/000000001"}
    assert not damaged & {key for keys, *_ in run(own, 3)[0] for key in keys}
    assert set(told) <= {key for keys, *_ in run(own, 4)[0] for key in keys} | damaged
    weighted = bad(folder, {"weight": 1.0}, {"weight": 1.0})
    assert open_dataset(weighted).epoch_samples == 2 * max(sum(COUNTS["a"]), sum(COUNTS["b"]))
