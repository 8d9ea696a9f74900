"""A run whose pictures grow: each step is that of its phase, wherever the run was stopped and went on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from data_pipeline.loader import beginning, build_loader
from tests.unit.one_rank import Train, one_rank, small_shards
from tests.unit.test_resume_changed import TINY, records
from trainer.__main__ import main
from trainer.checkpoint.catalogue import folder_name
from trainer.checkpoint.commands import find_checkpoint
from trainer.checkpoint.export import open_weights, read_about, read_state
from trainer.config.io import config_to_dict, load_config
from trainer.config.run import Config, ConfigError
from trainer.exit_codes import ExitCode
from trainer.operation.standing import standing
from trainer.stages.diffusion import DiffusionStage

PHASES = (
    "data.image_size=8",
    "phases=[{from_step: 2, image_size: 16, global_batch_size: 4, learning_rate: 1e-3}, "
    "{from_step: 4, micro_batch_size: 1}]",
    "checkpoint={every: 1, keep_last: 9, asynchronous: false}",
)


@pytest.fixture
def where(tmp_path: Path) -> tuple[str, ...]:
    return (f"run_dir={tmp_path}/run", f"data.shards={small_shards(tmp_path / 'shards')}")


@pytest.fixture
def train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: tuple[str, ...]) -> Train:
    return one_rank(monkeypatch, tmp_path, [*TINY, *where])


def weights(run: Path) -> dict[str, torch.Tensor]:
    return open_weights(str(run), profile="weights")[0]


def test_each_phase_trains_with_its_settings(train: Train, tmp_path: Path, where: tuple[str, ...]) -> None:
    assert train("steps=5", *PHASES) == ExitCode.DONE
    run = tmp_path / "run"
    rows = [record for record in records(run) if "loss" in record]
    assert [row["samples_seen"] for row in rows] == [2, 4, 8, 12, 16]
    assert [row["learning_rate"] for row in rows] == [1e-4, 1e-4, 1e-3, 1e-3, 1e-3]
    events = [record for record in records(run) if "event" in record]
    assert [(e["event"], e["step"]) for e in events] == [("phase", 2), ("phase", 4)]
    assert events[0]["image_size"] == 16
    changed = [(each["key"], each["was"], each["now"]) for each in events[0]["changed"]]
    assert changed == [
        ("global_batch_size", "2", "4"),
        ("data.image_size", "8", "16"),
        ("optimizer.learning_rate", "0.0001", "0.001"),
    ]
    assert events[1]["changed"] == [{"key": "micro_batch_size", "was": "2", "now": "1"}]
    stored = [json.loads(read_about(str(run), step=step)["config"]) for step in range(1, 6)]
    assert [each["data"]["image_size"] for each in stored] == [8, 8, 16, 16, 16]
    assert [each["global_batch_size"] for each in stored] == [2, 2, 4, 4, 4]
    assert [each["micro_batch_size"] for each in stored] == [2, 2, 2, 2, 1]

    # The data of a phase are those of a loader that begins with the phase's first epoch.
    config = load_config(None, [*TINY, *where, *PHASES, "steps=5"])
    phase = config.phase(2)
    loader = build_loader(
        config.at(2).data, seed=0, global_batch_size=4, position=beginning(phase.first_epoch)
    )
    with loader:
        batches = [next(loader) for _ in range(2)]
    assert batches[0].pixels.shape == (4, 3, 16, 16)
    losses = [row["loss"] for row in rows]
    healer = read_state(find_checkpoint(str(run), 4))["state"]["healer"]
    assert healer["losses"] == pytest.approx(losses[2:4])  # those before are of other pictures
    position = read_state(find_checkpoint(str(run), 4))["state"]["train"]["position"]
    assert position["states"] == batches[1].position["states"]


@pytest.mark.parametrize("stops", [(2,), (3,), (1, 2, 3, 4)])
def test_going_on_at_any_step_is_the_same_run(train: Train, tmp_path: Path, stops: tuple[int, ...]) -> None:
    assert train("steps=5", *PHASES) == ExitCode.DONE
    at_once = weights(tmp_path / "run")
    (tmp_path / "run").rename(tmp_path / "first")
    for steps in (*stops, 5):
        assert train(f"steps={steps}", *PHASES) == ExitCode.DONE
    again = weights(tmp_path / "run")
    assert all(torch.equal(again[name], value) for name, value in at_once.items())


def test_a_rewind_into_the_phase_before_trains_that_again(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first step of a phase turns NaN, and the checkpoint that it began with is gone."""
    train_step, loss, bad = DiffusionStage.train_step, DiffusionStage._loss, set[int]()
    run = tmp_path / "run"

    def strike(self: Any, batch: Any, step: int, *rest: Any) -> Any:
        if step == 2 and not bad:
            bad.update(batch.ordinals.tolist())
            shutil.rmtree(run / "checkpoints" / folder_name(2))
        return train_step(self, batch, step, *rest)

    def poisoned(self: Any, micro: Any, *rest: Any) -> Any:
        value, error = loss(self, micro, *rest)
        return (value * torch.nan if bad & set(micro.ordinals.tolist()) else value), error

    settings = (*PHASES, "healing={max_skips: 0}", "steps=5")
    with monkeypatch.context() as patch:
        patch.setattr(DiffusionStage, "train_step", strike)
        patch.setattr(DiffusionStage, "_loss", poisoned)
        assert train(*settings) == ExitCode.DONE
    told = records(run)
    (rewind,) = [each for each in told if each.get("event") == "rewind"]
    assert (rewind["step"], set(rewind["skipped"])) == (3, bad)
    assert (rewind["reached"], rewind["back_to"]) == (3, 1)
    found = standing(str(run))
    assert (found.steps_again, found.faults) == (2, 0)
    assert [each["step"] for each in told if each.get("event") == "phase"] == [2, 2, 4]
    losses = [(each["step"], each["loss"]) for each in told if "loss" in each]
    assert [step for step, _ in losses] == [1, 2, 2, 3, 4, 5]
    assert losses[1] == losses[2]

    # What a run that knew from the start what to leave out ends with.
    healed, journal = weights(run), (run / "healing.json").read_bytes()
    run.rename(tmp_path / "healed")
    run.mkdir()
    (run / "healing.json").write_bytes(journal)
    assert train(*settings) == ExitCode.DONE
    knowing = weights(run)
    assert all(torch.equal(knowing[name], value) for name, value in healed.items())


