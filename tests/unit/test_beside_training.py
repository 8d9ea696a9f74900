"""What happens beside training holds it up neither by waiting nor by failing: snapshots, previews, Ray's
news."""

from __future__ import annotations

import json
import logging
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from data_pipeline.batch import Batch
from data_pipeline.config import DataConfig
from data_pipeline.errors import DataError
from data_pipeline.loader import Dataset, open_dataset
from data_pipeline.tools.scenes.write_shards import SynthesisOptions, synthesize
from trainer import assembly
from trainer.assembly import build_run
from trainer.checkpoint.catalogue import checkpoints_url, is_committed, snapshots_url
from trainer.checkpoint.writer_client import BackgroundWriter
from trainer.config.models import FirstStageConfig, UNetConfig
from trainer.config.run import Config
from trainer.config.training import DistributedConfig, EMAConfig, LoggingConfig
from trainer.distributed.env import DistributedEnv, initialise, shutdown
from trainer.run import Run
from trainer.train import preview


def config_for(tmp_path: Path, *, workers: int = 0) -> Config:
    """Of a small run on shards that are made."""
    list(synthesize(str(tmp_path / "shards"), SynthesisOptions(samples=16, samples_per_shard=8)))
    return Config(
        run_dir=str(tmp_path / "run"),
        global_batch_size=8,
        micro_batch_size=8,
        data=DataConfig(shards=f"{tmp_path}/shards/*.tar", image_size=32, workers=workers),
        first_stage=FirstStageConfig(name="identity", latent_channels=3),
        unet=UNetConfig(
            model_channels=32, channel_multipliers=(1,), num_res_blocks=1, head_dim=16, attention_factors=()
        ),
        ema=EMAConfig(power_stds=(0.1,), snapshot_every=1),
        distributed=DistributedConfig(engine="torch", precision="fp32"),
        logging=LoggingConfig(wandb="disabled", progress_bar=False),
    )


@pytest.fixture
def alone() -> Iterator[DistributedEnv]:
    """The only rank."""
    env = DistributedEnv.detect({})
    initialise(env, 60.0)
    yield env
    shutdown()


@pytest.fixture
def run(tmp_path: Path, alone: DistributedEnv) -> Iterator[Run]:
    """A small run of one rank, before its first step."""
    made = build_run(config_for(tmp_path), alone)
    yield made
    made.close()


def loader_processes() -> set[int]:
    children = psutil.Process().children()
    return {child.pid for child in children if "data_pipeline.feed.worker" in child.cmdline()}


def test_loader_processes_import_while_the_set_is_opened_and_networks_are_built(
    tmp_path: Path, alone: DistributedEnv, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are there before anything else, they are those that read, and a start that fails leaves none."""
    early: list[set[int]] = []

    def opening(*given: Any, **named: Any) -> Dataset:
        early.append(loader_processes())
        return open_dataset(*given, **named)

    config = config_for(tmp_path, workers=2)
    monkeypatch.setattr(assembly, "open_dataset", opening)
    run = build_run(config, alone)
    try:
        assert len(early[0]) == 2
        with closing(run.open_loader()) as batches:
            assert len(next(batches)) == 8
            assert loader_processes() == early[0]
    finally:
        run.close()
    unused = build_run(replace(config, run_dir=str(tmp_path / "unused")), alone)
    assert len(loader_processes()) == 2
    unused.close()
    assert loader_processes() == set()
    with pytest.raises(DataError, match="No shard matches"):
        build_run(replace(config, data=replace(config.data, shards=f"{tmp_path}/none/*.tar")), alone)
    assert len(early[-1]) == 2
    assert loader_processes() == set()


def test_a_snapshot_on_a_checkpoints_step_does_not_wait_for_the_checkpoint(run: Run) -> None:
    """The process that writes the checkpoint is stopped: storage that takes for ever."""
    batches = run.open_loader()
    run.state.advance(8, next(batches).position)
    batches.close()
    run.save()
    writer = run.checkpoints._writer
    assert isinstance(writer, BackgroundWriter)
    assert writer._process is not None
    os.kill(writer._process.pid, signal.SIGSTOP)
    try:
        done = threading.Event()

        def snapshot() -> None:
            run.save_snapshot()
            run.settle_snapshot()
            done.set()

        threading.Thread(target=snapshot, daemon=True).start()
        assert done.wait(120.0), "the snapshot waits for the checkpoint"
        assert is_committed(snapshots_url(run.config.run_dir), 1)
        assert not is_committed(checkpoints_url(run.config.run_dir), 1)
    finally:
        os.kill(writer._process.pid, signal.SIGCONT)
    run.checkpoints.wait()
    assert is_committed(checkpoints_url(run.config.run_dir), 1)


def test_a_snapshot_that_is_not_stored_ends_nothing(run: Run) -> None:
    Path(run.config.run_dir, "snapshots").write_text("a file where the folder should be")
    run.state.step = 1
    run.save_snapshot()
    run.settle_snapshot()
    records = Path(run.config.run_dir, "logs/metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["event"] for line in records if "event" in line] == ["snapshot failed"]
    run.state.step = 0
    run.save()
    run.checkpoints.wait()


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError()])
def test_a_preview_that_does_not_fit_is_left_out(
    run: Run, error: BaseException, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def too_large(batch: Batch) -> None:
        raise error

    monkeypatch.setattr(run.stage, "preview", too_large)
    batches = run.open_loader()
    before = [fragment.master.clone() for fragment in run.stage.engines["unet"].fragments()]
    with caplog.at_level(logging.WARNING):
        preview(run, next(batches))
    batches.close()
    assert "lower sampling.num_previews" in caplog.text
    after = [fragment.master for fragment in run.stage.engines["unet"].fragments()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))  # not the averages


def test_ray_gets_no_exception_for_storage_that_is_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("ray.train", reason='pip install "ray[default,train]"')
    from trainer.launch.ray_rank import store_pointer

    given = tmp_path / "pointer.json"
    given.write_text('{"step": 5}')
    store_pointer(given, str(tmp_path / "run/checkpoint_5/pointer.json"))
    assert json.loads((tmp_path / "run/checkpoint_5/pointer.json").read_text()) == {"step": 5}
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "nobody")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "nothing")
    with caplog.at_level(logging.WARNING):
        store_pointer(given, "s3://bucket/run/checkpoint_6/pointer.json")
    assert "does not get its pointer" in caplog.text
