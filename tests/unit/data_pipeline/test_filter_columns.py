"""Filters over whole sets: columns that no shard has, and columns that every shard stores in its own way."""

from __future__ import annotations

import dataclasses
import itertools
import json
import logging
from collections.abc import Sequence
from datetime import date
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_pipeline.config import DataConfig
from data_pipeline.errors import DataError
from data_pipeline.loader import build_loader, open_dataset
from data_pipeline.shards import index, manifest
from data_pipeline.shards.index import VERSION
from data_pipeline.shards.manifest import read_manifest
from trainer.exit_codes import classify

ROWS = 6


@pytest.fixture
def shard(tmp_path: Path, write_tar, tiny_picture):
    """Function (number, json records or None, columns of the parquet or None)."""

    def write(number: int, records: Sequence[dict[str, Any]] | None, parquet: Any = None):
        members = []
        for i in range(ROWS):
            key = f"{number:05d}{i:04d}"
            members.append((f"{key}.jpg", tiny_picture(i)))
            if records is not None:
                members.append((f"{key}.json", json.dumps(records[i]).encode()))
        write_tar(tmp_path / f"{number:05d}.tar", members)
        if parquet is not None:
            keys = parquet.pop("key", [f"{number:05d}{i:04d}" for i in range(ROWS)])
            pq.write_table(pa.table({"key": keys, **parquet}), tmp_path / f"{number:05d}.parquet")

    return write


def config_for(folder: Path, rule: str, **changes: Any) -> DataConfig:
    settings = {"image_size": 16, "workers": 0, "lanes": 1, "captions": ("txt",), "require_caption": False}
    return DataConfig(shards=str(folder / "*.tar"), filter=rule, **{**settings, **changes})


def served(config: DataConfig) -> tuple[set[str], dict[str, int]]:
    """Keys of the first epoch and what was rejected, through the loader."""
    total = int(open_dataset(config).counts.sum())
    with build_loader(config, seed=0, global_batch_size=1) as loader:
        keys: list[str] = []
        while (batch := next(loader)).ordinals.max() < total:
            keys += batch.keys
        return set(keys), dict(loader.rejected)


def punsafe(values: Sequence[Any]) -> list[dict[str, Any]]:
    return [{"punsafe": v} for v in values]


@pytest.mark.parametrize(
    ("rule", "said"),
    [
        ("default(punsfe, 0) < 0.1", "punsfe, which is not in any of the 2 shards; the nearest is punsafe"),
        ("missing(PUNSAFE) or PUNSAFE < 1", "punsafe is there: upper and lower case differ"),
        ("punsafe < 1 and not missing(picture_widht)", "the nearest is picture_width"),
        ("punsafe == None", r"write missing\(column\)"),
        ("punsafe == 'low'", "compares punsafe with a text, but it is a number in every shard"),
        ("language < 3", "wants a number, but language is a text that spells none in every shard"),
        ("language", "wants a number, but language is a text"),
        ("punsafe + 1 == 'a'", "the text 'a' is compared with a number"),
        ("min(punsafe, 'a') < 1", "a number is wanted, 'a' is a text"),
    ],
)
def test_what_cannot_be_meant_is_refused_at_the_start(shard, tmp_path: Path, rule: str, said: str) -> None:
    for number in range(2):
        shard(number, [{"punsafe": 0.05, "language": "en"}] * ROWS)
    with pytest.raises(DataError, match=said) as caught:
        open_dataset(config_for(tmp_path, rule))
    assert classify(caught.value) == 2


def test_a_set_without_columns_says_so(shard, tmp_path: Path) -> None:
    shard(0, None)
    with pytest.raises(DataError, match="the nearest is picture_"):
        open_dataset(config_for(tmp_path, "default(punsafe, 0) < 1"))


