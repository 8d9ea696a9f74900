"""The real loader over real tars: the same global order at any layout, restart, filter and corruption."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from data_pipeline.config import DataConfig, SourceConfig
from data_pipeline.errors import DataError
from data_pipeline.loader import Part, build_loader, merge_positions
from data_pipeline.shards.view import ShardView, ShardViews

BATCH = 12


def config_for(url: str, **changes: object) -> DataConfig:
    return DataConfig(**{"shards": url, "image_size": 16, "workers": 0, "shuffle_window": 5, **changes})  # type: ignore[arg-type]


def run(
    config: DataConfig,
    steps: int,
    *,
    ranks: int = 1,
    position=None,
    seed: int = 3,
    batch: int = BATCH,
    together: int = 1,
):
    """Global batches (keys, ordinals, captions) of `steps` steps, and the position after the last."""
    loaders = [
        build_loader(
            config, seed=seed, global_batch_size=batch, part=Part(r, ranks, together), position=position
        )
        for r in range(ranks)
    ]
    out = []
    for _ in range(steps):
        parts = [next(loader) for loader in loaders]
        assert torch.cat([p.slots for p in parts]).tolist() == list(range(batch))
        assert len({p.pixels.shape[1:] for p in parts}) == 1  # also where a rank has no sample
        keys = [k for p in parts for k in p.keys]
        out.append(
            (keys, torch.cat([p.ordinals for p in parts]).tolist(), torch.cat([p.pixels for p in parts]))
        )
        position = merge_positions([json.loads(json.dumps(p.position)) for p in parts])
    rejected = sum((loader.rejected for loader in loaders), Counter())
    for loader in loaders:
        loader.close()
    return out, position, rejected


def same(a, b) -> bool:
    return all(x[0] == y[0] and x[1] == y[1] and torch.equal(x[2], y[2]) for x, y in zip(a, b, strict=True))


@settings(max_examples=10, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    counts=st.lists(st.integers(1, 25), min_size=1, max_size=5).filter(lambda c: sum(c) >= 24),
    ranks=st.integers(1, 14),
    again=st.integers(1, 14),
    together=st.sampled_from([1, 2, 3, 4]),
    stop=st.integers(1, 6),
    seed=st.integers(0, 99),
    corrupt=st.sets(st.integers(0, 30), max_size=6),
    filtered=st.booleans(),
    window=st.integers(1, 9),
)
@example(counts=[24], ranks=1, again=2, together=1, stop=1, seed=0, corrupt={0, 1}, filtered=False, window=1)
@example(counts=[30], ranks=5, again=14, together=4, stop=3, seed=0, corrupt=set(), filtered=False, window=4)
def test_order_survives_layout_restart_filter_and_corruption(
    tmp_path_factory, write_shards, counts, ranks, again, together, stop, seed, corrupt, filtered, window
) -> None:
    folder = tmp_path_factory.mktemp("shards")
    names = [f"{s:05d}/{s:05d}{i:04d}" for s, n in enumerate(counts) for i in range(n)]
    bad = frozenset(names[i] for i in corrupt if i < len(names))
    keys = write_shards(folder, counts, corrupt=bad)
    changes = {"shuffle_window": window, "filter": "score < 0.85" if filtered else ""}
    config = config_for(str(folder / "*.tar"), **changes)
    try:
        whole, _, _ = run(config, 8, seed=seed)
    except DataError:  # a lane of two samples, both corrupt, is refused: by every layout
        assert bad
        with pytest.raises(DataError, match="Every sample of lane"):
            run(config, 8, ranks=again, seed=seed)
        return
    parts, position, _ = run(config, stop, ranks=ranks, seed=seed, together=together)
    rest, _, _ = run(config, 8 - stop, ranks=again, position=position, seed=seed)
    assert same(parts + rest, whole)
    served = [k for k, _, _ in whole]
    assert not bad & set(itertools.chain.from_iterable(served))
    assert set(itertools.chain.from_iterable(served)) <= set(keys)


@pytest.mark.parametrize("filtered", [False, True])
def test_exactly_once_or_counted(tmp_path: Path, write_shards, filtered: bool) -> None:
    """After whole epochs of every lane: each sample served once per epoch, or rejected once per epoch."""
    bad = frozenset({"00001/000010003", "00000/000000000"})
    keys = write_shards(tmp_path, [30, 17, 25], corrupt=bad)
    rejects = tmp_path / "rejects.jsonl"
    config = config_for(
        str(tmp_path / "*.tar"), filter="score < 0.75" if filtered else "", reject_file=str(rejects)
    )
    loader = build_loader(config, seed=1, global_batch_size=BATCH)
    visits: Counter[tuple[int, str]] = Counter()
    while True:
        batch = next(loader)
        for key, ordinal in zip(batch.keys, batch.ordinals.tolist(), strict=True):
            visits[ordinal // len(keys), key] += 1
        if min(s[0] for s in batch.position["states"]) >= 3:
            break
    loader.close()
    for record in map(json.loads, rejects.read_text().splitlines()):
        visits[record["ordinal"] // len(keys), record["key"]] += 1
    assert loader.rejected["not_an_image"] >= 4
    assert (loader.rejected["filter: score < 0.75"] > 0) == filtered
    for epoch in range(3):
        assert {k: visits[epoch, k] for k in keys} == dict.fromkeys(keys, 1)


def test_mixture_keeps_exactly_once_per_source(tmp_path: Path, write_shards) -> None:
    # Both sources hold a 00000.tar with the same keys inside.
    rare = [f"a/{key}" for key in write_shards(tmp_path / "a", [10])]
    common = [f"b/{key}" for key in write_shards(tmp_path / "b", [40])]
    config = config_for(
        "",
        sources=(
            SourceConfig(str(tmp_path / "a" / "*.tar"), repeat=3),
            SourceConfig(str(tmp_path / "b" / "*.tar")),
        ),
    )
    seen, _, _ = run(config, 40, batch=14)
    total = 70
    counts = Counter(
        k for keys, ordinals, _ in seen for k, o in zip(keys, ordinals, strict=True) if o < total
    )
    assert counts == Counter({**dict.fromkeys(rare, 3), **dict.fromkeys(common, 1)})


def test_removed_and_skipped_are_never_served(make_shards, tmp_path: Path) -> None:
    url, _ = make_shards([30, 30])
    plain, _, _ = run(config_for(url), 5)
    removal = tmp_path / "removed.txt"
    gone = [plain[0][0][3].split("/")[1], "http://x.invalid/" + plain[1][0][5].split("/")[1]]
    gone.append(plain[2][0][1])  # as `trace` prints it
    gone.append("shards/" + plain[2][0][2])  # as it would, were there a second source with such names
    removal.write_text("# opt-outs\n" + "\n".join(gone) + "\n")
    seen, _, rejected = run(config_for(url, removal_lists=(str(removal),)), 10)
    served = {k for names, _, _ in seen for k in names}
    assert plain[0][0][3] not in served
    assert plain[1][0][5] not in served
    assert plain[2][0][1] not in served
    assert plain[2][0][2] not in served
    assert rejected["removed: removed.txt"] >= 4
    loader = build_loader(config_for(url), seed=3, global_batch_size=BATCH, skip_ordinals=plain[2][1][:4])
    ordinals = [o for _ in range(5) for o in next(loader).ordinals.tolist()]
    loader.close()
    assert not set(ordinals) & set(plain[2][1][:4])
    assert loader.rejected["skipped"] == 4


def test_wrong_positions_are_refused(make_shards) -> None:
    url, _ = make_shards([40])
    _, position, _ = run(config_for(url), 1)
    with pytest.raises(DataError, match="set seed=3"):
        build_loader(config_for(url), seed=4, global_batch_size=BATCH, position=position)
    with pytest.raises(DataError, match=r"set data\.lanes=12"):
        build_loader(config_for(url, lanes=6), seed=3, global_batch_size=BATCH, position=position)
    with pytest.raises(DataError, match=r"set data\.shuffle_window=5"):
        build_loader(config_for(url, shuffle_window=6), seed=3, global_batch_size=BATCH, position=position)
    with pytest.raises(DataError, match="class_label, layout"):
        build_loader(config_for(url, conditions=("label",)), seed=3, global_batch_size=BATCH)
    make_shards([41], first=7)
    url = url.replace("*", "00007")
    with pytest.raises(DataError, match="another set of shards"):
        build_loader(config_for(url), seed=3, global_batch_size=BATCH, position=position)


def test_all_rejected_is_an_error_not_a_hang(make_shards) -> None:
    url, _ = make_shards([20])
    with (
        pytest.raises(DataError, match=r"(?i)every sample of lane 0.*filter: score > 5"),
        build_loader(config_for(url, filter="score > 5"), seed=0, global_batch_size=4) as loader,
    ):
        next(loader)


@pytest.mark.parametrize("window", [10, 100, 400])
def test_a_window_over_many_shards_reads_each_index_once(
    make_shards, monkeypatch: pytest.MonkeyPatch, window: int
) -> None:
    url, keys = make_shards([10] * 40)
    loads, load = Counter[int](), ShardViews._load

    def counted(self: ShardViews, shard: int) -> ShardView:
        loads[shard] += 1
        return load(self, shard)

    monkeypatch.setattr(ShardViews, "_load", counted)
    config = config_for(url, lanes=1, shuffle_window=window, prefetch=1)
    with build_loader(config, seed=3, global_batch_size=8) as loader:
        served = [key for _ in range(50) for key in next(loader).keys]
    assert Counter(served) == Counter(keys)
    # Each once, as far ahead as is planned, and again those in which one window ends and another begins.
    assert len(loads) == 40
    assert loads.total() <= 40 * (1 if window < 400 else 2) + 16


def test_few_samples_reduce_the_lanes(make_shards) -> None:
    url, keys = make_shards([10])
    seen, position, _ = run(config_for(url), 5)
    assert position["lanes"] == 6
    first = Counter(k for names, ordinals, _ in seen for k, o in zip(names, ordinals, strict=True) if o < 10)
    assert first == Counter(keys)
    assert same(run(config_for(url), 5, ranks=4)[0], seen)  # of six lanes two have two
    assert same(run(config_for(url), 5, ranks=7)[0], seen)  # more ranks than lanes


def test_worker_processes_give_the_same_batches(make_shards) -> None:
    url, _ = make_shards([30, 30, 9])
    plain, _, _ = run(config_for(url), 6)
    two, position, _ = run(config_for(url, workers=2), 2)
    four, position, _ = run(config_for(url, workers=2), 2, ranks=2, position=position)
    many, _, _ = run(config_for(url, workers=3), 2, ranks=5, position=position)  # lanes for two, or three
    assert same(two + four + many, plain)
