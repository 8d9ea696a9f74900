"""data.buffer_bytes bounds what a worker holds, counted in bytes, and changes nothing of what is served."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data_pipeline.config import DataConfig
from data_pipeline.feed.share import ShareStream
from data_pipeline.feed.task import ShareTask
from data_pipeline.loader import Loader, build_loader, open_dataset
from data_pipeline.moments.entry import Moments, MomentsCache
from data_pipeline.moments.writer import MomentsWriter
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


def stream_of(config: DataConfig, moments: Moments = Moments()) -> ShareStream:  # noqa: B008 - it is frozen
    """A worker of all lanes."""
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
        moments=moments,
    )
    return ShareStream(task)


def served(config: DataConfig) -> tuple[list[tuple[list[str], list[int], bytes]], int]:
    """What a worker of all lanes serves, and the most bytes that it held."""
    stream, out = stream_of(config), []
    task = stream._task
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


def test_maps_that_come_with_a_window_count_before_their_cached_pictures(tmp_path: Path, write_tar) -> None:
    """The moments are asked for later than the window was read, in which the maps have come."""
    picture, semantic_map = io.BytesIO(), io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (160, 160, 3), np.uint8)
    Image.fromarray(noise).save(picture, "JPEG")
    Image.fromarray(noise[..., 0]).save(semantic_map, "PNG")  # larger than what is kept beside moments
    for shard in range(LANES):
        members = []
        for i in range(24):
            members += [(f"{i:03d}.jpg", picture.getvalue()), (f"{i:03d}.seg.png", semantic_map.getvalue())]
        write_tar(tmp_path / "shards" / f"{shard:05d}.tar", members)
    (tmp_path / "nowhere").write_text("no folder, so that no shard is ever known")
    config = DataConfig(
        shards=str(tmp_path / "shards"),
        image_size=32,
        workers=0,
        lanes=LANES,
        shuffle_window=24,
        order="streamed",
        index=str(tmp_path / "nowhere" / "index"),
        require_caption=False,
        conditions=("semantic_map",),
    )
    cache = MomentsCache(str(tmp_path / "cache"), "stage", "fp32", channels=4, downsampling=8)
    moments = Moments(0, cache)
    writer = MomentsWriter(cache)
    with build_loader(config, seed=1, global_batch_size=LANES, moments=moments) as loader:
        for _ in range(24):
            cached = next(loader).cached
            assert cached is not None
            writer.put(cached.labels, lambda: np.zeros((LANES, 4, 4, 4), np.float32), 1)
    writer.close()
    # About a window of each lane.
    limit = 8 * 24 * (len(picture.getvalue()) + len(semantic_map.getvalue()))
    stream = stream_of(replace(config, buffer_bytes=limit), moments)
    memory = memoryview(bytearray(stream._task.layout().bytes))
    held = []
    for _ in range(12):
        share = stream.fill(memory)
        for walk in stream._walker.walks:
            walk.ready()
        held.append((maps_of(stream), stream.budget.held))
    stream.close()
    assert share.without_pixels
    assert max(maps for maps, _ in held) > LANES * len(semantic_map.getvalue())
    assert all(maps <= counted for maps, counted in held)


def maps_of(stream: ShareStream) -> int:
    """Bytes of maps that wait in memory."""
    waiting = [visit for walk in stream._walker.walks for visit in walk._visits]
    members = [(v, e, future) for v in waiting for e, future in v.members.items() if future.done()]
    return sum(len(future.result().get((visit.slot, e), b"")) for visit, e, future in members)


def test_a_loader_process_holds_what_it_counts_in_memory(tmp_path: Path, write_tar) -> None:
    """Freed bytes do not stay in an arena of each thread."""
    noise = np.random.default_rng(0).integers(0, 256, (700, 700, 3), np.uint8)
    picture = io.BytesIO()
    Image.fromarray(noise).save(picture, "JPEG", quality=88)
    write_tar(tmp_path / "00000.tar", [(f"{i:03d}.jpg", picture.getvalue()) for i in range(40)])
    for shard in range(1, 32):
        (tmp_path / f"{shard:05d}.tar").hardlink_to(tmp_path / "00000.tar")
    config = DataConfig(
        shards=str(tmp_path), image_size=64, workers=1, lanes=32, order="streamed", require_caption=False
    )
    most = {}
    for buffer_bytes in (1, 64_000_000):
        with build_loader(replace(config, buffer_bytes=buffer_bytes), seed=1, global_batch_size=32) as loader:
            assert isinstance(loader, Loader)
            (worker,) = loader._sources
            most[buffer_bytes] = 0
            for _ in range(12):
                next(loader)
                most[buffer_bytes] = max(most[buffer_bytes], own_bytes(worker._process.pid))
    assert 20e6 < most[64_000_000] - most[1] < 1.3 * 64e6


def own_bytes(pid: int) -> int:
    """Memory of a process that is no file's."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("Pss_Anon:")).split()[1])
