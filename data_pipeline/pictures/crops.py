"""Crops, resizes and flips pictures, and the maps that follow them.

A picture of 640 x 480 on its way to 64 x 64, from the centre:

    original    640 x 480      known from the header; a crop is planned in shares of it: 1/8 to 7/8, 0 to 1
    decoded     160 x 120      the quarter, which libjpeg reads several times as fast, is large enough
    cropped     120 x 120      whole decoded pixels, 20 to 140; maps and boxes follow this crop exactly
    resized      64 x 64       into the batch's row, mirrored there if it is to be

>>> geometry = plan_crop(480, 640, (64, 64), random_crop=False, may_flip=False, seed=0, ordinal=0)
>>> geometry.left, geometry.right, geometry.top, geometry.bottom
(0.125, 0.875, 0.0, 1.0)
>>> picture = DecodedPicture(np.zeros((120, 160, 3), np.uint8), height=480, width=640, scale=0.25)
>>> geometry.on_grid(picture)[1:]
(slice(0, 120, None), slice(20, 140, None))

SDXL's size condition speaks of the crop in the resized picture, here 85 x 64, whose left 11 columns are cut:

>>> geometry.size_row()
[480, 640, 0, 11, 64, 64]
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from data_pipeline.errors import Rejected
from data_pipeline.order.draws import Draw, uniform
from data_pipeline.pictures.decoding import DecodedPicture, decode_map

# Loader processes are the parallelism; OpenCV's own threads would fight over the same cores.
cv2.setNumThreads(0)


RESAMPLING = 1
"""Version of what decoding, cropping and resizing make of a picture: raise it when a change moves a pixel, so
that what was encoded before is not taken for what would be encoded now."""


class CropPlace(NamedTuple):
    """Where a crop lies in the room that it has, from 0 to 1, and whether it is mirrored."""

    y: float
    x: float
    flip: bool


@dataclass(frozen=True)
class Geometry:
    """Where the crop lies: all a map of the same picture needs to follow it."""

    height: int
    """Height of the original picture, after its EXIF orientation."""
    width: int
    top: float
    """Crop box as shares of height and width."""
    left: float
    bottom: float
    right: float
    flip: bool
    target_height: int
    target_width: int

    def on_grid(self, picture: DecodedPicture) -> tuple[Geometry, slice, slice]:
        """The nearest crop of whole decoded pixels, and its rows and columns.

        Maps and boxes follow it exactly.
        """
        height, width = picture.height * picture.scale, picture.width * picture.scale
        rows = _whole_pixels(self.top * height, self.bottom * height, picture.pixels.shape[0])
        columns = _whole_pixels(self.left * width, self.right * width, picture.pixels.shape[1])
        crop = replace(
            self,
            top=rows.start / height,
            left=columns.start / width,
            bottom=rows.stop / height,
            right=columns.stop / width,
        )
        return crop, rows, columns

    def size_row(self, original: tuple[int, int] | None = None) -> list[int]:
        """(original h, w, crop top, left in the resized picture, target h, w): SDXL's size condition.

        What is cut at the left of the picture as it is shown: of a mirrored one, its own right.

        original: height and width of the picture before it was stored; None: it was stored as it was
        """
        scale_y = self.target_height / max(1e-9, (self.bottom - self.top) * self.height)
        scale_x = self.target_width / max(1e-9, (self.right - self.left) * self.width)
        height, width = original or (self.height, self.width)
        left = 1.0 - self.right if self.flip else self.left
        return [
            height,
            width,
            round(self.top * self.height * scale_y),
            round(left * self.width * scale_x),
            self.target_height,
            self.target_width,
        ]


def plan_crop(
    height: int,
    width: int,
    target: tuple[int, int],
    *,
    random_crop: bool,
    may_flip: bool,
    seed: int,
    ordinal: int,
) -> Geometry:
    """Largest crop of the target's aspect; its place and the flip are drawn from (seed, ordinal)."""
    place = draw_place(random_crop=random_crop, may_flip=may_flip, seed=seed, ordinal=ordinal)
    return crop_at(height, width, target, place)


def draw_place(*, random_crop: bool, may_flip: bool, seed: int, ordinal: int) -> CropPlace:
    """The centre unless it is random, drawn from (seed, ordinal)."""
    y, x = 0.5, 0.5
    if random_crop:
        y, x = uniform(seed, ordinal, Draw.CROP_Y), uniform(seed, ordinal, Draw.CROP_X)
    return CropPlace(y, x, may_flip and uniform(seed, ordinal, Draw.FLIP) < 0.5)