def test_a_column_that_some_shards_lack_is_missing_there_and_told(shard, tmp_path: Path, caplog) -> None:
    shard(0, punsafe([0.05] * ROWS))
    shard(1, [{"PUNSAFE": 0.05}] * ROWS)
    shard(2, [{"width": 3}] * ROWS)
    with caplog.at_level(logging.WARNING):
        keys, rejected = served(config_for(tmp_path, "punsafe < 0.1"))
    assert "2 of the 3 shards have no column punsafe, which counts as missing there" in caplog.text
    assert "PUNSAFE is there: upper and lower case differ" in caplog.text
    assert {key[:5] for key in keys} == {"00000"}
    assert rejected["filter: punsafe < 0.1"] >= 2 * ROWS - 1
    caplog.clear()
    assert len(served(config_for(tmp_path, "default(punsafe, 0) < 0.1"))[0]) == 3 * ROWS


def test_a_column_has_one_meaning_in_every_shard(shard, tmp_path: Path) -> None:
    """Rows 0, 2, 4 are to be kept and row 5 has no value, whatever stores it."""
    values = [0.01, 0.5, 0.1, 0.6, 0.03, None]
    shard(0, punsafe(values))
    shard(1, punsafe([None if v is None else str(v) for v in values]))
    shard(2, None, {"punsafe": values})
    shard(3, None, {"punsafe": [None if v is None else str(v) for v in values]})
    shard(4, None, {"punsafe": [None if v is None else Decimal(str(v)) for v in values]})
    shard(5, None, {"punsafe": pa.array([None if v is None else v > 0.1 for v in values])})
    shard(6, None, {"punsafe": values, "key": pa.array([60000 + i for i in range(ROWS)])})
    shard(7, punsafe([None] * ROWS), {"punsafe": values})
    shard(8, None, {"punsafe": values, "key": [80000.0 + i for i in range(ROWS)]})
    keys, rejected = served(config_for(tmp_path, "punsafe <= 0.1"))
    assert keys == {f"{n:05d}/{n:05d}{i:04d}" for n in range(9) for i in (0, 2, 4)}
    assert not [name for name in rejected if "unreadable" in name]
    keys, _ = served(config_for(tmp_path, "missing(punsafe)"))
    assert keys == {f"{n:05d}/{n:05d}0005" for n in range(9)}


def test_many_different_texts_of_a_parquet_are_the_numbers_that_they_spell(
    tmp_path: Path, write_tar, tiny_picture
) -> None:
    keys = [f"{i:09d}" for i in range(40)]
    write_tar(tmp_path / "0.tar", [(f"{key}.jpg", tiny_picture(i)) for i, key in enumerate(keys)])
    scores = [f"0.{i:02d}" for i in range(39)] + ["n/a"]
    pq.write_table(pa.table({"key": list(range(40)), "score": scores}), tmp_path / "0.parquet")
    found, rejected = served(config_for(tmp_path, "score < 0.305"))
    assert {key[-2:] for key in found} == {f"{i:02d}" for i in range(31)}
    assert rejected["filter: score < 0.305 (unreadable value)"] == 1


@pytest.mark.parametrize("where", ["json", "late json", "parquet"])
def test_what_cannot_be_read_is_counted_and_no_default_hides_it(shard, tmp_path: Path, where: str) -> None:
    values: list[Any] = ["0.05", "n/a", None, "0.5", "nan", "" if where != "late json" else [3]]
    if where == "parquet":
        shard(0, None, {"punsafe": values})
    else:
        shard(0, punsafe(values))
    for i, rule in enumerate(("default(punsafe, 0) < 0.1", "missing(punsafe) or punsafe < 0.1")):
        rejects = tmp_path / f"rejects{i}"
        keys, _ = served(config_for(tmp_path, rule, reject_file=str(rejects)))
        assert keys == {"00000/000000000", "00000/000000002"}
        lines = [json.loads(line) for line in rejects.read_text().splitlines()]
        assert {(line["key"][-1], line["reason"]) for line in lines} == {
            ("1", f"filter: {rule} (unreadable value)"),
            ("3", f"filter: {rule}"),
            ("4", f"filter: {rule} (unreadable value)"),
            ("5", f"filter: {rule} (unreadable value)"),
        }
    # Decided by the other side, whatever punsafe is.
    assert len(served(config_for(tmp_path, "punsafe < 0.1 or picture_width > 3"))[0]) == ROWS


