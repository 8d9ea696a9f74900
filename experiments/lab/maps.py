"""Pictures from semantic maps, and how well their pixels agree with them."""

from __future__ import annotations

import random
import statistics
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from data_pipeline.tools.scenes.scene import (
    BACKGROUNDS,
    COLORS,
    NUM_CLASSES,
    SHAPES,
    SceneOptions,
    make_scene,
    render,
)
from lab.oracle import pixels_of
from lab.workshop import RADIUS, Workshop

MAP_MODEL = (
    f"conditioning={{openclip: null, semantic_map: {{num_labels: {NUM_CLASSES + 1}, channels: 3}}}}",
    "sampling.guidance_scale=1",
)
MAPS = 18
_PALETTE = np.asarray([*BACKGROUNDS.values(), *COLORS.values()], np.float32)


@dataclass(frozen=True)
class Drawn:
    """A map [H, W], 0 background, else class + 1, and the folder of what was drawn from it."""

    labels: NDArray[np.uint8]
    pictures: Path


def draw_maps(workshop: Workshop, model: Path, out: Path, size: int, seed: int) -> list[Drawn]:
    """The same scenes at any size, `scale.pictures` pictures of all maps together."""
    out.mkdir(parents=True, exist_ok=True)
    options = SceneOptions(1, 1, size, size, *RADIUS)
    maps = min(MAPS, workshop.scale.pictures // 3)
    drawn = []
    for number in range(maps):
        labels = render(make_scene(options, random.Random(number)))[1]
        path = out / f"map_{number}.png"
        Image.fromarray(labels).save(path)
        given = ("--semantic-map", str(path), "--size", f"{size}x{size}", "--seed", str(seed))
        indexed = ("--first-index", str(number * 1000), "--count", str(workshop.scale.pictures // maps))
        drawn.append(Drawn(labels, workshop.draw(model, out / f"of_map_{number}", *given, *indexed)))
    return drawn


def map_agreement(drawn: list[Drawn], shift: int = 0) -> dict[str, float]:
    """Means over all pictures.

    Args:
        shift: judge against the map so many places further on.

    Returns:
        agreement: share of pixels whose colour is that of their label (background: any background).
        iou: of the pixels in the object's colour with those of the object.
    """
    shares, overlaps = [], []
    for number, each in enumerate(drawn):
        labels = drawn[(number + shift) % len(drawn)].labels
        wanted = len(BACKGROUNDS) + int(labels.max() - 1) // len(SHAPES)
        inside = labels > 0
        for path in sorted(each.pictures.iterdir()):
            shown = nearest_colour(pixels_of(path))
            right = np.where(inside, shown == wanted, shown < len(BACKGROUNDS))
            shares.append(float(right.mean()))
            shows = shown == wanted
            overlaps.append(float((shows & inside).sum() / (shows | inside).sum()))
    return {"agreement": statistics.fmean(shares), "iou": statistics.fmean(overlaps)}


def nearest_colour(pixels: NDArray[np.uint8]) -> NDArray[np.intp]:
    """[H, W, 3] -> [H, W]: index into the backgrounds and then the colours of scenes."""
    gaps = pixels[:, :, None, :].astype(np.float32) - _PALETTE
    nearest: NDArray[np.intp] = np.square(gaps).sum(axis=3).argmin(axis=2)
    return nearest
