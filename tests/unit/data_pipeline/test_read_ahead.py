"""data.buffer_bytes bounds what a worker holds, counted in bytes, and changes nothing of what is served."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data_pipeline.config import DataConfig
from data_pipeline.feed.share import ShareStream
from data_pipeline.feed.task import ShareTask
from data_pipeline.loader import build_loader, open_dataset
from data_pipeline.order.position import LaneState

LANES, STEPS = 8, 30


@pytest.fixture(scope="module", name="shards")
def shards_fixture(tmp_path_factory: pytest.TempPathFactory, write_tar: Any) -> tuple[DataConfig, int]:
    """Ten shards of pictures between 6 and 50 KB, and the bytes of the largest sample."""
    folder: Path = tmp_path_factory.mktemp("shards")
    random, largest = np.random.default_rng(0), 0
    for shard in range(10):
        members = []
        for i in range(24):
            edge = int(random.choice([80, 120, 210]))
            out = io.BytesIO()
            Image.fromarray(random.integers(0, 256, (edge, edge, 3), np.uint8)).save(out, "JPEG", quality=92)
            members += [(f"{i:03d}.jpg", out.getvalue()), (f"{i:03d}.txt", f"caption {i}".encode())]
            largest = max(largest, len(out.getvalue()) + 20)
        write_tar(folder / f"{shard:05d}.tar", members)
    return DataConfig(shards=str(folder), image_size=32, workers=0, lanes=LANES, shuffle_window=6), largest


def served(config: DataConfig) -> tuple[list[tuple[list[str], list[int], bytes]], int]:
    """What a worker of all lanes serves, and the most bytes that it held."""
    dataset = open_dataset(config, at_once=True)
    order = dataset.walk(config, seed=1, global_batch_size=LANES)
    task = ShareTask(
        config=config,
        dataset=dataset,
        order=order,
        lanes=range(LANES),
        buckets=dataset.buckets(config, order),
        step=0,
        states=tuple(LaneState() for _ in range(LANES)),
        per_lane=1,
    )
    stream, out = ShareStream(task), []
    memory = bytearray(task.layout().bytes)
    for _ in range(STEPS):
        share = stream.fill(memoryview(memory))
        ordinals = task.layout().arrays(memoryview(memory))["ordinals"].tolist()
        out.append((share.keys, ordinals, bytes(memory)))
    stream.close()
    return out, stream.budget.most


@pytest.mark.parametrize("order", ["indexed", "streamed"])
def test_no_more_is_held_than_the_limit_and_one_sample(shards: tuple[DataConfig, int], order: Any) -> None:
    base, largest = shards
    config = DataConfig(**{**vars(base), "order": order})
    whole, free = served(config)
    assert 10 * largest < free < config.buffer_bytes  # several windows of eight lanes
    assert len({key for keys, *_ in whole for key in keys}) > 100
    for limit in (1, largest, 3 * largest, LANES * largest, free // 2):
        limited, most = served(DataConfig(**{**vars(config), "buffer_bytes": limit}))
        assert limited == whole
        assert most <= limit + largest
        assert limit < largest or most > limit / 3  # what there is room for is read ahead


def test_loaders_with_little_room_serve_the_same(shards: tuple[DataConfig, int]) -> None:
    base, largest = shards
    batches = []
    for changes in ({}, {"buffer_bytes": 2 * largest, "workers": 2}):
        with build_loader(DataConfig(**{**vars(base), **changes}), seed=1, global_batch_size=LANES) as loader:
            batches.append([(next(loader).keys, next(loader).pixels.tolist()) for _ in range(6)])
    assert batches[0] == batches[1]
