"""`ldm data explain`, `ldm data trace` and the real loader name the same samples."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from data_pipeline.config import DataConfig, SourceConfig
from data_pipeline.loader import build_loader
from data_pipeline.tools.trace import explain_step, trace
from trainer.__main__ import main

ROOT = Path(__file__).parents[3]
BATCH, SEED = 12, 3
STEPS = range(0, 16)


@pytest.fixture(params=["plain", "filter", "removed", "mixture", "buckets", "buckets and filter"])
def config(request, tmp_path: Path, write_shards, write_tar, tiny_picture) -> DataConfig:
    """51 samples an epoch (mixture: 85) in steps of 12, so that epochs end inside a step."""
    if "buckets" in request.param:
        for shard, count in enumerate((25, 26)):
            members = []
            for i in range(count):
                key = f"{shard}{i:03d}"
                size = ((20, 16), (16, 20), (18, 18))[i % 3]
                members.append((f"{key}.jpg", tiny_picture(i, size=size)))
                members.append((f"{key}.json", json.dumps({"score": i % 10 / 10}).encode()))
                members.append((f"{key}.txt", b"caption"))
            write_tar(tmp_path / f"{shard}.tar", members)
    else:
        keys = write_shards(tmp_path, [17, 9, 25])
    url = str(tmp_path / "*.tar")
    common = DataConfig(shards=url, image_size=16, workers=0, shuffle_window=5)
    if request.param == "filter":
        return DataConfig(**{**vars(common), "filter": "score < 0.65"})
    if request.param == "removed":
        (tmp_path / "gone.txt").write_text("\n".join([keys[2], keys[20], keys[50]]))
        return DataConfig(**{**vars(common), "removal_lists": (str(tmp_path / "gone.txt"),)})
    if request.param == "mixture":
        write_shards(tmp_path / "rare", [17], first=7)
        sources = (SourceConfig(url), SourceConfig(str(tmp_path / "rare" / "*.tar"), repeat=2))
        return DataConfig(**{**vars(common), "shards": "", "sources": sources})
    if "buckets" in request.param:
        bucketed = {**vars(common), "buckets": True, "bucket_step": 4, "bucket_max_aspect": 1.5}
        return DataConfig(**{**bucketed, "filter": "score < 0.85" if "filter" in request.param else ""})
    return common


@pytest.mark.parametrize("ranks", [1, 2])
def test_explain_names_what_the_loader_serves(config: DataConfig, ranks: int) -> None:
    loaders = [
        build_loader(config, seed=SEED, global_batch_size=BATCH, rank=rank, world_size=ranks)
        for rank in range(ranks)
    ]
    served = []
    for _ in STEPS:
        batches = [next(loader) for loader in loaders]
        served.append(
            [
                (slot, key, ordinal)
                for batch in batches
                for slot, key, ordinal in zip(
                    batch.slots.tolist(), batch.keys, batch.ordinals.tolist(), strict=True
                )
            ]
        )
    for loader in loaders:
        loader.close()
    traced = dict(trace(config, SEED, BATCH, steps=STEPS, ranks=ranks))
    assert traced == {step: [key for _, key, _ in served[step]] for step in STEPS}
    explained = [list(explain_step(config, SEED, BATCH, step)) for step in STEPS]
    assert [[(r["slot"], r["key"], r["ordinal"]) for r in records] for records in explained] == served
    assert max(record["epoch"] for record in explained[-1]) >= 2, "three epochs are met"


def test_explain_counts_what_was_rejected_before(tmp_path: Path, write_shards) -> None:
    """In a single lane, what is not served is rejected: offset = served before + rejected before."""
    write_shards(tmp_path, [40])  # score of sample i: (7 i mod 10) / 10, so 8 of 40 are rejected
    config = DataConfig(
        shards=str(tmp_path / "*.tar"),
        image_size=16,
        workers=0,
        shuffle_window=5,
        lanes=1,
        filter="score < 0.75",
    )
    records = [record for step in range(10) for record in explain_step(config, SEED, 4, step)]
    assert [record["epoch"] for record in records] == [0] * 32 + [1] * 8
    for served, record in enumerate(records):
        assert record["ordinal"] == served + record["rejected_before"]
    assert 8 <= records[-1]["rejected_before"] <= 16


def test_the_commands_print_the_same(
    tmp_path: Path, write_shards, capsys: pytest.CaptureFixture[str]
) -> None:
    write_shards(tmp_path, [17, 9, 25])
    arguments = [
        str(ROOT / "configs" / "demo_text_to_image.yaml"),
        f"data.shards={tmp_path}/*.tar",
        "data.image_size=32",
        "data.allow_enlarging=true",
        "data.filter=score < 0.65",
        f"global_batch_size={BATCH}",
        "micro_batch_size=6",
    ]
    assert main(["data", "trace", *arguments, "--steps", "3:6", "--ranks", "2", "--workers", "0"]) == 0
    traced = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [record["step"] for record in traced] == [3, 4, 5]
    for record in traced:
        assert main(["data", "explain", *arguments, "--step", str(record["step"])]) == 0
        explained = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        assert [r["key"] for r in explained] == record["keys"]
        assert [r["slot"] for r in explained] == list(range(BATCH))


def test_late_steps_are_explained_at_once(config: DataConfig) -> None:
    """A million steps, tens of thousands of epochs, pass in sums; a walk from there on agrees with itself."""
    late = 1_000_000
    records = list(explain_step(config, SEED, BATCH, late))
    assert [record["slot"] for record in records] == list(range(BATCH))
    assert min(record["epoch"] for record in records) > 50_000
    if config.buckets:
        return  # other steps are of other buckets
    following = list(explain_step(config, SEED, BATCH, late + 1))
    for one, other in zip(records, following, strict=True):
        assert other["ordinal"] > one["ordinal"]
        if other["epoch"] == one["epoch"]:
            rejected = other["rejected_before"] - one["rejected_before"]
            assert other["ordinal"] - one["ordinal"] == 1 + rejected
