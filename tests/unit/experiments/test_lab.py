"""What experiments are judged by, on pictures whose truth is drawn; their table and plot."""

from __future__ import annotations

import csv
import random
import re
from pathlib import Path

import numpy as np
import pytest
from conditioning import shuffled
from lab.experiment import COLUMNS, Experiment, Figure, run
from lab.maps import Drawn, map_agreement
from lab.oracle import accuracy
from lab.tasks import TASKS, DrawnScene, enlarged, hole, psnr, read_all, shrunk, truth, with_low_frequencies
from lab.workshop import Workshop
from PIL import Image

from data_pipeline.tools.scenes.judge import EvaluationPrompt, evaluation_prompts
from data_pipeline.tools.scenes.scene import SceneOptions, make_scene, render

RESULTS = sorted((Path(__file__).parents[3] / "experiments" / "results").glob("*.csv"))
OPTIONS = SceneOptions(1, 1, 32, 32, 0.3, 0.44)


def drawn_scenes(folder: Path, count: int) -> tuple[list[EvaluationPrompt], list[Drawn]]:
    prompts, maps = [], []
    for number in range(count):
        scene = make_scene(OPTIONS, random.Random(number))
        pixels, labels, _ = render(scene)
        own = folder / f"map_{number}"
        for place in (folder / "all", own):
            place.mkdir(exist_ok=True)
            Image.fromarray(pixels).save(place / f"{number:07d}.png")
        prompts.append(EvaluationPrompt("", scene.main.color, scene.main.shape, scene.background))
        maps.append(Drawn(labels, own))
    return prompts, maps


def test_accuracy_is_one_on_the_truth_and_counts_what_is_wrong(tmp_path: Path) -> None:
    prompts, _ = drawn_scenes(tmp_path, 6)
    assert accuracy(tmp_path / "all", prompts) == {"colour": 1.0, "shape": 1.0, "oracle": 1.0}
    first = prompts[0]
    prompts[0] = EvaluationPrompt("", "red" if first.color != "red" else "blue", first.shape, "")
    assert accuracy(tmp_path / "all", prompts) == pytest.approx(
        {"colour": 5 / 6, "shape": 1, "oracle": 5 / 6}
    )


def test_maps_agree_with_the_scenes_that_they_are_of(tmp_path: Path) -> None:
    _, maps = drawn_scenes(tmp_path, 6)
    own, others = map_agreement(maps), map_agreement(maps, shift=1)
    assert own["agreement"] > 0.97
    assert own["iou"] > 0.9
    assert others["agreement"] < own["agreement"]
    assert others["iou"] < 0.7


@pytest.mark.parametrize(
    ("task", "measure", "own", "other"),
    [
        ("layout", "box", 0.85, 0.75),
        ("layout", "shape", 0.99, 0.6),
        ("depth", "iou", 0.9, 0.7),
        ("super-resolution", "psnr", 99, 20),
        ("super-resolution", "small psnr", 99, 20),
        ("inpainting", "untouched", 1, 0.6),
        ("inpainting", "inside", 1, 0.7),
    ],
)
def test_the_truth_shows_what_it_was_asked_for(task: str, measure: str, own: float, other: float) -> None:
    scenes = [make_scene(OPTIONS, random.Random(number)) for number in range(12)]
    drawn = [DrawnScene(number, scene, (truth(scene),)) for number, scene in enumerate(scenes)]
    assert read_all(TASKS[task], drawn)[measure] >= own
    assert read_all(TASKS[task], drawn, shift=1)[measure] < other


def test_holes_are_halves_in_turn() -> None:
    corners = [(hole(n)[0, 0], hole(n)[0, -1], hole(n)[-1, -1], hole(n)[-1, 0]) for n in range(5)]
    left, top, right, bottom = (1, 0, 0, 1), (1, 1, 0, 0), (0, 1, 1, 0), (0, 0, 1, 1)
    assert corners == [left, top, right, bottom, left]
    assert all(hole(n).mean() == 0.5 for n in range(4))


def test_low_frequencies_are_put_in_and_the_rest_is_kept() -> None:
    first, second = (truth(make_scene(OPTIONS, random.Random(number))) for number in (0, 1))
    small = shrunk(first)
    for picture in (second, enlarged(small)):
        result = with_low_frequencies(picture, small)
        assert psnr(shrunk(result), small) > psnr(shrunk(picture), small) + 3
        assert psnr(shrunk(result), small) > 30
    assert psnr(with_low_frequencies(first, small), first) > 45  # nothing is missing there


