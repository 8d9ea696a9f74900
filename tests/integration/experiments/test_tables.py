"""A few steps of every experiment: its table says what its pictures and weights say."""

from __future__ import annotations

import csv
import importlib
import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import speedrun
from lab.experiment import run
from lab.oracle import accuracy
from lab.workshop import SECOND_STAGE

from trainer.config.io import load_config

ROOT = Path(__file__).parents[3]
NAMES = sorted(path.stem for path in (ROOT / "experiments").glob("*.py"))
Found = dict[tuple[str, str], float]


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All of them share their shards, first stages and models, as users have them."""
    return tmp_path_factory.mktemp("experiments")


def found(name: str, out: Path) -> Found:
    """{(setting, measure): value} of the last step, after a small run with seed 0."""
    experiment = importlib.import_module(name).EXPERIMENT
    assert run(experiment, ["--out", str(out), "--small", "--seeds", "0"]) == 0
    rows = list(csv.DictReader((out / f"{name}.csv").open()))
    assert {row["setting"] for row in rows} == set(experiment.small_settings or experiment.settings)
    drawn = {measure for figure in experiment.figures for measure in figure.measures}
    assert drawn <= {row["measure"] for row in rows}
    assert (out / f"{name}.png").stat().st_size > 1000
    return {(row["setting"], row["measure"]): float(row["value"]) for row in rows}


@pytest.mark.parametrize("name", NAMES)
def test_help_explains(name: str) -> None:
    command = [sys.executable, str(ROOT / "experiments" / f"{name}.py"), "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert f"    python experiments/{name}.py --out" in done.stdout


def test_the_races_that_speedrun_shows_are_accepted() -> None:
    assert speedrun.__doc__ is not None
    lines = [line.split() for line in speedrun.__doc__.splitlines() if "python experiments/" in line]
    recipes = [speedrun._parser().parse_args(words[2:]).recipe for words in lines]
    assert recipes == [[], ["optimizer.name=muon"]]


@pytest.mark.slow
def test_guidance(out: Path) -> None:
    values = found("guidance", out)
    for scale in ("1", "3"):
        read = accuracy(out / "guidance" / f"seed_0_scale_{scale}" / "pictures")
        assert {name: values[scale, name] for name in read} == pytest.approx(read, rel=1e-4)
        assert values[scale, "oracle"] <= min(values[scale, "colour"], values[scale, "shape"])
        assert 0 <= values[scale, "recall"] <= 1
        assert values[scale, "fd"] > 0


@pytest.mark.slow
def test_averages(out: Path) -> None:
    values = found("averages", out)
    assert values["0.12", "weights apart"] < 0.1  # of the way from the raw weights: it is the same average
    assert values["0.12", "fd"] == pytest.approx(values["0.12", "kept fd"], rel=1e-2)
    assert ("raw", "weights apart") not in values


@pytest.mark.slow
def test_conditioning(out: Path) -> None:
    values = found("conditioning", out)
    own = accuracy(out / "conditioning" / "seed_0_text" / "pictures")
    assert values["text", "shape"] == pytest.approx(own["shape"], rel=1e-4)
    assert 0 < values["map", "agreement"] <= 1
    for kind, name in {"map": "agreement", "depth": "iou", "super-resolution": "psnr"}.items():
        assert values[kind, name] != values[f"{kind} shuffled", name]  # of the same pictures
    assert values["inpainting", "untouched"] == 1
    assert values["inpainting shuffled", "untouched"] < 1
    assert values["super-resolution constrained", "small psnr"] > values["super-resolution", "small psnr"]
    steps = {row["setting"]: row["step"] for row in csv.DictReader((out / "conditioning.csv").open())}
    assert (steps["layout"], steps["depth"]) == (
        "18",
        "3",
    )  # of the shared model 6
    boxes = json.loads((out / "conditioning" / "seed_0_layout" / "layout_0.json").read_text())
    assert len(boxes) == 1
    assert len(list((out / "conditioning" / "seed_0_layout" / "of_0" / "pictures").iterdir())) == 3


@pytest.mark.slow
def test_text_encoders_have_the_same_work(out: Path) -> None:
    values = found("text_encoders", out)
    steps = {row["setting"]: row["step"] for row in csv.DictReader((out / "text_encoders.csv").open())}
    assert steps == {"frozen, pooled": "6", "frozen": "6", "joint": "5"}
    read = accuracy(out / "text_encoders" / "seed_0_joint" / "pictures")
    assert values["joint", "shape"] == pytest.approx(read["shape"], rel=1e-4)
    assert len({values[setting, "held-out loss"] for setting in steps}) == 3


@pytest.mark.slow
def test_sizes(out: Path) -> None:
    values = found("sizes", out)
    assert {setting for setting, _ in values} == {
        *("rescaled 32", "rescaled 64", "as it is 32", "as it is 64"),
    }
    assert values["rescaled 32", "agreement"] != values["as it is 32", "agreement"]


@pytest.mark.slow
def test_objectives(out: Path) -> None:
    values = found("objectives", out)
    rows = list(csv.DictReader((out / "objectives.csv").open()))
    for setting in ("eps", "flow"):
        distances = {r["step"]: r["value"] for r in rows if (r["setting"], r["measure"]) == (setting, "fd")}
        assert list(distances) == ["1", "2", "3", "4", "5", "6"]
        assert len(set(distances.values())) == 6  # each is of other weights
    read = accuracy(out / "objectives" / "seed_0_objective_flow_6" / "pictures")
    assert values["flow", "shape"] == pytest.approx(read["shape"], rel=1e-4)


@pytest.mark.slow
def test_first_stages(out: Path) -> None:
    values = found("first_stages", out)
    assert 0 < values["pixels", "psnr"] < 60
    assert values["64", "share used"] * 64 == pytest.approx(values["64", "codes used"], rel=1e-4)
    assert 1 <= values["64", "codes used"] <= 64
    assert ("pixels", "codes used") not in values


@pytest.mark.slow
def test_compression_gives_each_factor_the_same_work(out: Path) -> None:
    values = found("compression", out)
    rows = list(csv.DictReader((out / "compression.csv").open()))
    steps = {row["setting"]: int(row["step"]) for row in rows}
    assert steps == {"1": 2, "8": 13, "8 vq": 13}  # 6 * 92 / 1052, at least 2, and 6 * 92 / 44
    assert values["8", "psnr"] > 0
    assert values["8 vq", "psnr"] not in (0, values["8", "psnr"])  # another first stage
    assert ("1", "psnr") not in values  # pixels have no first stage


@pytest.mark.slow
def test_speedrun_finds_the_first_checkpoint_that_meets_both_targets(
    out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = tmp_path / "records.csv"
    words = ["--out", str(out), "--small", "--record", str(table), "optimizer.learning_rate=1e-3"]
    assert speedrun.main([*words, "--loss", "9", "--oracle", "0"]) == 0
    rows = list(csv.DictReader(table.open()))
    assert [(row["recipe"], row["steps"], row["images"]) for row in rows] == [
        ("optimizer.learning_rate=1e-3", "2", "64")
    ]
    assert 0 < float(rows[0]["validation_loss"]) < 9
    assert [rows[0][name] for name in ("loss_target", "oracle_target", "small")] == ["9.0", "0.0", "True"]
    assert "reached after 2 steps, 64 images" in capsys.readouterr().out
    assert speedrun.main([*words, "--loss", "9", "--oracle", "0"]) == 2  # the clock would start in the middle
    assert "name a new folder with --out" in capsys.readouterr().err


def test_speedrun_refuses_a_recipe_that_moves_its_targets(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    moved = ("diffusion.prediction=x0", "validation.samples=10", "data.image_size=64")
    grown = "phases=[{from_step: 1, learning_rate: 1e-3}, {from_step: 2, image_size: 16}]"
    # What the file says, over what the race sets.
    repeated = f"checkpoint.every={load_config(str(SECOND_STAGE)).checkpoint.every}"
    for recipe in (*moved, grown, repeated):
        assert speedrun.main(["--out", str(tmp_path), recipe]) == 2
        assert "does not compare with the records" in capsys.readouterr().err
    for recipe, remedy in (
        ("seed=0", "--seeds"),
        (f"run_dir={tmp_path}", "--out"),
        ("init_from=a", "random"),
    ):
        assert speedrun.main(["--out", str(tmp_path), recipe]) == 2
        assert remedy in capsys.readouterr().err
    speedrun.check(["phases=[{from_step: 1, learning_rate: 1e-3}]", "steps=700", "unet.model_channels=64"])
    assert speedrun.main(["--out", str(tmp_path), "optimizer.rate=1"]) == 2
    assert "rate" in capsys.readouterr().err
    assert not (tmp_path / "speedrun").exists()


def test_a_table_of_other_columns_is_refused_before_the_race(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    targets = {"loss_target": 0.28, "oracle_target": 0.6, "small": False}
    record = speedrun.Record(
        "demo", 1, 300, 9600, 81.5, 0.27, 0.65, **targets, commit="c", machine="m, n", time="t"
    )
    table = tmp_path / "records.csv"
    for _ in range(2):
        speedrun.check_table(table)
        speedrun.add(table, [record])
    rows = list(csv.DictReader(table.open()))
    assert len(rows) == 2
    assert rows[1] == {name: str(value) for name, value in asdict(record).items()}
    table.write_text(table.read_text().replace("loss_target,", ""))
    assert speedrun.main(["--out", str(tmp_path / "out"), "--record", str(table)]) == 2
    assert "other columns" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
