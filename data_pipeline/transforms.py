"""Decodes pictures safely and quickly; resizes, crops and flips them."""

from __future__ import annotations

import io
import warnings
from dataclasses import dataclass, replace
from typing import Any

import cv2
import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image, ImageFile

from data_pipeline.errors import Rejected
from data_pipeline.keyed import Draw, uniform

# Loader processes are the parallelism; OpenCV's own threads would fight over the same cores.
cv2.setNumThreads(0)

_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
_ORIENTATION = 0x0112
_TURNS: dict[int, tuple[bool, int]] = {
    2: (True, 0), 3: (False, 2), 4: (True, 2), 5: (True, 1), 6: (False, 3), 7: (True, 3), 8: (False, 1),
}  # fmt: skip
"""EXIF orientation: mirror left-right, then quarter turns against the clock."""
_DECODE_ERRORS = (
    *(OSError, ValueError, SyntaxError, LookupError, TypeError, EOFError, AttributeError),
    *(MemoryError, ArithmeticError, RuntimeError, AssertionError, NotImplementedError),
)
"""Pillow's plugins raise all of these for damaged files; none of them may stop a run."""


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

    def on_grid(self, height: int, width: int) -> Geometry:
        """The nearest crop of whole pixels of the decoded picture; maps and boxes then follow it exactly."""
        rows = min(height, max(1, round((self.bottom - self.top) * height)))
        columns = min(width, max(1, round((self.right - self.left) * width)))
        top = min(round(self.top * height), height - rows)
        left = min(round(self.left * width), width - columns)
        return replace(
            self,
            top=top / height,
            left=left / width,
            bottom=(top + rows) / height,
            right=(left + columns) / width,
        )

    def size_row(self) -> list[int]:
        """(original h, w, crop top, left in the resized picture, target h, w): SDXL's size condition."""
        scale_y = self.target_height / max(1e-9, (self.bottom - self.top) * self.height)
        scale_x = self.target_width / max(1e-9, (self.right - self.left) * self.width)
        return [
            self.height,
            self.width,
            round(self.top * self.height * scale_y),
            round(self.left * self.width * scale_x),
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
    aspect = target[1] / target[0]
    crop_w = min(float(width), height * aspect)
    crop_h = min(float(height), width / aspect)
    y, x = 0.5, 0.5
    if random_crop:
        y, x = uniform(seed, ordinal, Draw.CROP_Y), uniform(seed, ordinal, Draw.CROP_X)
    top, left = y * (height - crop_h) / height, x * (width - crop_w) / width
    return Geometry(
        height=height,
        width=width,
        top=top,
        left=left,
        bottom=top + crop_h / height,
        right=left + crop_w / width,
        flip=may_flip and uniform(seed, ordinal, Draw.FLIP) < 0.5,
        target_height=target[0],
        target_width=target[1],
    )


def picture_size(head: bytes) -> tuple[int, int] | None:
    """(height, width), EXIF orientation applied, from the first bytes of a picture; None if unknown."""
    try:
        if head[:2] == b"\xff\xd8":
            height, width, _, _ = simplejpeg.decode_jpeg_header(head)
            turned = _exif_orientation(head) >= 5
            return (width, height) if turned else (height, width)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(head), formats=_FORMATS) as image:
                return image.height, image.width
    except (*_DECODE_ERRORS, Image.DecompressionBombError):
        return None


def decode(data: bytes, *, target: tuple[int, int], max_pixels: int) -> tuple[NDArray[np.uint8], int, int]:
    """Decode to RGB [h, w, 3], at reduced size where libjpeg can, with the original height and width.

    The result is at least as large as needed to crop `target` (height, width) from it without
    enlarging, if the original is. EXIF orientation is applied; alpha lies on white; 16 bit, gray,
    palette and CMYK become 8-bit RGB; of an animation, the first frame. Raises Rejected.
    """
    if data[:2] == b"\xff\xd8":
        fast = _decode_jpeg(data, target, max_pixels)
        if fast is not None:
            return fast
    return _decode_other(data, target, max_pixels)


def _decode_jpeg(
    data: bytes, target: tuple[int, int], max_pixels: int
) -> tuple[NDArray[np.uint8], int, int] | None:
    try:
        height, width, colorspace, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return None
    _check_size(height, width, max_pixels)
    if colorspace not in ("YCbCr", "RGB", "Gray", "YCC", "GRAY"):
        return None  # CMYK and YCCK: Pillow knows Adobe's inversion
    orientation = _exif_orientation(data)
    turned = orientation >= 5
    need_h, need_w = _needed(width if turned else height, height if turned else width, target)
    if turned:
        need_h, need_w = need_w, need_h
    try:
        pixels = simplejpeg.decode_jpeg(
            data, "RGB", fastdct=True, fastupsample=False, min_height=need_h, min_width=need_w
        )
    except ValueError:
        return None  # Pillow forgives harmless warnings and judges the rest
    pixels = _orient(pixels, orientation)
    return (pixels, width, height) if turned else (pixels, height, width)


