"""`~` in any path of a configuration is the home folder, for everybody who writes there."""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path

import pytest

from data_pipeline.storage.cache import BLOCK, BlockCache
from trainer.config.io import load_config
from trainer.config.run import Config
from trainer.config.training import LoggingConfig
from trainer.launch.local import _log_dir
from trainer.metrics.jsonl import JSONLWriter
from trainer.metrics.wandb_sink import WandbSink


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home folder, and another place to work in."""
    (tmp_path / "home").mkdir()
    (tmp_path / "work").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "home"


def test_a_run_in_the_home_folder(home: Path) -> None:
    config = dataclasses.replace(Config(), run_dir="~/run")
    assert _log_dir(config) == home / "run" / "logs"
    JSONLWriter("~/run").write({"step": 1})
    assert (home / "run/logs/metrics.jsonl").read_text() == '{"step": 1}\n'
    WandbSink(LoggingConfig(wandb="offline"), "~/run", {}, None).close()
    assert (home / "run/wandb").is_dir()
    BlockCache("~/cache", 16 * BLOCK).read("shard", 4, 0, 4, lambda start, stop: b"abcd")
    assert Counter(path.name for path in (home / "cache").glob("*/*.*")).total() == 1
    (home / "run.yaml").write_text("steps: 7\n")
    assert load_config("~/run.yaml").steps == 7
    assert list(Path.cwd().iterdir()) == []
