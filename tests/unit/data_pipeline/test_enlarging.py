"""Pictures smaller than the crop, and the size that a picture had before it was stored."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from data_pipeline.config import DataConfig
from data_pipeline.errors import DataError
from data_pipeline.loader import build_loader

SIZES = {"a": (32, 32), "b": (31, 64), "c": (64, 31), "d": (48, 40)}
"""(width, height) by key: b and c are too small for 32 px in one edge."""


@pytest.fixture(params=["indexed", "resampled"])
def config(request, tmp_path: Path, write_tar, tiny_picture) -> DataConfig:
    members = []
    for i, (key, size) in enumerate(SIZES.items()):
        members += [(f"{key}.jpg", tiny_picture(i, size=size)), (f"{key}.txt", b"x")]
        members.append(
            (f"{key}.json", json.dumps({"original_width": 2000, "original_height": 1000}).encode())
        )
    write_tar(tmp_path / "0.tar", members)
    workers = int(request.param == "resampled")
    return DataConfig(
        shards=f"{tmp_path}/*.tar",
        image_size=32,
        workers=workers,
        order=request.param,
        lanes=1,
    )


def look(config: DataConfig, batches: int = 30) -> tuple[dict[str, list[int]], dict[str, int]]:
    """(row of the size condition by key, rejections)"""
    rows = {}
    with build_loader(config, seed=1, global_batch_size=2) as loader:
        for _ in range(batches):
            batch = next(loader)
            names = [key.rpartition("/")[2] for key in batch.keys]
            rows |= dict(zip(names, batch.conditions["size"].tolist(), strict=True))
        return rows, dict(loader.rejected)


def test_nothing_is_enlarged_unless_it_is_allowed(config: DataConfig) -> None:
    rows, rejected = look(config)
    assert rows.keys() == {"a", "d"}
    assert rejected.keys() == {"too_small"}
    rows, rejected = look(replace(config, allow_enlarging=True))
    assert rows.keys() == SIZES.keys()
    assert not rejected


def test_the_index_rejects_before_anything_is_read(config: DataConfig) -> None:
    if config.order == "resampled":
        with (
            pytest.raises(
                DataError, match=r"every sample was rejected: too_small .* data\.allow_enlarging=true"
            ),
            build_loader(replace(config, image_size=64), seed=1, global_batch_size=2) as loader,
        ):
            next(loader)
        return
    with (
        build_loader(replace(config, image_size=65), seed=1, global_batch_size=2) as loader,
        pytest.raises(DataError, match=r"rejected: too_small \(1000\); .* set data.allow_enlarging=true"),
    ):
        next(loader)
    assert loader.counts["bytes"] == 0


def test_a_size_that_the_index_does_not_know_is_met_when_it_is_decoded(tmp_path: Path, write_tar) -> None:
    """The frame header of a JPEG may lie behind more comments than the index reads."""
    out = io.BytesIO()
    Image.new("RGB", (20, 20), "red").save(out, "JPEG", comment=b"x" * 60_000)
    body = out.getvalue()
    comment = b"\xff\xfe\xff\xff" + b"x" * 0xFFFD
    small = body[:2] + comment * 40 + body[2:]
    out = io.BytesIO()
    Image.new("RGB", (32, 32), "red").save(out, "JPEG")
    write_tar(
        tmp_path / "0.tar", [("a.jpg", small), ("a.txt", b"x"), ("b.jpg", out.getvalue()), ("b.txt", b"x")]
    )
    rows, rejected = look(DataConfig(shards=f"{tmp_path}/0.tar", image_size=32, workers=0, lanes=1))
    assert rows.keys() == {"b"}
    assert rejected["too_small"] > 0


def test_buckets_enlarge_nothing_either_and_count_none_of_it(tmp_path: Path, write_tar, tiny_picture) -> None:
    sizes = [
        (64, 32),
        (44, 24),
        (40, 23),
        (24, 44),
        (32, 32),
        (31, 31),
    ]  # shapes of 32 px: 40 x 24, 32 x 32, ...
    members = []
    for i in range(120):
        members += [(f"{i:03d}.jpg", tiny_picture(i, size=sizes[i % 6])), (f"{i:03d}.txt", b"x")]
    write_tar(tmp_path / "0.tar", members)
    config = DataConfig(
        shards=f"{tmp_path}/0.tar", image_size=32, bucket_step=8, buckets=True, workers=0, lanes=2
    )
    rows, rejected = look(config, 40)
    assert {int(key) % 6 for key in rows} == {0, 1, 3, 4}
    assert len(rows) == 80
    assert rejected.keys() == {"too_small"}
    assert rejected["too_small"] <= 40


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({}, [40, 48]),
        ({"original_width": 2000, "original_height": 1500}, [1500, 2000]),
        ({"original_width": "2000", "original_height": "1500"}, [1500, 2000]),
        ({"original_width": 2000}, [40, 48]),
        ({"original_width": 2000, "original_height": None}, [40, 48]),
        ({"original_width": 0, "original_height": 1500}, [40, 48]),
        ({"original_width": "wide", "original_height": [1]}, [40, 48]),
        ({"original_width": 40, "original_height": 48}, [40, 48]),  # of the pixels before they are turned
        ({"original_width": 500, "original_height": 600}, [500, 600]),
        ({"original_width": 600, "original_height": 400}, [400, 600]),  # cropped when it was stored
    ],
)
@pytest.mark.parametrize("order", ["indexed", "resampled"])
def test_the_size_condition_speaks_of_the_original(
    tmp_path: Path, write_tar, tiny_picture, order, fields, told
) -> None:
    body = json.dumps(fields).encode()
    members = [("a.jpg", tiny_picture(1, size=(48, 40))), ("a.txt", b"x"), ("a.json", body)]
    write_tar(tmp_path / "0.tar", members + [(f"b{name[1:]}", content) for name, content in members])
    workers = int(order == "resampled")
    rows, _ = look(DataConfig(shards=f"{tmp_path}/0.tar", image_size=32, workers=workers, order=order), 2)
    assert rows["a"] == [
        *told,
        0,
        3,
        32,
        32,
    ]  # the crop is that of the resized picture, whatever it was before


def test_the_parquet_tells_the_original_size_too(tmp_path: Path, write_tar, tiny_picture) -> None:
    write_tar(tmp_path / "0.tar", [("a.jpg", tiny_picture(1, size=(32, 32))), ("a.txt", b"x")])
    table = {"key": ["a"], "original_width": [900], "original_height": [800]}
    pq.write_table(pa.table(table), tmp_path / "0.parquet")
    config = DataConfig(shards=f"{tmp_path}/0.tar", image_size=32, workers=0, lanes=1)
    with build_loader(config, seed=1, global_batch_size=1) as loader:
        assert next(loader).conditions["size"].tolist() == [[800, 900, 0, 0, 32, 32]]


def test_filters_on_the_stored_size_need_no_json(config: DataConfig) -> None:
    rows, rejected = look(replace(config, filter="picture_width > 32 and picture_height >= 40"))
    assert rows.keys() == {"d"}
    assert "filter: picture_width > 32" in rejected
