"""Layout, depth, super-resolution and inpainting: what is given of a scene, and what pictures show of it."""

from __future__ import annotations

import json
import random
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from data_pipeline.tools.scenes.judge import EvaluationPrompt, box_overlap, judge
from data_pipeline.tools.scenes.scene import (
    BACKGROUNDS,
    NUM_CLASSES,
    Scene,
    SceneOptions,
    ground_truth,
    make_scene,
    render,
)
from lab.maps import nearest_colour
from lab.oracle import pixels_of
from lab.workshop import RADIUS, Workshop

EDGE = 32
FACTOR = 4
"""Of super-resolution: the small picture has the size of the latents."""
SCENES = 36
PROJECTIONS = 4

Pixels = NDArray[np.uint8]


@dataclass(frozen=True)
class Task:
    """One kind of condition."""

    model: tuple[str, ...]
    """What its model has in other ways than the demo's."""
    give: Callable[[int, Scene, Path], tuple[str, ...]]
    """(number, scene, folder for files) -> options of `ldm sample`."""
    read: Callable[[int, Scene, Pixels], dict[str, float]]
    """(number, scene, picture [H, W, 3]) -> how well the one shows the other."""
    share: float = 0.5
    """Of the scale's steps: what is concatenated is learned in fewer than what is attended to."""
    radius: tuple[float, float] = RADIUS
    """Of the objects of its scenes, a share of the picture's edge."""


@dataclass(frozen=True)
class DrawnScene:
    """What was drawn of one scene."""

    number: int
    scene: Scene
    pictures: tuple[Pixels, ...]


