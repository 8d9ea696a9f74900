"""Shards that are replaced in place while an index, or a running loader, knows the old ones."""

from __future__ import annotations

import dataclasses
import logging
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from data_pipeline.config import DataConfig
from data_pipeline.errors import DataError, NoShards
from data_pipeline.loader import Dataset, Loader, build_loader, open_dataset
from data_pipeline.shards import opening
from data_pipeline.shards.index import decode_index
from data_pipeline.shards.manifest import store_index
from data_pipeline.storage import editions
from data_pipeline.storage.client import filesystem
from data_pipeline.storage.editions import edition_of
from data_pipeline.storage.files import write_bytes
from data_pipeline.storage.local_s3 import LocalS3

STORAGES = ("local", "s3", "s3 with etags", "memory")


class Place:
    """A set of shards somewhere, written through a folder."""

    def __init__(self, kind: str, url: str, folder: Path, write_shards: Callable[..., list[str]]) -> None:
        self.kind, self.url, self._folder, self._write = kind, url, folder, write_shards

    def put(self, counts: list[int], *, first: int = 0) -> None:
        names = [f"{i:05d}.tar" for i in range(first, first + len(counts))]
        self._write(self._folder, counts, first=first)
        if self.url.startswith("memory"):
            for name in names:
                write_bytes(f"{self.url}/{name}", (self._folder / name).read_bytes())

    def spoil(self, shard: int) -> None:
        """Other bytes of the same size: its second half, then its first."""
        path = self._folder / f"{shard:05d}.tar"
        data = path.read_bytes()
        middle = len(data) // 2
        write_bytes(str(path), data[middle:] + data[:middle])
        self.touch(shard, 60)

    def touch(self, shard: int, seconds: float) -> None:
        """Another time of change, long enough ago to be told from the old one."""
        path = self._folder / f"{shard:05d}.tar"
        now = path.stat().st_mtime + seconds
        os.utime(path, (now, now))
        if self.url.startswith("memory"):
            write_bytes(f"{self.url}/{path.name}", path.read_bytes())
        time.sleep(0.3 if self.url.startswith("s3") else 0.01)  # rclone keeps listings for a moment


@pytest.fixture(params=STORAGES)
def place(
    request: pytest.FixtureRequest,
    tmp_path: Path,
    write_shards: Callable[..., list[str]],
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Place]:
    monkeypatch.setattr(editions, "_ASK_EVERY_S", 0.0)
    folder = tmp_path / "set"
    if not request.param.startswith("s3"):
        url = str(folder) if request.param == "local" else f"memory://{tmp_path}"
        yield Place(request.param, url, folder, write_shards)
        return
    with LocalS3(tmp_path, buckets=("set",), etags="etags" in request.param) as server:
        for name, value in server.env.items():
            monkeypatch.setenv(name, value)
        yield Place(request.param, "s3://set", folder, write_shards)


def opened(place: Place, tmp_path: Path) -> tuple[DataConfig, Dataset]:
    config = DataConfig(
        shards=f"{place.url}/{{00000..00002}}.tar",
        index=str(tmp_path / "index"),
        workers=0,
        lanes=1,
        image_size=16,
        shuffle_window=1,
        read_ahead_bytes=1,
    )
    return config, open_dataset(config)


def loader_of(config: DataConfig, dataset: Dataset) -> Loader:
    loader = build_loader(config, seed=0, global_batch_size=1, dataset=dataset)
    assert isinstance(loader, Loader)
    return loader


def captions(loader: Loader, count: int) -> list[str]:
    return [next(loader).captions[0] for _ in range(count)]


