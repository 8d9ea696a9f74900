"""Decodes pictures safely and quickly, JPEGs at a reduced size where that is enough."""

from __future__ import annotations

import io
import math
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image, ImageFile

from data_pipeline.errors import Rejected
from data_pipeline.pictures.headers import DECODE_ERRORS, FORMATS, jpeg_orientation, orientation_of

_MAP_FORMATS = ("PNG", "WEBP", "TIFF", "BMP")
_QUICK_EIGHTHS = (1, 2, 4, 8)
"""Scales for which libjpeg-turbo has vector code: 3/8 takes longer than 4/8, 5/8 to 7/8 longer than 8/8."""
_TURNS: dict[int, tuple[bool, int]] = {
    2: (True, 0), 3: (False, 2), 4: (True, 2), 5: (True, 1), 6: (False, 3), 7: (True, 3), 8: (False, 1),
}  # fmt: skip
"""EXIF orientation: mirror left-right, then quarter turns against the clock."""


@dataclass(frozen=True)
class DecodedPicture:
    """A decoded picture, perhaps at a reduced size."""

    pixels: NDArray[np.uint8]
    """RGB [h, w, 3]"""
    height: int
    """Height of the original, after its EXIF orientation."""
    width: int
    scale: float = 1.0
    """Decoded pixels per original pixel, from the first row and column on; only whole ones are kept."""


def decode(data: bytes, *, target: tuple[int, int] | None, max_pixels: int) -> DecodedPicture:
    """Decode a picture, at reduced size where libjpeg can and `target` is given.

    The result is at least as large as needed to crop `target` (height, width) from it without
    enlarging, if the original is; without a target it is the whole picture. EXIF orientation is applied;
    alpha lies on white; 16 bit, gray, palette and CMYK become 8-bit RGB; of an animation, the first frame.
    Raises Rejected.
    """
    if data[:2] == b"\xff\xd8":
        fast = _decode_jpeg(data, target, max_pixels)
        if fast is not None:
            return fast
    return _decode_other(data, max_pixels)


def decode_exactly(data: bytes, *, max_pixels: int) -> NDArray[np.uint8]:
    """RGB [h, w, 3] at full size by Pillow, bit for bit what programs that measure pictures see.

    libjpeg's accurate transform, where `decode` takes the quick one; the rest as there. Raises Rejected, also
    for floating-point pictures with NaN or infinity, which `decode` takes for black and white.
    """
    picture = _decode_other(data, max_pixels, finite=True)
    return np.ascontiguousarray(picture.pixels)