def _needed(height: int, width: int, target: tuple[int, int]) -> tuple[int, int]:
    """Smallest decoded size from which the target can be cropped without enlarging."""
    scale = max(target[0] / height, target[1] / width)
    return min(height, int(np.ceil(height * scale))), min(width, int(np.ceil(width * scale)))


def _exif_orientation(data: bytes) -> int:
    if data.find(b"Exif\0\0", 0, 65_600) < 0:
        return 1
    try:
        with Image.open(io.BytesIO(data), formats=("JPEG",)) as image:
            value = image.getexif().get(_ORIENTATION, 1)
    except _DECODE_ERRORS:
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _orient(pixels: NDArray[np.uint8], orientation: int) -> NDArray[np.uint8]:
    mirror, turns = _TURNS.get(orientation, (False, 0))
    if mirror:
        pixels = pixels[:, ::-1]
    return np.rot90(pixels, turns) if turns else pixels


def _decode_other(
    data: bytes, target: tuple[int, int], max_pixels: int
) -> tuple[NDArray[np.uint8], int, int]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
                _check_size(image.height, image.width, max_pixels)
                orientation = image.getexif().get(_ORIENTATION, 1)
                pixels = _to_rgb(image)
    except Image.DecompressionBombError as error:
        raise Rejected("too_many_pixels", str(error)) from error
    except _DECODE_ERRORS as error:
        raise Rejected("not_an_image", f"{type(error).__name__}: {error}"[:200]) from error
    pixels = _orient(pixels, orientation if isinstance(orientation, int) else 1)
    return pixels, pixels.shape[0], pixels.shape[1]


def _check_size(height: int, width: int, max_pixels: int) -> None:
    if height * width > max_pixels:
        raise Rejected("too_many_pixels", f"{width} x {height}")
    if height < 1 or width < 1:
        raise Rejected("not_an_image", "empty")


def _to_rgb(image: ImageFile.ImageFile | Image.Image) -> NDArray[np.uint8]:
    if image.mode.startswith("I") or image.mode == "F":
        deep = np.asarray(image, dtype=np.float32)
        scale = 257.0 if deep.size and deep.max() > 255 else 1.0  # 65535 / 255
        gray = np.clip(np.nan_to_num(deep) / scale, 0, 255).astype(np.uint8)
        return np.repeat(gray[:, :, None], 3, axis=2)
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        paper = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return np.asarray(Image.alpha_composite(paper, rgba).convert("RGB"))
    return np.asarray(image.convert("RGB"))


def crop_pixels(pixels: NDArray[np.uint8], geometry: Geometry, out: NDArray[np.uint8]) -> Geometry:
    """Crop RGB [h, w, 3] and resize it into `out` [target h, target w, 3].

    Shrinks by pixel area, which does not alias, and enlarges bicubically. Whole pixels are cropped;
    returns that crop, for maps and boxes to follow.
    """
    height, width = pixels.shape[:2]
    whole = geometry.on_grid(height, width)
    rows = slice(round(whole.top * height), round(whole.bottom * height))
    columns = slice(round(whole.left * width), round(whole.right * width))
    crop: NDArray[Any] = pixels[rows, columns]
    size = (geometry.target_width, geometry.target_height)
    if crop.shape[:2] != size[::-1]:
        shrinks = crop.shape[0] >= size[1] and crop.shape[1] >= size[0]
        method = cv2.INTER_AREA if shrinks else cv2.INTER_CUBIC
        crop = cv2.resize(crop, size, interpolation=method)
    out[:] = crop[:, ::-1] if geometry.flip else crop
    return whole


def crop_map(data: bytes, geometry: Geometry, *, labels: bool, max_pixels: int) -> NDArray[Any]:
    """Crop and resize a one-channel picture like its image: nearest for labels, box filter otherwise.

    Returns uint8 [h, w] for labels, float32 [h, w] in [0, 1] otherwise. Raises Rejected("bad_map").
    """
    try:
        with Image.open(io.BytesIO(data), formats=("PNG", "WEBP", "TIFF", "BMP")) as image:
            _check_size(image.height, image.width, max_pixels)
            size = (geometry.target_width, geometry.target_height)
            box = _box(geometry, image.width, image.height)
            if labels:
                flat = image if image.mode in ("L", "P") else image.convert("L")
                result = np.asarray(flat.resize(size, Image.Resampling.NEAREST, box=box), np.uint8)
            else:
                deep = image.mode.startswith("I") or image.mode == "F"
                full = 65535.0 if deep else 255.0
                values = Image.fromarray(np.asarray(image if deep else image.convert("L"), np.float32) / full)
                result = np.asarray(values.resize(size, Image.Resampling.BOX, box=box), np.float32)
    except _DECODE_ERRORS as error:
        raise Rejected("bad_map", f"{type(error).__name__}: {error}"[:200]) from error
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