def test_replaced_before_the_first_read(
    place: Place, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    place.put([4, 4, 4])
    config, dataset = opened(place, tmp_path)
    place.put([7], first=1)
    place.touch(1, 60)
    with loader_of(config, dataset) as loader, caplog.at_level(logging.WARNING):
        served = captions(loader, 8)
        assert loader.rejected == {"shard_replaced": 4}
    assert sorted(served) == [f"caption {s:05d}{i:04d}" for s in (0, 2) for i in range(4)]
    told = [r.getMessage() for r in caplog.records if "00001.tar was replaced" in r.getMessage()]
    assert len(told) == 1
    assert "ldm data index" in told[0]


def test_replaced_in_the_middle_of_an_epoch_by_one_of_the_same_size(place: Place, tmp_path: Path) -> None:
    place.put([150, 150, 150])
    config, dataset = opened(place, tmp_path)
    with loader_of(config, dataset) as loader:
        batches = [next(loader) for _ in range(3)]
        kept = batches[0].keys[0].partition("/")[0]
        for shard in range(3):
            if kept != f"{shard:05d}":
                place.spoil(shard)
        batches += [next(loader) for _ in range(500)]
        assert loader.rejected["shard_replaced"] > 300
    assert all(b.captions[0] == f"caption {b.keys[0].partition('/')[2]}" for b in batches)
    assert {b.keys[0].partition("/")[0] for b in batches[-100:]} == {kept}


@pytest.mark.parametrize("earlier_version", [False, True])
def test_stored_again_with_the_same_samples_it_is_served_on(
    place: Place, tmp_path: Path, caplog: pytest.LogCaptureFixture, earlier_version: bool
) -> None:
    place.put([4, 4, 4])
    config, dataset = opened(place, tmp_path)
    if earlier_version:  # whose indexes do not say whether windows are as they tell
        rows = []
        for url in dataset.index_urls:
            index = decode_index(Path(url).read_bytes(), url)
            rows.append(store_index(str(tmp_path / "index"), dataclasses.replace(index, as_streamed=None)))
        dataset = dataclasses.replace(dataset, checksums=tuple(row.checksum for row in rows))
    place.touch(1, 60)
    with loader_of(config, dataset) as loader, caplog.at_level(logging.WARNING):
        served = captions(loader, 12)
        assert not loader.rejected
    assert len(set(served)) == 12
    again = [r.getMessage() for r in caplog.records if "00001.tar was stored again" in r.getMessage()]
    assert len(again) == (0 if place.kind == "s3 with etags" else 1)  # an ETag says that it is the same


def test_all_replaced_is_one_sentence_with_the_remedy(place: Place, tmp_path: Path) -> None:
    place.put([4, 4, 4])
    config, dataset = opened(place, tmp_path)
    place.put([5, 5, 5])
    for shard in range(3):
        place.touch(shard, 60)
    with (
        loader_of(config, dataset) as loader,
        pytest.raises(DataError, match=r"shard_replaced.*ldm data index"),
    ):
        next(loader)


def test_a_large_set_with_a_shard_of_the_same_size_is_refused_at_the_start(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place.put([4, 4, 4])
    opened(place, tmp_path)
    monkeypatch.setattr(opening, "_SMALL", 1)
    config = DataConfig(shards=f"{place.url}/*.tar", index=str(tmp_path / "index"), workers=0)
    assert open_dataset(config).counts.tolist() == [4, 4, 4]
    place.spoil(1)
    with pytest.raises(NoShards, match=r"1 of the 3 shards .* new or changed"):
        open_dataset(config)


def test_a_link_has_the_time_of_its_target(tmp_path: Path, write_shards: Callable[..., list[str]]) -> None:
    write_shards(tmp_path / "there", [4, 4, 4])
    (tmp_path / "set").mkdir()
    for i in range(3):
        path = tmp_path / "there" / f"{i:05d}.tar"
        os.utime(path, (1e9 + i, 1e9 + i))
        (tmp_path / "set" / path.name).symlink_to(path)
    place = Place("local", str(tmp_path / "set"), tmp_path / "there", write_shards)
    config, dataset = opened(place, tmp_path)
    assert dataset.versions == tuple(str(1e9 + i) for i in range(3))
    with loader_of(config, dataset) as loader:
        assert len(set(captions(loader, 12))) == 12
        assert not loader.rejected


def test_where_the_listing_had_no_etag_the_time_is_compared(
    tmp_path: Path,
    write_shards: Callable[..., list[str]],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with LocalS3(tmp_path, buckets=("set",), etags=True) as server:
        for name, value in server.env.items():
            monkeypatch.setenv(name, value)
        place = Place("s3 with etags", "s3://set", tmp_path / "set", write_shards)
        place.put([4, 4, 4])
        config, dataset = opened(place, tmp_path)
        infos = [fs.info(path) for fs, path in map(filesystem, dataset.urls)]
        dataset = dataclasses.replace(dataset, versions=tuple(str(i["LastModified"]) for i in infos))
        with loader_of(config, dataset) as loader:
            assert len(set(captions(loader, 12))) == 12
        assert "stored again" not in caplog.text
        place.spoil(1)
        with loader_of(config, dataset) as loader:
            captions(loader, 8)
            assert loader.rejected == {"shard_replaced": 4}


def test_a_weak_etag_is_the_same_etag() -> None:
    assert edition_of({"ETag": 'W/"a"'}, 1) == edition_of({"etag": '"a"'}, 1) == edition_of({"ETag": "a"}, 1)


def test_many_are_told_as_many(
    tmp_path: Path, write_shards: Callable[..., list[str]], caplog: pytest.LogCaptureFixture
) -> None:
    place = Place("local", str(tmp_path / "set"), tmp_path / "set", write_shards)
    place.put([1] * 30)
    config = DataConfig(
        shards=f"{place.url}/*.tar", index=str(tmp_path / "index"), workers=0, lanes=1, image_size=16
    )
    dataset = open_dataset(config)
    for shard in range(30):
        place.touch(shard, 60)
    with loader_of(config, dataset) as loader:
        assert len(set(captions(loader, 30))) == 30
    told = [r.getMessage() for r in caplog.records if "stored again" in r.getMessage()]
    assert len(told) == 20
    assert sum(line.endswith("(further ones are not told)") for line in told) == 1  # read by several threads


def test_a_shard_that_became_shorter_is_not_read_beyond_its_end(place: Place, tmp_path: Path) -> None:
    place.put([4, 4, 4])
    config, dataset = opened(place, tmp_path)
    place.put([1, 1], first=1)
    for shard in (1, 2):
        place.touch(shard, 60)
    with loader_of(config, dataset) as loader:
        assert sorted(captions(loader, 4)) == [f"caption 00000000{i}" for i in range(4)]
        captions(loader, 1)
        assert set(loader.rejected) == {"shard_replaced"}
    fs, path = filesystem(f"{place.url}/00001.tar")
    assert fs.size(path) < dataset.sizes[1]
