"""From tar members to one finished row of a batch."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from numpy.typing import NDArray

from data_pipeline.config import DataConfig
from data_pipeline.errors import Rejected
from data_pipeline.feed.captions import choose_caption
from data_pipeline.feed.conditions import fill_conditions
from data_pipeline.moments.entry import MomentsCache
from data_pipeline.order.draws import Draw, below, fold
from data_pipeline.pictures.crops import CropPlace, Geometry, crop_at, crop_pixels, draw_place
from data_pipeline.pictures.decoding import check_size, decode
from data_pipeline.shards.filters import Filter
from data_pipeline.shards.records import parse_record
from data_pipeline.shards.selection import picture_members

_SAME_ASPECT = 0.03
"""Logarithm of the ratio of two aspects up to which rounding explains it."""


@dataclass(frozen=True)
class Known:
    """What is known of a sample besides its members."""

    late: Filter | None = None
    """Clauses of the filter that its json must still satisfy."""
    original: tuple[int, int] | None = None
    """Height and width before whoever stored the picture made it smaller; None: as stored."""
    beside: Mapping[str, Any] = field(default_factory=dict)
    """Captions in the parquet beside the tar, by column."""


@dataclass(frozen=True)
class Reused:
    """What the cache of moments holds of a picture."""

    values: NDArray[Any]
    """[C, h, w]"""
    geometry: Geometry
    """Of the pixels that were encoded."""
    members: dict[str, bytes] = field(default_factory=dict)
    """Members beside the picture that are kept with it, by extension."""


def draw_crop(config: DataConfig, key: str, variants: int, *, seed: int, ordinal: int) -> CropPlace:
    """The crop of one visit: anew, or one of a number of `variants` that each key has, whatever the seed."""
    random_crop, may_flip = config.crop == "random", config.horizontal_flip
    if variants:
        chosen = below(seed, ordinal, Draw.VARIANT, variants)
        name = int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little")
        seed, ordinal = 0, fold(name, chosen)
    return draw_place(random_crop=random_crop, may_flip=may_flip, seed=seed, ordinal=ordinal)


def fill_sample(
    config: DataConfig,
    members: Mapping[str, bytes],
    known: Known,
    *,
    target: tuple[int, int],
    draws: tuple[int, int, CropPlace],
    out: Mapping[str, NDArray[Any]],
    row: int,
    reused: Reused | None = None,
) -> tuple[str, Geometry]:
    """Decode one sample into row `row` of the batch arrays; its caption and crop. Raises Rejected.

    draws: seed and ordinal, from which the caption is drawn, and the crop that was
    reused: what stands for the picture, which is then neither needed nor decoded
    """
    seed, ordinal, place = draws
    record = parse_record(members.get("json"))
    if known.late is not None:
        reason = known.late.check(record or {})
        if reason is not None:
            raise Rejected(reason)
    caption = choose_caption(
        config.captions,
        members,
        {**known.beside, **{name: value for name, value in (record or {}).items() if value is not None}},
        require=config.require_caption,
        seed=seed,
        ordinal=ordinal,
        weights=config.caption_weights,
        shorten=config.shorten_captions,
    )
    if reused is None:
        geometry = _fill_pixels(config, members, target, place, out["pixels"][row])
    else:
        geometry = reused.geometry
        check_size(geometry.height, geometry.width, config.max_image_pixels)
        _check_large_enough(config, geometry.height, geometry.width, target)
        out["moments"][row] = reused.values
    before = known.original and _upright(known.original, geometry.height / geometry.width)
    fill_conditions(config, members, record, geometry, before, out, row)
    return caption, geometry


def _fill_pixels(
    config: DataConfig,
    members: Mapping[str, bytes],
    target: tuple[int, int],
    place: CropPlace,
    out: NDArray[Any],
) -> Geometry:
    data = next((members[e] for e in picture_members(config) if e in members), None)
    if data is None:
        raise Rejected("no_image")
    picture = decode(data, target=target, max_pixels=config.max_image_pixels)
    _check_large_enough(config, picture.height, picture.width, target)
    return crop_pixels(picture, crop_at(picture.height, picture.width, target, place), out)


def _check_large_enough(config: DataConfig, height: int, width: int, target: tuple[int, int]) -> None:
    if not config.allow_enlarging and (height < target[0] or width < target[1]):
        raise Rejected("too_small", f"{width} x {height} for {target[1]} x {target[0]}")


def _upright(original: tuple[int, int], aspect: float) -> tuple[int, int]:
    """Height and width, exchanged where only so they have the aspect (height to width) of the picture.

    Who stores a picture as it came notes the size of its pixels, before its EXIF orientation turns them.
    """
    given, turned = (abs(math.log(h / w / aspect)) for h, w in (original, original[::-1]))
    return original[::-1] if turned < _SAME_ASPECT < given else original


def sample_arrays(
    height: int, width: int, cache: MomentsCache | None = None
) -> dict[str, tuple[str, tuple[int, ...]]]:
    """dtype and shape per sample of pixels, ordinals and what is cached of it; conditions come on top."""
    spec: dict[str, tuple[str, tuple[int, ...]]] = {
        "pixels": ("uint8", (height, width, 3)),
        "ordinals": ("int64", ()),
    }
    if cache is not None:
        spec |= {"moments": (cache.numpy_dtype.str, cache.shape(height, width)), "found": ("bool", ())}
    return spec