def crop_at(height: int, width: int, target: tuple[int, int], place: CropPlace) -> Geometry:
    """Largest crop of the target's aspect at its place."""
    aspect = target[1] / target[0]
    crop_w = min(float(width), height * aspect)
    crop_h = min(float(height), width / aspect)
    top, left = place.y * (height - crop_h) / height, place.x * (width - crop_w) / width
    return Geometry(
        height=height,
        width=width,
        top=top,
        left=left,
        bottom=top + crop_h / height,
        right=left + crop_w / width,
        flip=place.flip,
        target_height=target[0],
        target_width=target[1],
    )


def crop_pixels(picture: DecodedPicture, geometry: Geometry, out: NDArray[np.uint8]) -> Geometry:
    """Crop the picture and resize it into `out`, contiguous uint8 [target h, target w, 3].

    Shrinks without aliasing, enlarges bicubically. Whole decoded pixels are cropped; returns that crop,
    for maps and boxes to follow.
    """
    crop, rows, columns = geometry.on_grid(picture)
    pixels = _resized(picture.pixels[rows, columns], out.shape[0], out.shape[1])
    if geometry.flip:
        cv2.flip(pixels, 1, dst=out)
    else:
        out[:] = pixels
    return crop


def _resized(pixels: NDArray[Any], height: int, width: int) -> NDArray[Any]:
    rows, columns = pixels.shape[:2]
    if (rows, columns) == (height, width):
        return pixels
    if rows < height or columns < width:
        return cv2.resize(pixels, (width, height), interpolation=cv2.INTER_CUBIC)
    # OpenCV's area average is quick for whole factors only. Nearly as many samples as pixels lose nothing
    # by being bilinear; up to twofold, two per axis and target pixel, at most a source pixel apart, and the
    # mean of the four are as good as the area average, in half the time.
    if 3 * rows < 4 * height and 3 * columns < 4 * width:
        return cv2.resize(pixels, (width, height), interpolation=cv2.INTER_LINEAR)
    if rows < 2 * height and columns < 2 * width:
        pixels = cv2.resize(pixels, (2 * width, 2 * height), interpolation=cv2.INTER_LINEAR)
    return cv2.resize(pixels, (width, height), interpolation=cv2.INTER_AREA)


def _whole_pixels(start: float, stop: float, available: int) -> slice:
    count = min(available, max(1, round(stop - start)))
    first = min(round(start), available - count)
    return slice(first, first + count)


def crop_map(data: bytes, geometry: Geometry, *, labels: bool, max_pixels: int) -> NDArray[Any]:
    """Crop and resize a one-channel picture like its image: nearest for labels, box filter otherwise.

    Returns uint8 [h, w] for labels, float32 [h, w] in [0, 1] otherwise. Raises Rejected("bad_map"), also
    where the picture was turned by its EXIF orientation and the map, which has none, lies on its side.
    """
    values = decode_map(data, labels=labels, max_pixels=max_pixels)
    height, width = values.shape
    if _same_shape(width, height, geometry) and not _same_shape(height, width, geometry):
        what = f"{width} x {height} for a picture that is {geometry.width} x {geometry.height} upright"
        raise Rejected("bad_map", f"{what}: it lies on its side; turn it as the picture's orientation says")
    return crop_values(values, geometry, nearest=labels)


def _same_shape(height: int, width: int, geometry: Geometry) -> bool:
    """Whether it is the picture's, enlarged or shrunk, up to the rounding of its edges to whole pixels."""
    larger = max(geometry.height, geometry.width)
    return abs(height * geometry.width - width * geometry.height) <= larger


def crop_values(values: NDArray[Any], geometry: Geometry, *, nearest: bool) -> NDArray[Any]:
    """The crop of uint8 or float32 [H, W], resized to [target h, target w], mirrored if it is to be."""
    size = (geometry.target_width, geometry.target_height)
    box = _box(geometry, values.shape[1], values.shape[0])
    how = Image.Resampling.NEAREST if nearest else Image.Resampling.BOX
    result = np.asarray(Image.fromarray(values).resize(size, how, box=box))
    return result[:, ::-1] if geometry.flip else result


def _box(geometry: Geometry, width: int, height: int) -> tuple[float, float, float, float]:
    left, top = max(0.0, geometry.left * width), max(0.0, geometry.top * height)
    right, bottom = min(float(width), geometry.right * width), min(float(height), geometry.bottom * height)
    if (
        abs(left - round(left))
        + abs(right - round(right))
        + abs(top - round(top))
        + abs(bottom - round(bottom))
        < 1e-6
    ):
        left, top, right, bottom = round(left), round(top), round(right), round(bottom)
    return left, top, right, bottom