def test_decibels() -> None:
    grey = np.full((4, 4, 3), 100, np.uint8)
    assert psnr(grey, grey) == 99
    assert psnr(grey, grey + np.uint8(51)) == pytest.approx(20 * np.log10(5))


def test_shuffled_prompts_are_met_by_chance() -> None:
    asked = evaluation_prompts(54)
    others = shuffled(asked, 4320)
    pairs = [(asked[number % 54], other) for number, other in enumerate(others)]
    assert np.mean([a.color == b.color for a, b in pairs]) == pytest.approx(1 / 6, abs=0.02)
    assert np.mean([a.shape == b.shape for a, b in pairs]) == pytest.approx(1 / 3, abs=0.02)
    assert sum(asked[0] == other for other in others) == 80  # each as often as it was asked for


def told(workshop: Workshop, seed: int, setting: str) -> dict[int, dict[str, float]]:
    path = workshop.folder / "asked.txt"
    path.write_text((path.read_text() if path.exists() else "") + f"{seed}{setting} ")
    return {5: {"height": seed + len(setting)}, 10: {"height": 2.0 * seed}}


EXPERIMENT = Experiment(
    "told", "Is it told?", ("a", "bb"), told, (Figure("Height", ("height",), by="step"),), "letters"
)


def rows_of(folder: Path) -> list[dict[str, str]]:
    return list(csv.DictReader((folder / "told.csv").open()))


def test_a_row_for_each_seed_setting_step_and_measure(tmp_path: Path) -> None:
    assert run(EXPERIMENT, ["--out", str(tmp_path), "--small", "--seeds", "3"]) == 0
    rows = rows_of(tmp_path)
    assert tuple(rows[0]) == COLUMNS
    found = [(row["seed"], row["setting"], row["step"], row["measure"], row["value"]) for row in rows]
    assert found == [
        ("3", "a", "5", "height", "4"),
        ("3", "a", "10", "height", "6"),
        ("3", "bb", "5", "height", "5"),
        ("3", "bb", "10", "height", "6"),
    ]
    assert all(len(row["commit"]) >= 40 and "cores of" in row["machine"] for row in rows)
    assert np.asarray(Image.open(tmp_path / "told.png")).std() > 0


def test_again_with_more_seeds_only_the_new_ones_are_measured(tmp_path: Path) -> None:
    for seeds in (["3"], ["3", "4"]):
        assert run(EXPERIMENT, ["--out", str(tmp_path), "--small", "--seeds", *seeds]) == 0
    assert (tmp_path / "asked.txt").read_text() == "3a 3bb 4a 4bb "
    assert [row["seed"] for row in rows_of(tmp_path)] == ["3"] * 4 + ["4"] * 4


def test_a_folder_of_another_size_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(EXPERIMENT, ["--out", str(tmp_path), "--small", "--seeds", "0"]) == 0
    assert run(EXPERIMENT, ["--out", str(tmp_path), "--seeds", "0"]) == 2
    assert "another size; choose another folder with --out" in capsys.readouterr().err


def test_a_failed_command_ends_the_experiment_with_its_code(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def failing(workshop: Workshop, seed: int, setting: str) -> dict[int, dict[str, float]]:
        workshop.command(["export", str(tmp_path / "nothing"), str(tmp_path / "file.safetensors")])
        return {}

    experiment = Experiment("failing", "", ("a",), failing, (), "")
    assert run(experiment, ["--out", str(tmp_path), "--small", "--seeds", "0"]) == 2
    said = capsys.readouterr().err
    assert "ldm export ended with exit code 2" in said
    log = said.split("its words are in ")[1].strip().removesuffix(".")
    assert "nothing" in Path(log).read_text()


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_committed_results_say_where_they_come_from(path: Path) -> None:
    rows = list(csv.DictReader(path.open()))
    assert len({row["seed"] for row in rows}) > 1
    for row in rows:
        assert re.fullmatch(r"[0-9a-f]{40}", row["commit"]), "made by a clean checkout"
        assert "cores of" in row["machine"]
        assert row["time"].endswith("+00:00")
    assert path.with_suffix(".png").exists() or path.stem == "speedrun"
