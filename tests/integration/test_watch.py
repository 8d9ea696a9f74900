"""An evaluator in real processes: kills of itself, two at once, storage that goes away, and what it costs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.storage.local_s3 import LocalS3
from tests.integration.data.fault_proxy import FaultProxy
from tests.unit.evaluator.committed_run import CommittedRun, reference
from trainer.__main__ import main

ROOT = Path(__file__).resolve().parents[2]
LONG = ["--sample", "--count 160 --batch-size 4 --steps 24"]
SHORT = ["--sample", "--count 8 --batch-size 4"]


@pytest.fixture
def real(tmp_path: Path) -> list[str]:
    return ["--reference", reference(tmp_path / "real"), "--features", "random", "--metrics", "fid"]


def lines(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def wait_for(what: Callable[[], bool], seconds: float = 240) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture
def start() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts evaluators, and ends those that are left."""
    processes: list[subprocess.Popen[str]] = []

    def begin(*words: str) -> subprocess.Popen[str]:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-m", "trainer", "evaluate", "watch", *words, "--poll-s", "0.2"]
        processes.append(subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True))
        return processes[-1]

    yield begin
    for process in processes:
        process.kill()
        process.communicate()


@pytest.mark.slow
def test_killed_it_goes_on_and_a_second_one_is_told(
    tmp_path: Path, real: list[str], start: Callable[..., subprocess.Popen[str]]
) -> None:
    run = CommittedRun(str(tmp_path / "run"), "steps=300", "checkpoint.keep_last=1")
    run.commit(100)
    out = tmp_path / "run/evaluation"
    first = start(run.config.run_dir, *real, *LONG)
    wait_for(lambda: len(list(out.glob("pictures/*/parts/*.json"))) >= 5)
    first.send_signal(signal.SIGKILL)
    first.wait()
    made = {path: path.stat().st_mtime_ns for path in out.glob("pictures/*/parts/*.json")}
    run.commit(200)  # which would have retired 100, were it not being measured
    assert (tmp_path / "run/checkpoints/step_000000100").exists()
    second = start(run.config.run_dir, *real, *LONG, "--rule", "all", "--ranks", "2", "--keep-pictures")
    wait_for(lambda: (out / "metrics.jsonl").exists())
    third = start(run.config.run_dir, *real, *LONG)
    _, said = third.communicate(timeout=240)
    assert third.returncode == 2
    assert "is in use by" in said
    assert second.poll() is None
    run.commit(300)
    assert second.wait(timeout=240) == 0
    run.close()
    assert [line["step"] for line in lines(out)] == [100, 200, 300]
    assert {path: path.stat().st_mtime_ns for path in made} == made, "what was drawn is not drawn again"
    words = [run.config.run_dir, *real, *LONG, "--once", "--rule", "all", "--out", str(tmp_path / "alone")]
    assert main(["evaluate", "watch", *words]) == 0
    alone = {line["step"]: line["eval/fd_random"] for line in lines(tmp_path / "alone")}
    assert alone.items() <= {line["step"]: line["eval/fd_random"] for line in lines(out)}.items()
    assert 300 in alone


@pytest.mark.slow
def test_storage_that_goes_away_and_what_each_checkpoint_costs(
    tmp_path: Path, real: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with LocalS3(tmp_path / "s3", buckets=("bucket",)) as server, FaultProxy(server.port) as proxy:
        for name, value in proxy.environment(server.env).items():
            monkeypatch.setenv(name, value)
        run = CommittedRun("s3://bucket/run", "steps=300", "checkpoint.keep_last=9")
        status: list[int] = []
        words = ["evaluate", "watch", "s3://bucket/run", *real, *SHORT, "--rule", "all", "--poll-s", "0.5"]
        watcher = threading.Thread(target=lambda: status.append(main(words)))
        watcher.start()
        out = tmp_path / "s3/bucket/run/evaluation"
        run.commit(100)
        wait_for(lambda: (out / "metrics.jsonl").exists() and len(lines(out)) == 1)
        server.stop()
        time.sleep(4.0)
        server.start()
        proxy.traffic.clear()
        run.commit(200)
        by_run = len(proxy.traffic)
        wait_for(lambda: len(lines(out)) == 2)
        run.commit(300)
        watcher.join(timeout=240)
        assert status == [0]
        run.close()
        assert [line["step"] for line in lines(out)] == [100, 200, 300]
        assert [line["samples_seen"] for line in lines(out)] == [400, 800, 1200]
        of_step = [
            (method, path, size)
            for method, path, size in proxy.traffic[by_run:]
            if "/checkpoints/step_000000200/" in path
        ]
        heads = [size for method, path, size in of_step if method == "GET" and size <= 64]
        read = [(path, size) for method, path, size in of_step if method == "GET" and size > 64]
        # Small files and the averages; not the weights, the moments and the other averages beside them.
        folder = tmp_path / "s3/bucket/run/checkpoints/step_000000200"
        sizes = {path.name: path.stat().st_size for path in folder.iterdir()}
        shard = next(size for name, size in sizes.items() if name.startswith("rank_"))
        of_shards = sum(size for path, size in read if "rank_" in path)
        assert of_shards < shard / 4, "one of five vectors"
        assert len(read) <= 16
        assert len(heads) <= 200, "at each look the beginning of the newest two manifests"
        assert not [path for method, path, _ in of_step if method not in ("GET", "HEAD")], "it writes nothing"


class RefusesRemovals(FaultProxy):
    """Fails at every removal once a line of figures is stored."""

    def passed_on(self, method: str, path: str, num_bytes: int) -> None:
        super().passed_on(method, path, num_bytes)
        if method == "PUT" and path.endswith("/metrics.jsonl"):
            self.deletes = 503


def test_pictures_that_cannot_be_removed_hold_nothing_up(
    tmp_path: Path, real: list[str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with LocalS3(tmp_path / "s3", buckets=("bucket",)) as server, RefusesRemovals(server.port) as proxy:
        for name, value in proxy.environment(server.env).items():
            monkeypatch.setenv(name, value)
        run = CommittedRun("s3://bucket/run", "steps=100")
        run.commit(100)
        run.close()
        assert main(["evaluate", "watch", "s3://bucket/run", *real, *SHORT]) == 0
        assert [line["step"] for line in lines(tmp_path / "s3/bucket/run/evaluation")] == [100]
        left = "pictures in s3://bucket/run/evaluation/pictures stay until the next are measured"
        assert left in caplog.text
