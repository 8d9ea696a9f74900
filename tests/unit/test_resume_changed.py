"""A run that resumes as something else: what a rank does, from its configuration file to its exit code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.unit.one_rank import Train, one_rank, small_shards
from trainer.checkpoint.export import open_weights
from trainer.exit_codes import ExitCode

TINY = (
    "data.image_size=16",
    "data.workers=0",
    "first_stage.name=identity",
    "unet={model_channels: 16, channel_multipliers: [1, 2], num_res_blocks: 1, attention_factors: [2]}",
    "unet.head_dim=16",
    "unet.num_groups=4",
    "unet.attention=plain",
    "global_batch_size=2",
    "micro_batch_size=2",
    "logging={every: 1, wandb: disabled, progress_bar: false}",
    "distributed={engine: torch, zero_stage: 0, precision: fp32, doctor: false, watchdog_s: 0}",
    "checkpoint.asynchronous=false",
)
CHANGED = ("steps=2", "diffusion.prediction=v", "diffusion.beta_end=0.02", "optimizer.learning_rate=1e-3")


@pytest.fixture
def train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Train:
    where = (f"run_dir={tmp_path}/run", f"data.shards={small_shards(tmp_path / 'shards')}")
    return one_rank(monkeypatch, tmp_path, [*TINY, *where])


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a run folder but the lease, which is taken and given back."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != "lease.json"]
    return {str(path): path.read_bytes() for path in files}


def records(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "logs/metrics.jsonl").read_text().splitlines()]


def test_another_objective_is_refused_before_anything_is_written_and_goes_on_with_the_word(
    train: Train, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert train("steps=1") == ExitCode.DONE
    before = contents(tmp_path / "run")

    assert train(*CHANGED) == ExitCode.USER_ERROR
    (error,) = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    assert "diffusion.beta_end was 0.012, is 0.02; diffusion.prediction was eps, is v;" in error
    assert "'resume_changed=[diffusion.beta_end,diffusion.prediction]'" in error
    assert "learning_rate" not in error
    assert contents(tmp_path / "run") == before

    caplog.clear()
    assert train(*CHANGED, "resume_changed=[diffusion.beta_end,diffusion.prediction]") == ExitCode.DONE
    differences = ["diffusion.beta_end was 0.012, is 0.02", "diffusion.prediction was eps, is v"]
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert [text for text in warnings if "; ".join(differences) in text]
    events = [record for record in records(tmp_path / "run") if "event" in record]
    told = ["settings changed", "resume", "resume changed"]
    assert [(event["step"], event["event"]) for event in events] == [(1, each) for each in told]
    assert events[2]["changed"] == differences

    # What it goes on as is what the next checkpoint says: the word is not needed again.
    assert train("steps=3", *CHANGED[1:]) == ExitCode.DONE
    assert [record["step"] for record in records(tmp_path / "run") if "loss" in record] == [1, 2, 3]


@pytest.mark.parametrize("name", ["muon", "adafactor"])
def test_another_optimizer_goes_on_bit_for_bit_and_nothing_else_goes_on_with_its_state(
    train: Train, tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    chosen = f"optimizer.name={name}"
    assert train("steps=4", chosen) == ExitCode.DONE
    at_once = open_weights(str(tmp_path / "run"), profile="weights")[0]
    (tmp_path / "run").rename(tmp_path / "first")
    for steps in (2, 4):
        assert train(f"steps={steps}", chosen) == ExitCode.DONE
    again = open_weights(str(tmp_path / "run"), profile="weights")[0]
    assert all(torch.equal(value, again[name]) for name, value in at_once.items())

    caplog.clear()
    assert train("steps=5", "resume_changed=[optimizer]") == ExitCode.USER_ERROR
    (error,) = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    assert f"was trained with optimizer.name={name} and goes on with nothing else" in error