def test_a_phase_may_be_declared_later_but_not_for_what_was_trained(
    train: Train, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    small = "data.image_size=8"
    assert train("steps=2", small) == ExitCode.DONE
    assert train("steps=3", small, "phases=[{from_step: 1, image_size: 16}]") == ExitCode.USER_ERROR
    assert "data.image_size was 8, is 16" in caplog.records[-1].getMessage()
    assert train("steps=3", small, "phases=[{from_step: 2, image_size: 16}]") == ExitCode.DONE
    assert train("steps=4", small) == ExitCode.USER_ERROR
    assert "data.image_size was 16, is 8" in caplog.records[-1].getMessage()
    longer = "phases=[{from_step: 2, image_size: 16}, {from_step: 3, image_size: 8}]"
    assert train("steps=4", small, longer) == ExitCode.DONE


def test_what_a_later_phase_lacks_is_told_at_the_start(
    train: Train, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    wide = ("data.image_size=8", "data.lanes=2", "phases=[{from_step: 2, global_batch_size: 3}]")
    assert train("steps=3", *wide) == ExitCode.USER_ERROR
    assert "data.lanes=2 does not divide global_batch_size=3" in caplog.records[-1].getMessage()
    assert not list((tmp_path / "run").rglob("*.safetensors"))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["phases=[{from_step: 4}, {from_step: 2}]"], "from_step rise"),
        (["phases=[{image_size: 512}]"], "phases.from_step=0 must be"),
        (
            ["phases=[{from_step: 5, image_size: 100}]", "first_stage.name=kl"],
            "image_size=100 must be a multiple",
        ),
        (["phases=[{from_step: 5}]", "data.order=resampled"], "phases need data.order=indexed"),
        (["phases=[{from_step: 5}]", "distributed.zero_stage=3"], "never lets go of the memory"),
        (["phases=[{from_step: 5, imagesize: 512}]"], "did you mean `phases.image_size`"),
    ],
)
def test_phases_that_cannot_be_are_refused(settings: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        load_config(None, settings)


def test_steps_find_their_phase() -> None:
    config = load_config(
        None,
        [
            "steps=100",
            "global_batch_size=8",
            "phases=[{from_step: 10, global_batch_size: 4}, {from_step: 60}]",
        ],
    )
    assert [config.phase(step).number for step in (0, 9, 10, 59, 60, 99, 100)] == [0, 0, 1, 1, 2, 2, 2]
    assert config.phase(10)[1:] == (10, 60)
    assert config.phase(100)[1:] == (60, 100)
    assert [config.samples_after(step) for step in (0, 10, 11, 100)] == [0, 80, 84, 80 + 90 * 4]
    assert [each.steps for each in config.apart()] == [10, 50, 40]
    assert Config().phase(7)[:2] == (0, 0)
    assert Config().at(7) == Config()


def test_traced_and_explained_steps_are_those_of_their_phase(
    where: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "config.json"
    config.write_text(json.dumps(config_to_dict(load_config(None, [*TINY, *where, *PHASES, "steps=5"]))))
    assert main(["data", "index", where[1].partition("=")[2]]) == 0
    capsys.readouterr()
    assert main(["data", "trace", str(config), "--steps", "1:5"]) == 0
    traced = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(row["step"], len(row["keys"])) for row in traced] == [(1, 2), (2, 4), (3, 4), (4, 4)]
    for row in traced:
        assert main(["data", "explain", str(config), "--step", str(row["step"])]) == 0
        told: list[dict[str, Any]] = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        assert [each["key"] for each in told] == row["keys"]
        assert {each["step"] for each in told} == {row["step"]}


def test_a_plan_counts_each_phase(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["configs/sd/sd2_base_256.yaml", "--gpus", "64", "--gpu", "a100-80", "--json", "steps=1000"]
    assert main(["plan", *arguments]) == 0
    small = json.loads(capsys.readouterr().out)
    phases = "phases=[{from_step: 400, image_size: 512, global_batch_size: 512}]"
    assert main(["plan", *arguments, phases]) == 0
    first, second = json.loads(capsys.readouterr().out)["phases"]
    # A phase ends with a checkpoint, so that a fault costs less.
    assert first["days"] == pytest.approx(0.4 * small["days"], rel=1e-3)
    assert first["days"] < 0.4 * small["days"]
    assert (first["steps"], second["steps"]) == (400, 600)
    per_sample = [each["flops_per_sample"]["network"] for each in (first, second)]
    assert per_sample[1] > 4 * per_sample[0]


@pytest.mark.slow
def test_ranks_and_engine_change_inside_of_phases(tmp_path: Path, where: tuple[str, ...]) -> None:
    """Two ranks under ZeRO-1 over the first change, one rank over the next: the unbroken run's losses."""
    settings = [*TINY, *where, *PHASES, "optimizer.learning_rate=1e-3"]

    def train(name: str, *overrides: str) -> list[float]:
        path = tmp_path / f"{name}.json"
        run = f"run_dir={tmp_path}/{name}"
        path.write_text(json.dumps(config_to_dict(load_config(None, [*settings, run]))))
        assert main(["train", str(path), *overrides]) == 0
        return [record["loss"] for record in records(tmp_path / name) if "loss" in record]

    unbroken = train("unbroken", "steps=5", "distributed.ranks=1")
    zero = ("distributed.ranks=2", "distributed.engine=deepspeed", "distributed.zero_stage=1")
    train("changing", "steps=3", *zero)
    assert train("changing", "steps=5", "distributed.ranks=1") == pytest.approx(unbroken, rel=1e-4)
