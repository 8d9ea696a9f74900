"""A run that starts again waits for storage; one that starts anew does not."""

from __future__ import annotations

import json
import logging
import socket
import threading
import time
from pathlib import Path

import pytest

from data_pipeline.config import DataConfig, SourceConfig
from data_pipeline.errors import RetryableFault
from data_pipeline.storage.local_s3 import LocalS3
from trainer.config.io import config_to_dict
from trainer.config.run import Config
from trainer.exit_codes import ExitCode
from trainer.launch import rank
from trainer.reliability.healing import read_journal, write_journal
from trainer.reliability.job import RESTARTS_VARIABLE, STARTS_VARIABLE, is_restart


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def no_storage(monkeypatch: pytest.MonkeyPatch) -> int:
    """An endpoint where nobody listens."""
    port = free_port()
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(rank, "_PAUSE_S", 0.2)
    return port


def test_restarts_are_known_from_any_launcher() -> None:
    assert not is_restart({})
    assert not is_restart({RESTARTS_VARIABLE: "0", "SLURM_RESTART_COUNT": ""})
    assert is_restart({RESTARTS_VARIABLE: "2"})
    assert is_restart({RESTARTS_VARIABLE: "0", "SLURM_RESTART_COUNT": "1"})
    # Requeued for an unfit node before any rank was started: the doctor is still to look.
    assert not is_restart({STARTS_VARIABLE: "0", RESTARTS_VARIABLE: "1", "SLURM_RESTART_COUNT": "1"})
    assert is_restart({STARTS_VARIABLE: "1", RESTARTS_VARIABLE: "0"})


def test_waits_until_storage_is_back(
    tmp_path: Path, no_storage: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    data = DataConfig(shards="s3://bucket/shards/{00000..00003}.tar", patience_s=60.0)
    with LocalS3(tmp_path, buckets=("bucket",)) as server, caplog.at_level(logging.WARNING):
        server.stop()
        for name, value in server.env.items():
            monkeypatch.setenv(name, value)
        waiting = threading.Thread(target=rank.wait_for_storage, args=("s3://bucket/run", data))
        waiting.start()
        while "storage does not answer since" not in caplog.text:
            time.sleep(0.05)
        assert waiting.is_alive()
        server.start()
        waiting.join(60.0)
        assert not waiting.is_alive()


def test_patience_ends_as_a_retryable_fault(no_storage: int) -> None:
    with pytest.raises(RetryableFault, match="Storage has not answered"):
        rank.wait_for_storage("s3://bucket/run", DataConfig(shards="s3://bucket/*.tar", patience_s=0.5))


def test_the_folders_that_are_asked() -> None:
    sources = (
        SourceConfig("s3://a/*.tar"),
        SourceConfig("s3://b/c/{0..9}.tar"),
        SourceConfig("/local/*.tar"),
    )
    assert list(rank._remote_folders("s3://run", DataConfig(sources=sources))) == [
        *("s3://run", "s3://a", "s3://b/c"),
    ]
    assert list(rank._remote_folders("runs/x", DataConfig(shards="shards.tar"))) == []


def test_local_folders_are_not_asked(tmp_path: Path) -> None:
    rank.wait_for_storage(str(tmp_path / "none"), DataConfig(shards=str(tmp_path / "none" / "*.tar")))


@pytest.mark.parametrize(("restarts", "code"), [("0", ExitCode.USER_ERROR), ("1", ExitCode.RETRYABLE)])
def test_the_same_silence_is_a_mistake_at_first_and_an_outage_later(
    restarts: str, code: ExitCode, no_storage: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv(RESTARTS_VARIABLE, restarts)
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(free_port()))
    values = config_to_dict(Config()) | {"run_dir": str(tmp_path)}
    values["data"] |= {"shards": "s3://bucket/*.tar", "patience_s": 0.5}
    values["distributed"] |= {"doctor": False, "engine": "torch", "zero_stage": 0}
    path = tmp_path / "config.json"
    path.write_text(json.dumps(values))
    assert rank.main([str(path), "train"]) == code


def test_the_journal_is_whole_or_absent(tmp_path: Path) -> None:
    run = str(tmp_path / "run")
    assert read_journal(run) == []
    incidents = [{"step": 3, "kind": "nan", "value": "nan", "ordinals": [1, 2]}]
    write_journal(run, incidents)
    assert read_journal(run) == incidents
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["healing.json"]
