"""What img2dataset notes of a shard beside it: an estimate at the start, a check when the shard was read."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_pipeline.config import DataConfig
from data_pipeline.loader import build_loader, open_dataset
from data_pipeline.shards.recorder import Recorder

COUNTS = [9, 12, 15, 11, 8, 14, 13]
WriteShards = Callable[..., list[str]]


def config_for(folder: Path, **changes: Any) -> DataConfig:
    given = {"image_size": 16, "workers": 0, "shuffle_window": 5, "order": "streamed", "lanes": 6}
    return DataConfig(**{"shards": str(folder / "shards"), **given, **changes})


def write_notes(folder: Path, shard: int, **notes: object) -> None:
    (folder / "shards" / f"{shard:05d}_stats.json").write_text(json.dumps(notes))


def write_table(folder: Path, shard: int, table: dict[str, list[Any]]) -> None:
    pq.write_table(pa.table(table), folder / "shards" / f"{shard:05d}.parquet")


@pytest.fixture(name="folder")
def folder_fixture(tmp_path: Path, write_shards: WriteShards) -> Path:
    """Seven shards, of which three promise what they do not have, each in another way."""
    write_shards(tmp_path / "shards", COUNTS)
    for shard, count in enumerate(COUNTS):
        write_notes(tmp_path, shard, count=count + 3, successes=count, failed_to_download=3)
    write_notes(tmp_path, 2, count=20, successes=18)
    write_notes(tmp_path, 4, count=20)  # says nothing of samples: the parquet is asked
    write_table(
        tmp_path, 4, {"key": list("abcdefghijkl"), "status": ["success"] * 10 + ["failed_to_resize"] * 2}
    )
    (tmp_path / "shards" / "00005_stats.json").write_text("not json")
    write_table(tmp_path, 5, {"key": list("abcdefghijklmnop")})
    write_table(tmp_path, 6, {"key": ["a"], "status": ["success"]})  # the notes go before it
    return tmp_path


def ledger(folder: Path) -> list[dict[str, Any]]:
    files = sorted(folder.glob("rejects*.jsonl"))
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


def test_what_a_shard_has_is_compared_with_what_was_promised(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = config_for(folder, reject_file=str(folder / "rejects.jsonl"))
    index = folder / "shards" / "_index"
    with build_loader(config, seed=3, global_batch_size=12) as loader:
        while len(ledger(folder)) < 3 or len([*index.glob("*.npz")]) < len(COUNTS):
            next(loader)
        assert loader.tally.lost == 0  # what is there is served
        assert loader.rejected["shard_other_count"] == 3
    told = {(record["reason"], record["key"], record["detail"]) for record in ledger(folder)}
    assert told == {
        ("shard_other_count", "00002/*", "00002_stats.json promises 18 samples, the tar has 15"),
        ("shard_other_count", "00004/*", "00004.parquet promises 10 samples, the tar has 8"),
        ("shard_other_count", "00005/*", "00005.parquet promises 16 samples, the tar has 14"),
    }
    assert f"{folder}/shards/00002.tar: 00002_stats.json promises 18 samples, the tar has 15" in caplog.text
    # What is recorded by then is not asked for again, whoever comes.
    with build_loader(config, seed=4, global_batch_size=12) as loader:
        for _ in range(3 * sum(COUNTS) // 12):
            next(loader)
    assert len(ledger(folder)) == 3


def test_a_start_says_about_how_many_samples_there_are(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    for shard in (0, 6):
        (folder / "shards" / f"{shard:05d}_stats.json").unlink()
    dataset = open_dataset(config_for(folder), at_once=True)
    assert dataset.unindexed
    # (12 + 18 + 11) / 3 of those that say it, over seven shards
    assert "about 96 samples in 7 shards, by the _stats.json beside 3 of them" in caplog.text


def test_where_no_file_says_anything_none_is_asked_for_long(tmp_path: Path) -> None:
    asked: list[str] = []

    def absent(url: str) -> None:
        asked.append(url)

    recorder = Recorder([(0, str(tmp_path / "_index"))])
    assert {recorder.difference(f"s3://b/{i:05d}.tar", 7, absent) for i in range(20)} == {""}
    assert asked == [
        f"s3://b/{i:05d}{end}" for i in range(len(asked) // 2) for end in ("_stats.json", ".parquet")
    ]
    assert len(asked) == 16
