"""Synthetic shards: determinism, layout, truth of the captions; and the judge of pictures."""

from __future__ import annotations

import io
import itertools
import json
import random
import tarfile
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageFilter

from data_pipeline.errors import DataError
from data_pipeline.tools.scenes.judge import EvaluationPrompt, box_overlap, evaluation_prompts, judge
from data_pipeline.tools.scenes.scene import (
    COLORS,
    NUM_CLASSES,
    SHAPES,
    SceneOptions,
    describe,
    ground_truth,
    make_scene,
    render,
)
from data_pipeline.tools.scenes.write_shards import SynthesisOptions, synthesize
from trainer.__main__ import main

SMALL = SceneOptions(1, 1, 64, 64, 0.2, 0.4)


def spoil(pixels: np.ndarray, how: str) -> np.ndarray:
    image = Image.fromarray(pixels)
    if how == "blur":
        return np.asarray(image.filter(ImageFilter.GaussianBlur(2.0)))
    if how == "noise":
        return np.clip(pixels + np.random.default_rng(0).normal(0, 15, pixels.shape), 0, 255).astype(np.uint8)
    if how == "faded":
        return (0.6 * pixels + 50).astype(np.uint8)
    if how == "coarse":
        return np.asarray(image.resize((16, 16)).resize((64, 64), Image.Resampling.BICUBIC))
    if how == "jpeg":
        image.save(out := io.BytesIO(), "JPEG", quality=30)
        return np.asarray(Image.open(out))
    return pixels


@pytest.mark.parametrize(
    ("how", "least"),
    [("clean", 1.0), ("blur", 0.99), ("noise", 0.99), ("faded", 0.99), ("coarse", 0.97), ("jpeg", 0.99)],
)
def test_judge_reads_its_own_drawings(how: str, least: float) -> None:
    color = shape = 0
    n = 54
    for i in range(n):
        scene = make_scene(SMALL, random.Random(i))
        item = scene.objects[0]
        expected = EvaluationPrompt("", item.color, item.shape, scene.background)
        found = judge(spoil(render(scene)[0], how).transpose(2, 0, 1), expected)
        color += found.color_correct
        shape += found.shape_correct
    assert color / n >= least
    assert shape / n >= least


def test_judge_reads_the_place_of_what_it_sees() -> None:
    overlaps, others = [], []
    for i in range(36):
        scene, other = make_scene(SMALL, random.Random(i)), make_scene(SMALL, random.Random(i + 1))
        expected = EvaluationPrompt("", scene.main.color, scene.main.shape, scene.background)
        seen = judge(render(scene)[0].transpose(2, 0, 1), expected).box
        assert seen is not None
        boxes = [tuple(ground_truth(each)["layout"][0][1:]) for each in (scene, other)]
        overlaps.append(box_overlap(seen, boxes[0]))
        others.append(box_overlap(seen, boxes[1]))
    assert min(overlaps) > 0.85  # to a pixel on each side
    assert max(overlaps) <= 1
    assert sum(others) / len(others) < 0.5


@pytest.mark.parametrize(
    ("first", "second", "overlap"),
    [
        ((0.0, 0.0, 0.5, 0.5), (0.0, 0.0, 0.5, 0.5), 1.0),
        ((0.0, 0.0, 0.5, 0.5), (0.25, 0.0, 0.75, 0.5), 1 / 3),
        ((0.0, 0.0, 1.0, 1.0), (0.5, 0.5, 1.0, 1.0), 0.25),
        ((0.0, 0.0, 0.5, 0.5), (0.5, 0.0, 1.0, 0.5), 0.0),
        ((0.0, 0.0, 0.2, 0.2), (0.5, 0.5, 1.0, 1.0), 0.0),
    ],
)
def test_overlap_of_boxes(first: tuple[float, ...], second: tuple[float, ...], overlap: float) -> None:
    assert box_overlap(first, second) == pytest.approx(overlap)
    assert box_overlap(second, first) == pytest.approx(overlap)


