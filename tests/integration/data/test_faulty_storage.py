"""A real S3 server behind a proxy that misbehaves: nothing is lost, doubled or reordered."""

from __future__ import annotations

import itertools
import os
import socket
import tarfile
import time
from collections import Counter
from pathlib import Path

import pytest
import s3fs

from data_pipeline.config import DataConfig
from data_pipeline.errors import (
    AccessDenied,
    Failure,
    MissingBucket,
    NoShards,
    NotATar,
    StorageOutage,
    Unreachable,
)
from data_pipeline.loader import build_loader
from data_pipeline.shards.build_index import build_index
from data_pipeline.shards.opening import open_dataset
from data_pipeline.storage.listing import list_files
from data_pipeline.storage.local_s3 import LocalS3
from data_pipeline.tools.scenes.scene import SceneOptions
from data_pipeline.tools.scenes.write_shards import SynthesisOptions, synthesize
from tests.integration.data.fault_proxy import FaultProxy

BATCH = 16


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four shards, about 1 % corrupt pictures and one truncated tar."""
    root = tmp_path_factory.mktemp("buckets")
    scene = SceneOptions(1, 1, 40, 56)
    list(synthesize(str(root / "scenes"), SynthesisOptions(320, samples_per_shard=80, scene=scene)))
    for shard in range(4):
        path = root / "scenes" / f"{shard:05d}.tar"
        with tarfile.open(path) as tar:
            pictures = [m for m in tar.getmembers() if m.name.endswith(".jpg")]
        raw = bytearray(path.read_bytes())
        spoilt = pictures[17 * (shard + 1) % len(pictures)]
        raw[spoilt.offset_data : spoilt.offset_data + spoilt.size] = b"\0" * spoilt.size
        if shard == 2:
            raw = raw[: pictures[60].offset_data + 100]
        path.write_bytes(raw)
    return root


def config_for(url: str, **changes: object) -> DataConfig:
    base: dict[str, object] = {"shards": url, "image_size": 32, "workers": 0, "read_ahead_bytes": 60_000}
    return DataConfig(**{**base, **changes})  # type: ignore[arg-type]


def run(config: DataConfig, steps: int) -> tuple[list[tuple[str, ...]], Counter[str], Counter[str]]:
    with build_loader(config, seed=5, global_batch_size=BATCH) as loader:
        keys = [next(loader).keys for _ in range(steps)]
    return keys, loader.rejected, loader.counts


@pytest.mark.parametrize("order", ["indexed", "streamed"])
def test_faults_change_nothing(folder: Path, server: FaultProxy, order: str) -> None:
    steps = 40
    expected, rejected, _ = run(config_for(str(folder / "scenes" / "*.tar"), order=order), steps)
    server.first_byte_s = 0.02
    server.faults = {"short": 0.05, "storm": 0.10, "reset": 0.05, "stall": 0.02}
    found, rejected_s3, counts = run(config_for("s3://scenes/*.tar", workers=2, order=order), steps)
    assert found == expected
    assert rejected_s3 == rejected
    assert rejected["not_an_image"] >= 4
    assert counts["retries"] > 0
    assert sum(server.counts[f] for f in server.faults) > 10
    assert counts["failures"] == 0


def test_a_dead_shard_is_set_aside_and_tried_again(folder: Path, server: FaultProxy) -> None:
    """One object fails for a while: its samples come at the end of the epoch instead."""
    config = config_for("s3://scenes/*.tar", max_retries=2, lanes=2)
    run(config, 1)  # the index exists
    server.broken = ("00001.tar",)
    with build_loader(config, seed=5, global_batch_size=BATCH) as loader:
        total = int(open_dataset(config).counts.sum())
        visits: Counter[str] = Counter()
        for step in itertools.count():
            if step == 3:
                server.broken = ()
            batch = next(loader)
            epochs = [s[0] for s in batch.position["states"]]
            visits.update(k for k, o in zip(batch.keys, batch.ordinals.tolist(), strict=True) if o < total)
            if min(epochs) >= 1:
                break
    assert loader.rejected["set_aside"] > 0
    # everything once; only what was tried a second time in vain is missing, and counted
    assert set(visits.values()) == {1}
    lost = loader.rejected["unreadable"] + loader.rejected["not_an_image"]
    assert len(visits) + lost >= total - 2
    assert sum(k.startswith("00001/") for k in visits) > 40


@pytest.mark.slow
@pytest.mark.parametrize("order", ["indexed", "streamed"])
def test_an_outage_ends_in_one_sentence(server: FaultProxy, order: str) -> None:
    config = config_for("s3://scenes/*.tar", max_retries=2, patience_s=2.0, order=order)
    with build_loader(config, seed=5, global_batch_size=BATCH) as loader:
        next(loader)
        server.broken = ("",)
        with pytest.raises(StorageOutage, match="run the same command again"):
            list(itertools.islice(loader, 200))


def test_wrong_places_are_named_at_once(
    server: FaultProxy, monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    def error(url: str) -> Failure:
        with pytest.raises(Failure) as caught:
            build_loader(config_for(url), seed=1, global_batch_size=BATCH)
        return caught.value

    assert isinstance(error("s3://no-such-bucket/*.tar"), MissingBucket)
    assert isinstance(error("s3://scenes/other/*.tar"), NoShards)
    assert "2 of the 6 shards" in str(error("s3://scenes/{00000..00005}.tar"))
    # Through the server: what is written beside it, its directory cache may not show yet.
    filesystem = s3fs.S3FileSystem(skip_instance_cache=True)
    filesystem.mkdir("plain")
    filesystem.pipe_file("plain/a.tar", b"this is not a tar archive" * 100)
    assert isinstance(error("s3://plain/a.tar"), NotATar)
    assert "pipe:" in str(error("pipe:cat /etc/hostname"))
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    assert isinstance(error("s3://scenes/*.tar"), AccessDenied)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    assert isinstance(error("s3://scenes/*.tar"), Unreachable)


def test_cache_serves_the_second_epoch(server: FaultProxy, tmp_path: Path) -> None:
    config = config_for("s3://scenes/*.tar", cache_dir=str(tmp_path / "cache"), cache_bytes=64 << 20)
    first, _, cold = run(config, 20)
    again, _, warm = run(config, 20)
    assert again == first
    assert warm["bytes"] < cold["bytes"] / 3
    plain, _, _ = run(config_for("s3://scenes/*.tar"), 20)
    assert plain == first


def test_server_stops_with_its_context(tmp_path: Path) -> None:
    with LocalS3(tmp_path, buckets=("a",)) as s3:
        port = s3.port
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", port)) != 0


def test_a_replaced_shard_is_read_again_where_the_server_sends_no_etag(
    folder: Path, server: FaultProxy, tmp_path: Path
) -> None:
    """The time of the last change tells then: same name, same size."""
    path = folder / "scenes" / "00000.tar"
    url, index = "s3://scenes/{00000..00001}.tar", str(tmp_path / "index")
    assert build_index(list_files(url), index).read == 2
    assert build_index(list_files(url), index).read == 0
    before = path.stat().st_mtime
    os.utime(path, (before + 60, before + 60))
    time.sleep(0.5)  # rclone keeps listings for a moment
    assert build_index(list_files(url), index).read == 1
