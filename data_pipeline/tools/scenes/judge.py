"""Reads colour, shape and place back from the pixels of a generated single-object picture."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from data_pipeline.tools.scenes.scene import BACKGROUNDS, COLORS, SHAPES, shape_coverage

_MIN_CHROMA = 40.0
_MIN_AREA = 0.006


Box: TypeAlias = tuple[float, float, float, float]
"""x0, y0, x1, y1 in shares of width and height, as a row of a layout behind its label."""


@dataclass(frozen=True)
class EvaluationPrompt:
    """One prompt that names exactly one object, with the right answers."""

    prompt: str
    color: str
    shape: str
    background: str


@dataclass(frozen=True)
class Judgement:
    """What a picture shows; None where nothing is recognised."""

    color: str | None
    shape: str | None
    overlap: float
    """Intersection over union of the object with the best shape."""
    box: Box | None
    """Around the object."""
    color_correct: bool
    shape_correct: bool


def evaluation_prompts(n: int) -> list[EvaluationPrompt]:
    """`n` prompts that go evenly through every colour, shape and background (54 combinations)."""
    grounds = list(BACKGROUNDS)
    pairs = [(color, shape) for color in COLORS for shape in SHAPES]
    prompts = []
    for i in range(n):
        color, shape = pairs[i % len(pairs)]
        ground = grounds[(i // len(pairs) + i) % len(grounds)]
        text = f"a {color} {shape} on a {ground} background"
        prompts.append(EvaluationPrompt(text, color, shape, ground))
    return prompts


def judge(pixels: NDArray[np.uint8], expected: EvaluationPrompt) -> Judgement:
    """Decide colour and shape of the object in uint8 [3, H, W] and compare with the prompt.

    Colour: the palette entry nearest in chroma to most of the coloured pixels. Shape: the ground-truth
    geometry of equal area and centre that overlaps the largest coloured region best.
    """
    color, weight = _color(pixels)
    if color is None:
        return Judgement(None, None, 0.0, None, False, False)
    region = _largest_region(weight > 0.5)
    shape, overlap = _shape(region)
    correct = (color == expected.color, shape == expected.shape)
    return Judgement(color, shape, overlap, _box(region), *correct)


def _color(pixels: NDArray[np.uint8]) -> tuple[str | None, NDArray[np.float32]]:
    image = pixels.astype(np.float32).transpose(1, 2, 0)  # [H, W, 3]
    chroma = image - image.mean(axis=2, keepdims=True)  # the part without gray
    strength = np.linalg.norm(chroma, axis=2)
    names = list(COLORS)
    palette = np.asarray([COLORS[n] for n in names], np.float32)
    axes = palette - palette.mean(axis=1, keepdims=True)
    lengths = np.linalg.norm(axes, axis=1)
    axes /= lengths[:, None]
    cosine = chroma @ axes.T / np.maximum(strength, 1e-3)[:, :, None]  # [H, W, colours]
    nearest = cosine.argmax(axis=2)
    weight = np.clip(strength / (0.5 * lengths[nearest]), 0.0, 1.0) * (strength > _MIN_CHROMA)
    votes = np.bincount(nearest.ravel(), weights=weight.ravel(), minlength=len(names))
    best = int(votes.argmax())
    if votes[best] < _MIN_AREA * weight.size:
        return None, weight.astype(np.float32)
    # soft mask of the winner: how much of its chroma each pixel has
    mask = np.clip(chroma @ axes[best] / lengths[best], 0.0, 1.0) * (cosine[:, :, best] > 0.75)
    return names[best], mask.astype(np.float32)


def box_overlap(first: Box, second: Box) -> float:
    """Intersection over union of two boxes that are not empty."""
    width = min(first[2], second[2]) - max(first[0], second[0])
    height = min(first[3], second[3]) - max(first[1], second[1])
    both = max(0.0, width) * max(0.0, height)
    areas = sum((x1 - x0) * (y1 - y0) for x0, y0, x1, y1 in (first, second))
    return both / (areas - both)


def _box(region: NDArray[np.bool_]) -> Box | None:
    if not region.any():
        return None
    height, width = region.shape
    ys, xs = np.nonzero(region)
    return xs.min() / width, ys.min() / height, (xs.max() + 1) / width, (ys.max() + 1) / height


def _shape(region: NDArray[np.bool_]) -> tuple[str | None, float]:
    area = float(region.sum())
    if area < _MIN_AREA * region.size:
        return None, 0.0
    height, width = region.shape
    ys, xs = np.nonzero(region)
    x, y = float(xs.mean()) + 0.5, float(ys.mean()) + 0.5
    radius = float(np.sqrt(area / np.pi))
    best: tuple[str | None, float] = (None, 0.0)
    for shape in SHAPES:
        for scale in (0.94, 1.0, 1.06):
            for dy in (-0.05, 0.0, 0.05):
                cover = shape_coverage(shape, x, y + dy * radius, radius * scale, height, width)
                overlap = float(np.minimum(cover, region).sum() / np.maximum(cover, region).sum())
                if overlap > best[1]:
                    best = (shape, overlap)
    return best


def _largest_region(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Largest 4-connected region, by growing each until it stops."""
    left = mask.copy()
    best = np.zeros_like(mask)
    while left.sum() > best.sum():
        seed = np.zeros_like(mask)
        seed.flat[int(left.argmax())] = True
        while True:
            grown = seed.copy()
            grown[1:] |= seed[:-1]
            grown[:-1] |= seed[1:]
            grown[:, 1:] |= grown[:, :-1]
            grown[:, :-1] |= grown[:, 1:]
            grown &= mask
            if grown.sum() == seed.sum():
                break
            seed = grown
        if seed.sum() > best.sum():
            best = seed
        left &= ~seed
    return best