def _decode_jpeg(data: bytes, target: tuple[int, int] | None, max_pixels: int) -> DecodedPicture | None:
    try:
        height, width, colorspace, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return None
    check_size(height, width, max_pixels)
    if colorspace not in ("YCbCr", "RGB", "Gray", "YCC", "GRAY"):
        return None  # CMYK and YCCK: Pillow knows Adobe's inversion
    orientation = jpeg_orientation(data)
    turned = orientation >= 5
    eighths = 8 if target is None else _eighths(height, width, target[::-1] if turned else target)
    if orientation != 1 and (height % 8 or width % 8):
        eighths = 8  # a pixel that is not whole would come first after a turn
    least = (0, 0) if eighths == 8 else (-(-height * eighths // 8), -(-width * eighths // 8))
    try:
        pixels = simplejpeg.decode_jpeg(
            data, "RGB", fastdct=True, fastupsample=False, min_height=least[0], min_width=least[1]
        )
    except ValueError:
        return None  # Pillow forgives harmless warnings and judges the rest
    pixels = _orient(pixels[: height * eighths // 8, : width * eighths // 8], orientation)
    return DecodedPicture(pixels, *((width, height) if turned else (height, width)), scale=eighths / 8)


def _eighths(height: int, width: int, target: tuple[int, int]) -> int:
    """Smallest of the quick scales from which the target can be cropped without enlarging."""
    if max(height, width) < 8:
        return 8  # several scales leave the same number of pixels
    scale = max(target[0] / height, target[1] / width)
    needed = min(height, math.ceil(height * scale)), min(width, math.ceil(width * scale))
    return next(k for k in _QUICK_EIGHTHS if height * k // 8 >= needed[0] and width * k // 8 >= needed[1])


def _orient(pixels: NDArray[Any], orientation: int) -> NDArray[Any]:
    mirror, turns = _TURNS.get(orientation, (False, 0))
    if mirror:
        pixels = pixels[:, ::-1]
    return np.rot90(pixels, turns) if turns else pixels


def _decode_other(data: bytes, max_pixels: int, *, finite: bool = False) -> DecodedPicture:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                check_size(image.height, image.width, max_pixels)
                image.load()  # turns a TIFF, and forgets that it was to be turned
                orientation = orientation_of(image)
                if finite and image.mode == "F" and not np.isfinite(np.asarray(image)).all():
                    raise Rejected("not_finite", "some pixels are NaN or infinite")
                pixels = _to_rgb(image)
    except Image.DecompressionBombError as error:
        raise Rejected("too_many_pixels", str(error)) from error
    except DECODE_ERRORS as error:
        raise Rejected("not_an_image", f"{type(error).__name__}: {error}"[:200]) from error
    pixels = _orient(pixels, orientation)
    return DecodedPicture(pixels, pixels.shape[0], pixels.shape[1])


def check_size(height: int, width: int, max_pixels: int) -> None:
    """Raises Rejected for decompression bombs and empty pictures."""
    if height * width > max_pixels:
        raise Rejected("too_many_pixels", f"{width} x {height}")
    if height < 1 or width < 1:
        raise Rejected("not_an_image", "empty")


def _to_rgb(image: ImageFile.ImageFile | Image.Image) -> NDArray[np.uint8]:
    if image.mode.startswith("I") or image.mode == "F":
        deep = np.asarray(image, dtype=np.float32)
        sixteen = image.mode.startswith("I;16") or (deep.size and deep.max() > 255)
        scale = 257.0 if sixteen else 1.0  # 65535 / 255
        gray = np.clip(np.nan_to_num(deep) / scale, 0, 255).astype(np.uint8)
        return np.repeat(gray[:, :, None], 3, axis=2)
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        paper = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return np.asarray(Image.alpha_composite(paper, rgba).convert("RGB"))
    return np.asarray(image.convert("RGB"))


def decode_map(data: bytes, *, labels: bool, max_pixels: int) -> NDArray[Any]:
    """A one-channel picture, upright: labels uint8 [h, w], or levels float32 [h, w] in [0, 1].

    Raises Rejected("bad_map"): damaged, or labels that are colours or lie above 255.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(data), formats=_MAP_FORMATS) as image:
                check_size(image.height, image.width, max_pixels)
                image.load()
                orientation = orientation_of(image)
                values = _labels(image) if labels else _levels(image)
    except Image.DecompressionBombError as error:
        raise Rejected("too_many_pixels", str(error)) from error
    except DECODE_ERRORS as error:
        raise Rejected("bad_map", f"{type(error).__name__}: {error}"[:200]) from error
    return _orient(values, orientation)


def _labels(image: Image.Image) -> NDArray[np.uint8]:
    if image.mode in ("1", "L", "P"):  # of one bit: labels 0 and 1, not 0 and unlabelled
        return np.asarray(image).astype(np.uint8)
    if image.mode.startswith("I"):
        deep = np.asarray(image)
        if deep.size and not 0 <= deep.min() <= deep.max() <= 255:
            raise Rejected("bad_map", f"a label of {deep.max()}, where 255 is the last and means unlabelled")
        return deep.astype(np.uint8)
    if image.mode == "F":
        real = np.asarray(image)
        whole = np.isfinite(real) & (real == np.trunc(real)) & (real >= 0) & (real <= 255)
        if not whole.all():
            raise Rejected("bad_map", f"a label of {real[~whole][0]:g}, which is no whole number up to 255")
        return real.astype(np.uint8)
    if image.mode in ("RGB", "RGBA"):
        red, green, blue = (np.asarray(image.getchannel(i)) for i in range(3))
        if not (np.array_equal(red, green) and np.array_equal(red, blue)):
            raise Rejected("bad_map", "colours instead of label indices (grey or palette)")
        return red
    return np.asarray(image.convert("L"), np.uint8)


def _levels(image: Image.Image) -> NDArray[np.float32]:
    deep = image.mode.startswith("I") or image.mode == "F"
    levels = np.asarray(image if deep else image.convert("L"), np.float32) / (65535.0 if deep else 255.0)
    if not np.isfinite(levels).all():
        raise Rejected("bad_map", "NaN or infinity")
    return levels