def test_judge_sees_wrong_and_empty_pictures() -> None:
    red = EvaluationPrompt("", "red", "circle", "white")
    for value in (0, 128, 255):
        found = judge(np.full((3, 64, 64), value, np.uint8), red)
        assert (found.color, found.shape, found.color_correct, found.shape_correct) == (
            None,
            None,
            False,
            False,
        )
    noise = np.random.default_rng(1).integers(0, 256, (3, 64, 64), np.uint8)
    assert not judge(noise, red).shape_correct or judge(noise, red).overlap < 0.5
    scene = make_scene(SMALL, random.Random(1))
    item = scene.objects[0]
    wrong = EvaluationPrompt(
        "", next(c for c in COLORS if c != item.color), next(s for s in SHAPES if s != item.shape), ""
    )
    found = judge(render(scene)[0].transpose(2, 0, 1), wrong)
    assert (found.color_correct, found.shape_correct) == (False, False)
    assert (found.color, found.shape) == (item.color, item.shape)


def test_evaluation_prompts_cover_everything() -> None:
    prompts = evaluation_prompts(72)
    assert {(p.color, p.shape) for p in prompts[:18]} == {(c, s) for c in COLORS for s in SHAPES}
    assert len({(p.color, p.shape, p.background) for p in evaluation_prompts(54)}) == 54
    assert all(p.color in p.prompt and p.shape in p.prompt and p.background in p.prompt for p in prompts)


def test_captions_are_true() -> None:
    for i in range(200):
        scene = make_scene(SceneOptions(1, 4), random.Random(i))
        things = {f"{o.color} {o.shape}" for o in scene.objects}
        for caption in describe(scene, random.Random(i)):
            words = caption.replace(",", " ").replace(":", " ").split()
            named = {f"{a} {b}" for a, b in itertools.pairwise(words) if a in COLORS and b in SHAPES}
            assert named <= things
            assert named


def test_shards_are_complete_and_deterministic(tmp_path: Path) -> None:
    options = SynthesisOptions(
        70, seed=4, samples_per_shard=40, maps=True, failed_share=0.2, scene=SceneOptions(1, 3, 48, 90)
    )
    reports = list(synthesize(str(tmp_path / "a"), options))
    list(synthesize(str(tmp_path / "b"), options, workers=2))
    names = sorted(p.name for p in (tmp_path / "a").iterdir())
    shards = [f"{i:05d}{e}" for i in range(2) for e in (".tar", ".parquet", "_stats.json")]
    assert names == sorted([*shards, "synthesis.json"])
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    table = pq.read_table(tmp_path / "a" / "00001.parquet").to_pylist()
    stats = json.loads((tmp_path / "a" / "00001_stats.json").read_text())
    with tarfile.open(tmp_path / "a" / "00001.tar") as tar:
        members = {m.name: tar.extractfile(m).read() for m in tar.getmembers()}  # type: ignore[union-attr]
    good = [row for row in table if row["status"] == "success"]
    assert stats["successes"] == len(good) == reports[1].successes < len(table) == 30
    assert {n.partition(".")[0] for n in members} == {row["key"] for row in good}
    for row in good:
        truth = json.loads(members[f"{row['key']}.json"])
        assert truth["sha256"] == row["sha256"]
        assert members[f"{row['key']}.txt"].decode() == row["caption"] in truth["all_captions"]
        seg = np.asarray(Image.open(io.BytesIO(members[f"{row['key']}.seg.png"])))
        assert seg.shape == (row["height"], row["width"])
        assert set(np.unique(seg)) <= {0, *(o["label"] + 1 for o in truth["objects"])}
        assert 0 <= truth["class_label"] < NUM_CLASSES
        assert {"punsafe", "pwatermark", "similarity", "aesthetic", "url", "original_width"} <= set(row)
    other = SynthesisOptions(70, seed=5, samples_per_shard=40, scene=SceneOptions(1, 3, 48, 90))
    list(synthesize(str(tmp_path / "c"), other))
    assert (tmp_path / "a" / "00000.tar").read_bytes() != (tmp_path / "c" / "00000.tar").read_bytes()


def test_bad_options_are_named() -> None:
    with pytest.raises(DataError, match="--samples is 0"):
        SynthesisOptions(0)
    with pytest.raises(DataError, match="1 to 10000"):
        SynthesisOptions(5, samples_per_shard=20_000)
    with pytest.raises(DataError, match="edges of 90 to 60 pixels; both must be 16 to 8192"):
        SynthesisOptions(5, scene=SceneOptions(min_edge=90, max_edge=60))