def draw_scenes(workshop: Workshop, task: Task, model: Path, out: Path, *options: str) -> list[DrawnScene]:
    """`scale.pictures` pictures of all scenes together."""
    out.mkdir(parents=True, exist_ok=True)
    count = min(SCENES, workshop.scale.pictures // 3)
    drawn = []
    for number in range(count):
        scene = make_scene(SceneOptions(1, 1, EDGE, EDGE, *task.radius), random.Random(number))
        indexed = ("--first-index", str(number * 1000), "--count", str(workshop.scale.pictures // count))
        given = task.give(number, scene, out)
        folder = workshop.draw(model, out / f"of_{number}", *given, *indexed, *options)
        drawn.append(DrawnScene(number, scene, tuple(pixels_of(path) for path in sorted(folder.iterdir()))))
    return drawn


def read_all(task: Task, drawn: list[DrawnScene], shift: int = 0) -> dict[str, float]:
    """Means over all pictures, judged against their own scene, or the one `shift` places further on."""
    found = [
        task.read(each.number, drawn[(place + shift) % len(drawn)].scene, pixels)
        for place, each in enumerate(drawn)
        for pixels in each.pictures
    ]
    return {name: statistics.fmean(figures[name] for figures in found) for name in found[0]}


def truth(scene: Scene) -> Pixels:
    """[H, W, 3]."""
    return render(scene)[0]


def _give_layout(number: int, scene: Scene, folder: Path) -> tuple[str, ...]:
    path = folder / f"layout_{number}.json"
    path.write_text(json.dumps(ground_truth(scene)["layout"]))
    return "--layout", str(path)


def _read_layout(_: int, scene: Scene, pixels: Pixels) -> dict[str, float]:
    """box: intersection over union of the asked box with that of the object; 0 where there is none."""
    item = scene.main
    seen = judge(pixels.transpose(2, 0, 1), EvaluationPrompt("", item.color, item.shape, scene.background))
    rows = ground_truth(scene)["layout"]
    assert isinstance(rows, list)
    _, x0, y0, x1, y1 = rows[0]
    overlap = box_overlap(seen.box, (x0, y0, x1, y1)) if seen.box else 0.0
    return {"box": overlap, "colour": float(seen.color_correct), "shape": float(seen.shape_correct)}


def _give_depth(number: int, scene: Scene, folder: Path) -> tuple[str, ...]:
    return "--depth", _saved(render(scene)[2], folder / f"depth_{number}.png")


def _read_depth(_: int, scene: Scene, pixels: Pixels) -> dict[str, float]:
    """iou: of the pixels that are no background with those that are near."""
    near, shown = render(scene)[1] > 0, nearest_colour(pixels) >= len(BACKGROUNDS)
    return {"iou": float((near & shown).sum() / (near | shown).sum())}


def _give_small(number: int, scene: Scene, folder: Path) -> tuple[str, ...]:
    return "--image", _saved(shrunk(truth(scene)), folder / f"small_{number}.png")


def _read_enlarged(_: int, scene: Scene, pixels: Pixels) -> dict[str, float]:
    """psnr: against the truth; small psnr: both shrunk, which is what was given."""
    original = truth(scene)
    return {"psnr": psnr(pixels, original), "small psnr": psnr(shrunk(pixels), shrunk(original))}


def _give_hole(number: int, scene: Scene, folder: Path) -> tuple[str, ...]:
    picture = _saved(truth(scene), folder / f"picture_{number}.png")
    mask = _saved(np.uint8(255) * hole(number).astype(np.uint8), folder / f"hole_{number}.png")
    return "--image", picture, "--mask", mask


def _read_filled(number: int, scene: Scene, pixels: Pixels) -> dict[str, float]:
    """untouched: share of the pixels outside the hole that are the truth's; inside: of those in it that have
    the truth's colour, of nine."""
    original, inside = truth(scene), hole(number)
    same = (pixels == original).all(axis=2)
    alike = nearest_colour(pixels) == nearest_colour(original)
    return {"untouched": float(same[~inside].mean()), "inside": float(alike[inside].mean())}


def hole(number: int) -> NDArray[np.bool_]:
    """[H, W], True in one half of the picture: left, top, right and bottom in turn."""
    half = np.zeros((EDGE, EDGE), np.bool_)
    half[:, : EDGE // 2] = True
    return np.rot90(half, -(number % 4))


def shrunk(pixels: Pixels) -> Pixels:
    """[H, W, 3] -> [H / 4, W / 4, 3], as the condition is made in training."""
    return _resized(pixels, pixels.shape[0] // FACTOR)


def enlarged(pixels: Pixels) -> Pixels:
    """[h, w, 3] -> [4 h, 4 w, 3], bicubic."""
    return _resized(pixels, pixels.shape[0] * FACTOR)


def with_low_frequencies(pixels: Pixels, small: Pixels) -> Pixels:
    """The picture brought to look like `small` when it is shrunk, by adding what is missing, enlarged."""
    result = pixels.astype(np.float32)
    for _ in range(PROJECTIONS):
        missing = small.astype(np.float32) - _resized_channels(result, small.shape[0])
        result = np.clip(result + _resized_channels(missing, pixels.shape[0]), 0, 255)
    return np.rint(result).astype(np.uint8)


def psnr(first: Pixels, second: Pixels) -> float:
    """Decibels; 99 where the two are equal."""
    error = float(np.square(first.astype(np.float32) - second.astype(np.float32)).mean())
    return min(99.0, 10 * float(np.log10(255.0**2 / max(error, 1e-9))))


def _saved(pixels: Pixels, path: Path) -> str:
    Image.fromarray(pixels).save(path)
    return str(path)


def _resized(pixels: Pixels, edge: int) -> Pixels:
    return np.asarray(Image.fromarray(pixels).resize((edge, edge), Image.Resampling.BICUBIC))


def _resized_channels(values: NDArray[np.float32], edge: int) -> NDArray[np.float32]:
    channels = [
        Image.fromarray(values[:, :, i]).resize((edge, edge), Image.Resampling.BICUBIC) for i in range(3)
    ]
    return np.stack([np.asarray(channel) for channel in channels], axis=2)


_UNGUIDED = "sampling.guidance_scale=1"
TASKS = {
    "layout": Task(
        (
            f"conditioning={{openclip: null, layout: {{num_labels: {NUM_CLASSES}, max_boxes: 1, grid: 8, "
            "width: 128, layers: 2, heads: 4, head_dim: 32}}",
            # where boxes are attended to at the half size alone, place is not learned in 3200 steps
            "unet.attention_factors=[1, 2]",
            "optimizer.learning_rate=1e-3",
        ),
        _give_layout,
        _read_layout,
        share=3.0,
        radius=(0.18, 0.28),  # the demo's objects leave little to choose: boxes of any two overlap by 0.6
    ),
    "depth": Task(("conditioning={openclip: null, depth: {}}", _UNGUIDED), _give_depth, _read_depth),
    "super-resolution": Task(
        (f"conditioning={{openclip: null, low_resolution: {{factor: {FACTOR}}}}}", _UNGUIDED),
        _give_small,
        _read_enlarged,
    ),
    "inpainting": Task(
        ("conditioning={openclip: null, masked_image: {full_mask_probability: 0}}", _UNGUIDED),
        _give_hole,
        _read_filled,
    ),
}