def test_a_column_of_the_parquet_that_is_not_kept(shard, tmp_path: Path) -> None:
    dates = [date(2020, 1, 1 + i) for i in range(ROWS)]
    shard(0, None, {"taken": [None, *dates[1:]], "p": [0.1] * ROWS})
    with pytest.raises(DataError, match="taken is in the parquet alone"):
        open_dataset(config_for(tmp_path, "taken == '2020-01-01'"))
    assert served(config_for(tmp_path, "missing(taken)"))[0] == {"00000/000000000"}


def test_a_clause_over_json_and_parquet(shard, tmp_path: Path) -> None:
    """`tags` must be read from each json, `p` stands in the index alone."""
    shard(0, [{"tags": [1] if i % 2 else None, "q": 1} for i in range(ROWS)], {"p": [0.0, 0.0, 1, 1, 0.0, 1]})
    assert served(config_for(tmp_path, "p < 0.5 and missing(tags)"))[0] == {
        "00000/000000000",
        "00000/000000004",
    }
    assert served(config_for(tmp_path, "p > 0.5 or missing(tags)"))[0] == {
        f"00000/00000{i:04d}" for i in (0, 2, 3, 4, 5)
    }


@pytest.mark.parametrize(
    ("rule", "rows"),
    [
        ("safe == True", (0, 2, 4)), ("safe == true", (0, 2, 4)), ("safe == 'true'", (0, 2, 4)),
        ("safe", (0, 2, 4)), ("not safe", (1, 3)), ("safe != 1", (1, 3)), ("safe in (False, 2)", (1, 3)),
    ],
)  # fmt: skip
def test_booleans(shard, tmp_path: Path, rule: str, rows: tuple[int, ...]) -> None:
    safe = [True, False, True, False, True, None]
    shard(0, [{"safe": v} for v in safe])
    shard(1, None, {"safe": pa.array(safe)})
    shard(2, None, {"safe": pa.array([None if v is None else str(v).lower() for v in safe])})
    assert served(config_for(tmp_path, rule))[0] == {
        f"{n:05d}/{n:05d}{i:04d}" for n in range(3) for i in rows
    }


def test_numbers_and_texts_in_one_column(shard, tmp_path: Path) -> None:
    shard(0, [{"license": v} for v in (1, "2", "by", "by", 2, None)])
    shard(1, None, {"license": [1, 2, 2, None, 1, 1]})
    texts = served(config_for(tmp_path, "license == 'by'"))[0]
    assert texts == {"00000/000000002", "00000/000000003"}
    two = {"00000/000000001", "00000/000000004", "00001/000010001", "00001/000010002"}
    assert served(config_for(tmp_path, "license == '2'"))[0] == two
    assert served(config_for(tmp_path, "license == 2"))[0] == two


def test_an_index_of_an_older_version_is_read_anew(
    shard, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It knows fewer digests and columns: an opt-out by sha512 would be lost in it."""
    shard(0, punsafe([0.05] * ROWS))
    with monkeypatch.context() as patch:
        for module in (index, manifest):
            patch.setattr(module, "VERSION", VERSION - 1)
        open_dataset(config_for(tmp_path, ""))
    folder = str(tmp_path / "_index")
    assert read_manifest(folder) == {}
    assert len(served(config_for(tmp_path, "punsafe < 0.1"))[0]) == ROWS
    assert [row.columns["punsafe"] for row in read_manifest(folder).values()] == ["number"]


def test_without_an_index_the_first_samples_tell(shard, tmp_path: Path) -> None:
    shard(0, punsafe([0.05] * ROWS))
    resampled = config_for(tmp_path, "default(punsfe, 0) < 0.1", order="resampled", workers=1)
    with (
        pytest.raises(DataError, match="not in any of the first 1000 samples; the nearest is punsafe"),
        build_loader(resampled, seed=0, global_batch_size=4) as loader,
    ):
        list(itertools.islice(loader, 400))
    good = dataclasses.replace(resampled, filter="punsafe < 0.1 and picture_width == 20")
    with build_loader(good, seed=0, global_batch_size=4) as loader:
        assert len(next(loader).keys) == 4
