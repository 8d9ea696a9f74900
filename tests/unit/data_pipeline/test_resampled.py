"""The plain webdataset mode: frequencies, rejects, truncated tars, end without a hang."""

from __future__ import annotations

import tarfile
from collections import Counter
from pathlib import Path

import pytest

from data_pipeline.config import DataConfig
from data_pipeline.errors import DataError
from data_pipeline.loader import build_loader, merge_positions


def config_for(url: str, **changes: object) -> DataConfig:
    return DataConfig(shards=url, order="resampled", image_size=16, workers=2, **changes)  # type: ignore[arg-type]


def test_samples_come_with_equal_frequency(make_shards) -> None:
    url, keys = make_shards([20, 20, 20], corrupt=frozenset({"00001/000010003"}))
    with build_loader(
        config_for(url, filter="score < 0.85"), seed=1, global_batch_size=8, world_size=2
    ) as loader:
        counts: Counter[str] = Counter()
        for _ in range(300):
            batch = next(loader)
            assert batch.pixels.shape == (4, 3, 16, 16)
            counts.update(batch.keys)
    served = {k for k in keys if (int(k[-4:]) * 7 % 10) / 10 < 0.85} - {"00001/000010003"}
    assert set(counts) == served
    assert min(counts.values()) > 1200 / len(served) / 4
    assert loader.rejected["not_an_image"] > 0
    assert loader.rejected["filter: score < 0.85"] > 0


def test_position_counts_on(make_shards) -> None:
    url, _ = make_shards([20])
    with build_loader(config_for(url), seed=1, global_batch_size=4) as loader:
        batches = [next(loader) for _ in range(3)]
    position = merge_positions([batches[-1].position])
    with build_loader(config_for(url), seed=1, global_batch_size=4, position=position) as loader:
        assert next(loader).ordinals.tolist() == [12, 13, 14, 15]


def test_a_cut_shard_is_counted_and_passed(make_shards) -> None:
    url, _ = make_shards([20, 20])
    shard = Path(url).parent / "00001.tar"
    with tarfile.open(shard) as tar:
        middle = tar.getmembers()[6]
    shard.write_bytes(shard.read_bytes()[: middle.offset_data + middle.size // 2])
    with build_loader(config_for(url), seed=1, global_batch_size=8) as loader:
        keys = {k for _ in range(40) for k in next(loader).keys}
    assert {f"00000/00000{i:04d}" for i in range(20)} <= keys
    assert loader.rejected["shard_cut_short"] > 0


def test_modes_do_not_mix(make_shards) -> None:
    url, _ = make_shards([20])
    with pytest.raises(DataError, match="order=resampled"):
        build_loader(
            DataConfig(shards=url, workers=0),
            seed=1,
            global_batch_size=4,
            position={"format": 1, "order": "resampled", "step": 3},
        )
