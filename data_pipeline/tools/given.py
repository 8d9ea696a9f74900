"""Pictures, maps and texts that a person gives, read and cropped by the decoders of training."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from data_pipeline.errors import DataError, Rejected
from data_pipeline.feed.conditions import Box, in_order
from data_pipeline.pictures.crops import Geometry, crop_pixels, crop_values, plan_crop
from data_pipeline.pictures.decoding import DecodedPicture, decode, decode_map
from data_pipeline.shards.records import clean
from data_pipeline.storage.files import read_bytes, read_text

_PICTURE_KINDS = "JPEG, PNG, WebP, GIF, BMP or TIFF"
_MAP_KINDS = "PNG, WebP, TIFF or BMP"


@dataclass(frozen=True)
class GivenPicture:
    """A picture from a file, upright, on white where it is transparent; of an animation the first frame."""

    url: str
    data: bytes
    max_pixels: int

    @cached_property
    def pixels(self) -> NDArray[np.uint8]:
        """The whole picture, RGB [H, W, 3]."""
        return np.ascontiguousarray(_picture(self, None).pixels)

    @property
    def size(self) -> tuple[int, int]:
        """Height and width."""
        return self.pixels.shape[0], self.pixels.shape[1]

    @property
    def transparent(self) -> bool:
        """Whether the file has transparent parts, or could have."""
        with Image.open(io.BytesIO(self.data)) as image:
            return image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info

    def brightness(self) -> GivenMap:
        """Its brightness as a map of whole numbers, 0 to 255."""
        return GivenMap(self.url, np.asarray(Image.fromarray(self.pixels).convert("L")), self.sha256)

    @property
    def sha256(self) -> str:
        """Digest of the file."""
        return hashlib.sha256(self.data).hexdigest()

    def cropped(self, size: tuple[int, int]) -> NDArray[np.uint8]:
        """[h, w, 3]: what training with data.crop=center makes of it at this size, to the bit."""
        picture = _picture(self, size)
        out = np.empty((*size, 3), np.uint8)
        crop_pixels(picture, _centre((picture.height, picture.width), size), out)
        return out


@dataclass(frozen=True)
class GivenMap:
    """A map from a file, upright: labels uint8 [H, W], or levels float32 [H, W] in [0, 1]."""

    url: str
    values: NDArray[Any]
    sha256: str
    """Digest of the file."""

    @property
    def size(self) -> tuple[int, int]:
        """Height and width."""
        return self.values.shape[0], self.values.shape[1]

    def cropped(self, size: tuple[int, int]) -> NDArray[Any]:
        """[h, w]: as training crops and resizes maps, labels to the nearest."""
        return crop_values(self.values, _centre(self.size, size), nearest=self.values.dtype == np.uint8)


def read_picture(url: str, max_pixels: int) -> GivenPicture:
    """Raises DataError: no such file, or not a picture that training could read."""
    given = GivenPicture(url, read_bytes(url), max_pixels)
    _ = given.pixels  # decoded now, so that a damaged file is told at once
    return given


def read_map(url: str, max_pixels: int, *, labels: bool) -> GivenMap:
    """Raises DataError: no such file, or not a map that training could read."""
    data = read_bytes(url)
    try:
        values = decode_map(data, labels=labels, max_pixels=max_pixels)
    except Rejected as rejected:
        raise _refused(url, rejected, _MAP_KINDS) from rejected
    return GivenMap(url, np.ascontiguousarray(values), hashlib.sha256(data).hexdigest())


def read_prompts(url: str) -> list[str]:
    """The lines of a text file, cleaned as captions are; lines without a visible character are left out.

    Raises:
        DataError: no such file, or not a text in UTF-8.
    """
    return [caption for line in read_text(url).split("\n") if (caption := clean(line))]


def order_boxes(boxes: Sequence[Box]) -> list[Box]:
    """Boxes of a whole picture in the order of training, and those alone that it keeps."""
    return in_order(boxes)


def read_prompt(text: str, what: str) -> str:
    """A prompt from the command line, cleaned as captions are.

    Raises:
        DataError: it is not UTF-8; `what` names it in the sentence.
    """
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise DataError(f"{what} {text!a} is not UTF-8; give it in UTF-8, or in a file.")
    return clean(text)


def _picture(given: GivenPicture, target: tuple[int, int] | None) -> DecodedPicture:
    try:
        return decode(given.data, target=target, max_pixels=given.max_pixels)
    except Rejected as rejected:
        raise _refused(given.url, rejected, _PICTURE_KINDS) from rejected


def _refused(url: str, rejected: Rejected, kinds: str) -> DataError:
    if rejected.reason == "too_many_pixels":
        return DataError(f"{url} has more pixels than data.max_image_pixels of the run ({rejected.detail}).")
    return DataError(f"{url} cannot be read as a picture ({rejected.detail}); give a whole {kinds} file.")


def _centre(size: tuple[int, int], target: tuple[int, int]) -> Geometry:
    return plan_crop(*size, target, random_crop=False, may_flip=False, seed=0, ordinal=0)
