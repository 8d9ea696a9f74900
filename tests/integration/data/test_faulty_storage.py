"""A real S3 server behind a proxy that misbehaves: nothing is lost, doubled or reordered."""

from __future__ import annotations

import contextlib
import http.client
import itertools
import random
import socket
import struct
import tarfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import s3fs

from data_pipeline.config import DataConfig
from data_pipeline.errors import (
    AccessDenied,
    DataError,
    MissingBucket,
    NoShards,
    NotATar,
    StorageOutage,
    Unreachable,
)
from data_pipeline.loader import build_loader
from data_pipeline.local_s3 import LocalS3
from data_pipeline.scenes import SceneOptions
from data_pipeline.synthetic import SynthesisOptions, synthesize

BATCH = 16


class FaultProxy(ThreadingHTTPServer):
    """Forwards to an S3 server and spoils a seeded share of the object reads."""

    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, upstream: int) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.upstream = upstream
        self.rng = random.Random(7)
        self.faults: dict[str, float] = {}
        self.first_byte_s = 0.0
        self.broken: tuple[str, ...] = ()
        """Objects that always fail."""
        self.counts: Counter[str] = Counter()
        self.lock = threading.Lock()

    def choose(self, path: str) -> str:
        with self.lock:
            fault = "storm" if any(b in path for b in self.broken) else ""
            draw = self.rng.random()
            for name, share in self.faults.items():
                if not fault and draw < share:
                    fault = name
                draw -= share
            self.counts[fault or "served"] += 1
            return fault


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FaultProxy

    def handle(self) -> None:
        with contextlib.suppress(ConnectionError):
            super().handle()

    def log_message(self, *args: object) -> None:
        pass

    def _forward(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length)
        upstream = http.client.HTTPConnection("127.0.0.1", self.server.upstream, timeout=30)
        upstream.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
        for name, value in self.headers.items():
            upstream.putheader(name, value)
        upstream.endheaders(body or None)
        answer = upstream.getresponse()
        data = answer.read()
        upstream.close()
        reads = self.command == "GET" and "list-type" not in self.path
        fault = self.server.choose(self.path) if reads else ""
        if reads:
            time.sleep(self.server.first_byte_s)
        if fault == "storm":
            answer_code, data, headers = 503, b"<Error><Code>SlowDown</Code></Error>", []
        else:
            answer_code, headers = answer.status, answer.getheaders()
        if fault == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
            self.close_connection = True
            return
        self.send_response(answer_code)
        for name, value in headers:
            if name.lower() not in ("content-length", "connection", "transfer-encoding", "date", "server"):
                self.send_header(name, value)
        size = answer.getheader("Content-Length", "0") if self.command == "HEAD" else str(len(data))
        self.send_header("Content-Length", size)
        self.end_headers()
        if fault in ("short", "stall"):
            self.wfile.write(data[: len(data) // 2])
            self.wfile.flush()
            if fault == "stall":
                time.sleep(30)
            self.close_connection = True
            return
        self.wfile.write(data)

    do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = _forward


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


@pytest.fixture
def server(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    """The S3 server and the proxy in front of it; the environment points to the proxy."""
    with LocalS3(folder) as s3:
        proxy = FaultProxy(s3.port)
        threading.Thread(target=proxy.serve_forever, daemon=True).start()
        for name, value in s3.env.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{proxy.server_address[1]}")
        yield proxy
        proxy.shutdown()
        proxy.server_close()


def config_for(url: str, **changes: object) -> DataConfig:
    base: dict[str, object] = {"shards": url, "image_size": 32, "workers": 0, "read_ahead_bytes": 60_000}
    return DataConfig(**{**base, **changes})  # type: ignore[arg-type]


def run(config: DataConfig, steps: int) -> tuple[list[tuple[str, ...]], Counter[str], Counter[str]]:
    with build_loader(config, seed=5, global_batch_size=BATCH) as loader:
        keys = [next(loader).keys for _ in range(steps)]
    return keys, loader.rejected, loader.counts


def test_faults_change_nothing(folder: Path, server: FaultProxy) -> None:
    steps = 40
    expected, rejected, _ = run(config_for(str(folder / "scenes" / "*.tar")), steps)
    server.first_byte_s = 0.02
    server.faults = {"short": 0.05, "storm": 0.10, "reset": 0.05, "stall": 0.02}
    found, rejected_s3, counts = run(config_for("s3://scenes/*.tar", workers=2), steps)
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
        total = loader.batches_per_epoch * BATCH
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
def test_an_outage_ends_in_one_sentence(server: FaultProxy) -> None:
    config = config_for("s3://scenes/*.tar", max_retries=2, patience_s=2.0)
    with build_loader(config, seed=5, global_batch_size=BATCH) as loader:
        next(loader)
        server.broken = ("",)
        with pytest.raises(StorageOutage, match="run the same command again"):
            list(itertools.islice(loader, 200))


def test_wrong_places_are_named_at_once(
    server: FaultProxy, monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    def error(url: str) -> DataError:
        with pytest.raises(DataError) as caught:
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
