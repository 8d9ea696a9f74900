"""Procedurally drawn scenes of coloured shapes: geometry, captions and ground truth."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from data_pipeline.errors import DataError

COLORS: dict[str, tuple[int, int, int]] = {
    "red": (220, 30, 30),
    "green": (30, 170, 50),
    "blue": (35, 60, 220),
    "yellow": (240, 210, 20),
    "purple": (160, 40, 190),
    "cyan": (20, 200, 215),
}
SHAPES = ("circle", "square", "triangle")
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "white": (248, 248, 248),
    "gray": (150, 150, 150),
    "black": (14, 14, 14),
}
NUM_CLASSES = len(COLORS) * len(SHAPES)
_SIZES = ((0.17, "small"), (0.28, ""), (1.0, "large"))
_MOST_OBJECTS = 8
_EDGES = (16, 8192)
"""Larger ones would take gigabytes each."""
_GRID = (("upper left", "top", "upper right"), ("left", "", "right"), ("lower left", "bottom", "lower right"))


def class_of(color: str, shape: str) -> int:
    """Class label in [0, NUM_CLASSES); the semantic map holds it plus one, 0 is background."""
    return list(COLORS).index(color) * len(SHAPES) + SHAPES.index(shape)


def class_name(label: int) -> str:
    """`red circle` for 0."""
    return f"{list(COLORS)[label // len(SHAPES)]} {SHAPES[label % len(SHAPES)]}"


@dataclass(frozen=True)
class SceneOptions:
    """What scenes are drawn. Raises DataError for what cannot be."""

    min_objects: int = 1
    """Fewest objects per scene."""
    max_objects: int = 3
    """Most objects per scene."""
    min_edge: int = 160
    """Shortest edge of a picture, pixels."""
    max_edge: int = 320
    """Longest edge of a picture, pixels."""
    min_radius: float = 0.12
    """Smallest object radius as a share of the shorter edge."""
    max_radius: float = 0.34
    """Largest object radius as a share of the shorter edge, at most 0.5."""
    jitter: int = 12
    """Largest change of an object's colour channels."""

    def __post_init__(self) -> None:
        least, most = _EDGES
        if not least <= self.min_edge <= self.max_edge <= most:
            raise DataError(
                f"Pictures cannot have edges of {self.min_edge} to {self.max_edge} pixels; "
                f"both must be {least} to {most} and the smaller one first, e.g. --size 160:320."
            )
        if not 1 <= self.min_objects <= self.max_objects <= _MOST_OBJECTS:
            raise DataError(
                f"Scenes cannot have {self.min_objects} to {self.max_objects} objects; "
                f"both must be 1 to {_MOST_OBJECTS} and the smaller one first, e.g. --objects 1:3."
            )
        if not 0 < self.min_radius <= self.max_radius <= 0.5:
            raise DataError(
                f"Objects cannot have radii of {self.min_radius:g} to {self.max_radius:g} of the edge; "
                "both must be above 0, at most 0.5, and the smaller one first, e.g. --radius 0.12:0.34."
            )
        if not 0 <= self.jitter <= 255:
            raise DataError(f"Colours cannot change by {self.jitter}; it must be 0 to 255.")


@dataclass(frozen=True)
class SceneObject:
    """One drawn shape; coordinates in pixels."""

    color: str
    shape: str
    x: float
    y: float
    radius: float
    depth: float
    """0 (near) to 1 (far)."""
    rgb: tuple[int, int, int]

    @property
    def label(self) -> int:
        """Class label."""
        return class_of(self.color, self.shape)


@dataclass(frozen=True)
class Scene:
    """A whole picture before it is drawn."""

    width: int
    height: int
    background: str
    objects: tuple[SceneObject, ...] = field(default=())
    """Far to near: later ones cover earlier ones."""

    @property
    def main(self) -> SceneObject:
        """The largest object."""
        return max(self.objects, key=lambda o: o.radius)


def shape_coverage(
    shape: str, x: float, y: float, radius: float, height: int, width: int
) -> NDArray[np.float32]:
    """Antialiased coverage [height, width] in [0, 1] of one shape; the ground-truth geometry.

    A circle of `radius`; a square of half edge 0.886 radius and a triangle pointing up, both of about
    the circle's area, so that size alone tells nothing about shape.
    """
    px = np.arange(width, dtype=np.float32)[None, :] + 0.5 - x
    py = np.arange(height, dtype=np.float32)[:, None] + 0.5 - y
    if shape == "circle":
        distance = np.hypot(px, py) - radius
    elif shape == "square":
        half = 0.886 * radius
        distance = np.maximum(np.abs(px), np.abs(py)) - half
    else:
        assert shape == "triangle", shape
        # equilateral with inradius r: signed distance to its three half planes
        inradius = 0.7776 * radius
        root3 = math.sqrt(3.0)
        sides = (np.abs(px) * root3 - py) / 2.0
        distance = np.maximum(sides, np.broadcast_to(py, sides.shape)) - inradius
    return np.clip(0.5 - distance, 0.0, 1.0).astype(np.float32)


def bounds(item: SceneObject) -> tuple[float, float, float, float]:
    """Bounding box (x0, y0, x1, y1) in pixels, not clipped."""
    left, top, right, bottom = _extent(item.shape, item.radius)
    return item.x + left, item.y + top, item.x + right, item.y + bottom