NONSENSE = {
    "--radius 50": "radii of 50 to 50 of the edge",
    "--radius 5:1": "radii of 5 to 1 of the edge",
    "--radius 0:0.3": "radii of 0 to 0.3 of the edge",
    "--quality 900": "--quality is 900; it must be 1 to 100",
    "--quality -5": "--quality is -5; it must be 1 to 100",
    "--failed-share nan": "--failed-share is nan; it must be at least 0 and below 1",
    "--failed-share 2": "--failed-share is 2.0; it must be at least 0 and below 1",
    "--workers -3": "--workers is -3; it must be at least 0",
    "--max-objects 0": "1 to 0 objects; both must be 1 to 8",
    "--max-objects 2 --objects 1:3": "not allowed with argument --max-objects",
    "--objects 2.9": "--objects is '2.9'; write whole numbers",
    "--objects 3:1": "3 to 1 objects; both must be 1 to 8",
    "--size 40.5:50": "--size is '40.5:50'; write whole numbers",
    "--size 1e9": "edges of 1000000000 to 1000000000 pixels; both must be 16 to 8192",
}


@pytest.mark.parametrize("options", NONSENSE)
def test_nonsense_is_one_sentence_and_writes_nothing(tmp_path: Path, capsys, options: str) -> None:
    words = ["data", "synthesize", str(tmp_path / "set"), "--samples", "2", *options.split()]
    try:
        code = main(words)
    except SystemExit as end:  # argparse's own
        code = end.code
    assert code == 2
    assert NONSENSE[options] in capsys.readouterr().err
    assert not (tmp_path / "set").exists()


@pytest.mark.parametrize("radius", [0.01, 0.5])
@pytest.mark.parametrize("objects", [1, 8])
def test_scenes_at_the_ends_of_their_ranges_are_drawn(radius: float, objects: int) -> None:
    options = SceneOptions(objects, objects, 16, 24, radius, radius, jitter=255)
    for i in range(20):
        scene = make_scene(options, random.Random(i))
        assert render(scene)[0].shape == (scene.height, scene.width, 3)
        assert describe(scene, random.Random(i))


def synthesized(folder: Path, samples: int, *options: str) -> int:
    words = ["--samples", str(samples), "--samples-per-shard", "2", "--size", "16:24", *options]
    return main(["data", "synthesize", str(folder), *words])


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_same_command_goes_on_where_it_was_interrupted(tmp_path: Path) -> None:
    assert synthesized(tmp_path, 6) == 0
    whole = contents(tmp_path)
    assert len(whole) == 10
    (tmp_path / "00001.tar").unlink()
    (tmp_path / "00002_stats.json").unlink()
    assert synthesized(tmp_path, 6, "--workers", "0") == 0
    assert contents(tmp_path) == whole


@pytest.mark.parametrize("known", [True, False])
def test_other_shards_are_replaced_only_when_that_is_asked_for(tmp_path: Path, capsys, known: bool) -> None:
    """Of other options, or of nobody knows what, such as img2dataset's; the rest of the folder stays."""
    assert synthesized(tmp_path / "fresh", 2) == 0
    folder = tmp_path / "set"
    assert synthesized(folder, 6, "--seed", "1") == 0
    if not known:
        (folder / "synthesis.json").unlink()
    (folder / "notes.txt").write_text("mine")
    before = contents(folder)
    assert synthesized(folder, 2) == 2
    assert f"{folder} holds other shards (00000.parquet)" in capsys.readouterr().err
    assert contents(folder) == before
    assert synthesized(folder, 2, "--overwrite") == 0
    assert contents(folder) == {**contents(tmp_path / "fresh"), "notes.txt": b"mine"}


def test_shards_of_other_names_are_never_mixed_with(tmp_path: Path, capsys) -> None:
    (tmp_path / "000000.tar").write_bytes(b"of LAION")
    for options in ((), ("--overwrite",)):
        assert synthesized(tmp_path, 2, *options) == 2
        assert "shards of another kind (000000.tar); choose another folder" in capsys.readouterr().err
        assert contents(tmp_path) == {"000000.tar": b"of LAION"}


def test_an_empty_path_is_not_the_root(capsys) -> None:
    assert main(["data", "synthesize", "", "--samples", "2"]) == 2
    assert "An empty path names no folder" in capsys.readouterr().err
