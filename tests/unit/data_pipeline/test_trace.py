"""`ldm data explain`, `ldm data trace` and the real loader name the same samples."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from data_pipeline.config import DataConfig, SourceConfig
from data_pipeline.errors import DataError
from data_pipeline.loader import Part, build_loader, open_dataset
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
        build_loader(config, seed=SEED, global_batch_size=BATCH, part=Part(rank, ranks))
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


EMPTY = (b"", b" \n\t", "\u200b\x00 ".encode(), "\u00a0\ufeff".encode())


def write_downloads(folder: Path, write_tar, tiny_picture) -> None:
    """Shards as img2dataset writes them: empty captions, others that are missing, and damaged pictures."""
    for shard in range(2):
        members = []
        for i in range(30):
            key = f"{shard:05d}{i:04d}"
            picture = b"not a picture" if i % 11 == 5 else tiny_picture(i)
            text = EMPTY[i // 4 % 4] if i % 4 == 1 else f"text {i}".encode()
            record = {
                "score": i / 10,
                "exif": "x" * 300 + str(i),
                "caption": text.decode() if i % 6 else None,
            }
            members.append((f"{key}.jpg", picture))
            members.append((f"{key}.json", json.dumps(record).encode()))
            members += [(f"{key}.txt", text)] if i % 7 else []
        write_tar(folder / f"{shard:05d}.tar", members)


def keys_of(config: DataConfig, steps: int, batch: int) -> list[tuple[str, ...]]:
    with build_loader(config, seed=SEED, global_batch_size=batch) as loader:
        return [next(loader).keys for _ in range(steps)]


def explained(config: DataConfig, steps: int, batch: int) -> list[tuple[str, ...]]:
    return [tuple(r["key"] for r in explain_step(config, SEED, batch, k)) for k in range(steps)]


@pytest.mark.parametrize("buckets", [False, True])
def test_empty_captions_are_known_before_they_are_read(
    tmp_path: Path, write_tar, tiny_picture, buckets: bool
) -> None:
    """Without damaged pictures the answer is exact at every step; with them it says what it assumes."""
    for shard in range(2):
        members = []
        for i in range(30):
            members.append((f"{shard}{i:03d}.jpg", tiny_picture(i)))
            members.append((f"{shard}{i:03d}.txt", EMPTY[i // 4 % 4] if i % 4 == 1 else b"text"))
        members += [(f"{shard}999.jpg", tiny_picture(1, size=(60, 60))), (f"{shard}999.txt", b"large")]
        write_tar(tmp_path / f"{shard}.tar", members)
    config = DataConfig(
        shards=str(tmp_path / "*.tar"),
        image_size=16,
        workers=0,
        shuffle_window=5,
        buckets=buckets,
        bucket_step=4,
        max_image_pixels=1000,
    )
    assert explained(config, 24, 8) == keys_of(config, 24, 8)
    assumed = next(iter(explain_step(config, SEED, 8, 20)))["assumes"]
    assert assumed == [
        "every picture before could be decoded",
        "storage answered, and nothing was skipped after a loss spike",
    ]
    with build_loader(config, seed=SEED, global_batch_size=8) as loader:
        for _ in range(12):
            next(loader)
        assert set(loader.rejected) == {"no_caption", "too_many_pixels"}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"captions": ("txt", "caption")},
        {"captions": ("caption",), "filter": "score < 2.5 and exif != 'none'"},
        {"buckets": True, "bucket_step": 4},
    ],
)
def test_reject_files_make_the_answer_exact(
    tmp_path: Path, write_tar, tiny_picture, changes: dict[str, object]
) -> None:
    """Without them it is another one, and says why it may be; with those of the run it is what was served."""
    write_downloads(tmp_path, write_tar, tiny_picture)
    common = {
        "shards": str(tmp_path / "*.tar"),
        "image_size": 16,
        "workers": 0,
        "shuffle_window": 5,
        **changes,
    }
    config = DataConfig(**common)  # type: ignore[arg-type]
    served = keys_of(DataConfig(**common, reject_file=str(tmp_path / "rejects{rank}.jsonl")), 24, 6)  # type: ignore[arg-type]
    assert explained(config, 24, 6) != served
    assumed = " ".join(next(iter(explain_step(config, SEED, 6, 20)))["assumes"])
    assert "every picture before could be decoded" in assumed
    assert ("not of caption" in assumed) == ("captions" in changes)
    assert ("`exif != 'none'`" in assumed) == ("filter" in changes)
    known = DataConfig(**common, reject_file=str(tmp_path / "rejects{rank}.jsonl"))  # type: ignore[arg-type]
    assert explained(known, 24, 6) == served
    assert "rejects0.jsonl hold every rejection" in next(iter(explain_step(known, SEED, 6, 20)))["assumes"][0]


def test_samples_set_aside_come_at_the_end_of_their_epoch(tmp_path: Path, write_shards) -> None:
    """A shard that cannot be read at first is read when its samples have their second try."""
    write_shards(tmp_path, [12, 12])
    config = DataConfig(
        shards=str(tmp_path / "*.tar"),
        image_size=16,
        workers=0,
        shuffle_window=4,
        max_retries=1,
        reject_file=str(tmp_path / "rejects"),
    )
    dataset = open_dataset(config)
    shard = tmp_path / "00001.tar"
    shard.rename(tmp_path / "away")
    with build_loader(config, seed=SEED, global_batch_size=4, dataset=dataset) as loader:
        served = [next(loader).keys for _ in range(2)]
        (tmp_path / "away").rename(shard)
        served += [next(loader).keys for _ in range(10)]
        assert loader.rejected["set_aside"] > 0
    assert explained(config, 12, 4) == served


def test_files_that_are_no_reject_files_are_refused(tmp_path: Path, write_shards) -> None:
    write_shards(tmp_path, [12])
    config = DataConfig(shards=str(tmp_path / "*.tar"), image_size=16, workers=0)
    (tmp_path / "list").write_text("0001\n0002\n")
    with pytest.raises(DataError, match="line 1 is no record"):
        list(explain_step(config, SEED, 4, 1, rejects=[str(tmp_path / "list")]))
    with pytest.raises(DataError, match="matches no file"):
        list(explain_step(config, SEED, 4, 1, rejects=[str(tmp_path / "none*")]))
