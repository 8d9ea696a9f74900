"""`ldm evaluate sweep`: points, their table, and going on where it stopped; a network with random weights."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from tests.unit.evaluator.committed_run import CommittedRun
from trainer.__main__ import main
from trainer.config.io import config_to_dict, load_config
from trainer.model import build_model
from trainer.weights import read_weights, write_weights

SETTINGS = [
    "data.image_size=16",
    "first_stage.name=identity",
    "unet={model_channels: 16, channel_multipliers: [1, 2], num_res_blocks: 1, attention_factors: [2], "
    "head_dim: 16, num_groups: 4}",
    "conditioning.class_label={num_classes: 4, width: 16}",
]


@pytest.fixture
def command(tmp_path: Path) -> list[str]:
    """A sweep of two points over a model that is made here."""
    config = load_config(None, SETTINGS)
    torch.manual_seed(0)
    made = build_model(config)
    for name, parameter in made.network.named_parameters():  # it hears its conditions
        nn.init.normal_(parameter, std=0.5 if "attn2" in name or name.startswith("conditions.") else 0.05)
    source = str(tmp_path / "model.safetensors")
    write_weights(source, made.network.state_dict(), {"config": json.dumps(config_to_dict(config))})
    (tmp_path / "real").mkdir()
    for seed in range(5):
        pixels = np.random.default_rng(seed).integers(0, 256, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "real" / f"{seed}.png")
    where = ["--reference", str(tmp_path / "real"), "--out", str(tmp_path / "curve"), "--features", "random"]
    options = ["--guidance", "1:2:1", "--steps", "2", "--sample", "--class-label 1 --per-prompt 3"]
    return ["evaluate", "sweep", source, *where, *options]


def rows(tmp_path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO((tmp_path / "curve" / "curve.csv").read_text())))


def test_every_point_is_sampled_measured_and_kept(tmp_path: Path, command: list[str]) -> None:
    assert main(command) == 0
    found = rows(tmp_path)
    assert [(row["guidance"], row["steps"]) for row in found] == [("1", "2"), ("2", "2")]
    drawn = (tmp_path / "curve" / "curve.html").read_text()
    network = json.loads((tmp_path / "curve/guidance_1_steps_2/figures.json").read_text())["pictures"][
        "networks"
    ]
    named = f"{network['random']['name']}, weights {network['random']['sha256'][:16]}"
    assert {row["networks"] for row in found} == {named}
    assert all(text in drawn for text in (named, "guidance 2", "2 steps", "fd_random", found[0]["fd_random"]))
    assert found[0]["fd_random"] != found[1]["fd_random"]
    with Image.open(tmp_path / "curve" / "curve.png") as png:
        colours = {colour for _, colour in png.convert("RGB").getcolors(100_000) or []}
    assert (31, 119, 180) in colours, "a line, without plotly"
    point = tmp_path / "curve" / "guidance_2_steps_2"
    assert len(list((point / "pictures").iterdir())) == 3
    told = json.loads((point / "figures.json").read_text())
    assert float(found[1]["fd_random"]) == pytest.approx(told["figures"]["fd_random"], rel=1e-5)
    # a point equals `fidelity` of its pictures
    out = tmp_path / "alone.json"
    alone = ["evaluate", "fidelity", str(point), "--reference", str(tmp_path / "real"), "--out", str(out)]
    assert main([*alone, "--features", "random"]) == 0
    assert json.loads(out.read_text())["figures"] == told["figures"]


def test_it_goes_on_where_it_stopped_and_never_mixes_sweeps(
    tmp_path: Path,
    command: list[str],
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    assert main(command) == 0
    first = rows(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "curve").glob("*/pictures/*.png")}
    more = [word if word != "1:2:1" else "1:3:1" for word in command]
    assert main(more) == 0
    assert rows(tmp_path)[:2] == first
    assert len(rows(tmp_path)) == 3
    assert main([word.replace("--class", "--batch-size 2 --class") for word in command]) == 0, "the same"
    assert all(path.stat().st_mtime_ns == time for path, time in before.items()), "made once"
    capsys.readouterr()
    assert main([word.replace("--class-label 1", "--class-label 2") for word in command]) == 2
    assert "is of another sweep (sample " in capsys.readouterr().err
    assert main([*command, "--image-size", "8"]) == 2
    assert "is of another sweep (image_size None instead of 8, crop)" in capsys.readouterr().err
    point = tmp_path / "curve" / "guidance_1_steps_2" / "figures.json"
    (tmp_path / "real" / "0.png").rename(tmp_path / "0.png")
    assert main(command) == 2
    assert "is of another sweep (reference_content " in capsys.readouterr().err
    (tmp_path / "0.png").rename(tmp_path / "real" / "0.png")
    tensors, metadata = read_weights(command[2])
    write_weights(command[2], tensors, metadata | {"step": "2"})
    assert main(command) == 2
    assert "is of another sweep (weights " in capsys.readouterr().err
    write_weights(command[2], tensors, metadata)
    told = json.loads(point.read_text())
    for name in ("weights", "reference_content"):
        del told["settings"][name]
    point.write_text(json.dumps(told))
    assert main(command) == 0
    assert "does not say its weights and reference_content" in caplog.text
    told["pictures"]["networks"]["random"]["sha256"] = "of others"
    for name in ("networks", "image_size"):  # as earlier versions wrote it
        del told["settings"][name]
    point.write_text(json.dumps(told))
    assert main(command) == 2
    assert "is of another sweep (networks " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "value", "sentence"),
    [
        ("--guidance", "1:x:1", "FIRST:LAST:STEP"),
        ("--guidance", "3:1:1", "FIRST:LAST:STEP"),
        ("--guidance", "1:1000:0.5", "points are more than"),
        ("--steps", "2.5", "no number of steps"),
        ("--sample", "--class-label 1 --out x", "may not hold --out"),
        ("--sample", "--class-label '1", "correct its quotes"),
        ("--sample", "--class-label 9", "9"),
        ("--guidance", "1,20000", "sampling.guidance_scale=20000.0 must be"),
        ("--steps", "2,inf", "FIRST:LAST:STEP"),
        ("--steps", "2,5000", "sampling.steps=5000 must be at most"),
        ("--out", " ", "--out is empty"),
    ],
)
def test_mistakes_are_told_before_any_point_is_made(
    tmp_path: Path,
    command: list[str],
    capsys: pytest.CaptureFixture[str],
    option: str,
    value: str,
    sentence: str,
) -> None:
    command[command.index(option) + 1] = value
    assert main(command) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("ldm: ")]
    assert len(lines) == 1
    assert sentence in lines[0]
    assert list(tmp_path.glob("curve/*")) == []


def test_all_points_are_of_one_checkpoint_and_sets_may_be_large(tmp_path: Path) -> None:
    """The run trains on between them; a set of any size goes on inside a point."""
    run = CommittedRun(str(tmp_path / "run"), "checkpoint.keep_last=9")
    run.commit(100)
    (tmp_path / "real").mkdir()
    for seed in range(5):
        pixels = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "real" / f"{seed}.png")
    where = ["--reference", str(tmp_path / "real"), "--out", str(tmp_path / "curve"), "--features", "random"]
    command = ["evaluate", "sweep", str(tmp_path / "run"), *where, "--sample", "--count 6 --batch-size 4"]
    assert main([*command, "--guidance", "1", "--steps", "2"]) == 0
    run.commit(200)
    run.close()
    assert main([*command, "--guidance", "1,2", "--steps", "2"]) == 0
    for guidance in (1, 2):
        point = tmp_path / "curve" / f"guidance_{guidance}_steps_2"
        assert json.loads((point / "prompts.json").read_text())["checkpoint"] == 100
        assert len(list((point / "pictures").iterdir())) == 6
    assert len(rows(tmp_path)) == 2