def _extent(shape: str, radius: float) -> tuple[float, float, float, float]:
    if shape == "triangle":
        inradius = 0.7776 * radius
        return -math.sqrt(3.0) * inradius, -2 * inradius, math.sqrt(3.0) * inradius, inradius
    half = radius if shape == "circle" else 0.886 * radius
    return -half, -half, half, half


def make_scene(options: SceneOptions, rng: random.Random) -> Scene:
    """Draw the parameters of one scene from `rng`. Objects overlap little."""
    width = rng.randint(options.min_edge, options.max_edge)
    height = rng.randint(options.min_edge, options.max_edge)
    edge = min(width, height)
    wanted = rng.randint(options.min_objects, options.max_objects)
    shrink = 1.0 / math.sqrt(wanted)
    objects: list[SceneObject] = []
    for _ in range(50 * wanted):
        if len(objects) == wanted:
            break
        radius = edge * max(options.min_radius, rng.uniform(options.min_radius, options.max_radius) * shrink)
        color, shape = rng.choice(list(COLORS)), rng.choice(SHAPES)
        rgb = tuple(min(255, max(0, c + rng.randint(-options.jitter, options.jitter))) for c in COLORS[color])
        left, top, right, bottom = _extent(shape, radius)
        item = SceneObject(
            color=color,
            shape=shape,
            # wholly inside the picture
            x=rng.uniform(min(-left, width / 2), max(width - right, width / 2)),
            y=rng.uniform(min(-top, height / 2), max(height - bottom, height / 2)),
            radius=radius,
            depth=rng.uniform(0.05, 0.85),
            rgb=(rgb[0], rgb[1], rgb[2]),
        )
        if all(math.hypot(o.x - item.x, o.y - item.y) > 1.05 * (o.radius + radius) for o in objects):
            objects.append(item)
    ordered = tuple(sorted(objects, key=lambda o: -o.depth))
    return Scene(width, height, rng.choice(list(BACKGROUNDS)), ordered)


def render(scene: Scene) -> tuple[NDArray[np.uint8], NDArray[np.uint8], NDArray[np.uint8]]:
    """Draw a scene: pixels [H, W, 3], semantic map [H, W] (0 background, label + 1), depth [H, W].

    Depth is 0 near to 255 far; the background is 255.
    """
    shape = (scene.height, scene.width)
    canvas = np.empty((*shape, 3), np.float32)
    canvas[:] = BACKGROUNDS[scene.background]
    semantic = np.zeros(shape, np.uint8)
    depth = np.full(shape, 255, np.uint8)
    for item in scene.objects:
        cover = shape_coverage(item.shape, item.x, item.y, item.radius, *shape)
        canvas += cover[:, :, None] * (np.asarray(item.rgb, np.float32) - canvas)
        semantic[cover >= 0.5] = item.label + 1
        depth[cover >= 0.5] = round(255 * item.depth)
    return np.rint(canvas).astype(np.uint8), semantic, depth


def describe(scene: Scene, rng: random.Random) -> list[str]:
    """Captions of one scene in several wordings, all true."""
    ground = scene.background
    if len(scene.objects) == 1:
        item = scene.objects[0]
        thing = f"{item.color} {item.shape}"
        size = _size_word(scene, item)
        sized = f"{size} {thing}".strip()
        captions = [
            f"a {thing} on a {ground} background",
            f"a {thing}",
            f"a {sized} on a {ground} background",
            f"a picture of a {thing} on {ground}",
        ]
        place = _place(scene, item)
        if place:
            captions.append(f"a {thing} at the {place} of a {ground} picture")
        return captions
    things = [f"a {o.color} {o.shape}" for o in scene.objects]
    rng.shuffle(things)
    listed = ", ".join(things[:-1]) + f" and {things[-1]}"
    left, right = min(scene.objects, key=lambda o: o.x), max(scene.objects, key=lambda o: o.x)
    return [
        f"{listed} on a {ground} background",
        listed,
        f"a picture with {listed}",
        f"a {left.color} {left.shape} to the left of a {right.color} {right.shape} on a {ground} background",
        f"{len(things)} shapes on {ground}: " + ", ".join(thing[2:] for thing in things),
    ]


def ground_truth(scene: Scene) -> dict[str, object]:
    """JSON-able truth: objects, layout rows (label, x0, y0, x1, y1 in [0, 1]) and class label."""
    objects, layout = [], []
    for item in scene.objects:
        x0, y0, x1, y1 = bounds(item)
        box = [x0 / scene.width, y0 / scene.height, x1 / scene.width, y1 / scene.height]
        box = [round(min(1.0, max(0.0, v)), 5) for v in box]
        objects.append(
            {
                "label": item.label,
                "color": item.color,
                "shape": item.shape,
                "center": [round(item.x, 2), round(item.y, 2)],
                "radius": round(item.radius, 2),
                "depth": round(item.depth, 4),
                "box": box,
            }
        )
        layout.append([item.label, *box])
    return {
        "background": scene.background,
        "objects": objects,
        "layout": layout,
        "class_label": scene.main.label,
        "class_name": class_name(scene.main.label),
    }


def _size_word(scene: Scene, item: SceneObject) -> str:
    share = item.radius / min(scene.width, scene.height)
    return next(word for limit, word in _SIZES if share <= limit)


def _place(scene: Scene, item: SceneObject) -> str:
    column = min(2, int(3 * item.x / scene.width))
    row = min(2, int(3 * item.y / scene.height))
    return _GRID[row][column]
