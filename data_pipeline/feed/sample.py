"""From tar members to one finished row of a batch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from numpy.typing import NDArray

from data_pipeline.config import DataConfig
from data_pipeline.errors import Rejected
from data_pipeline.feed.captions import choose_caption
from data_pipeline.feed.conditions import fill_conditions
from data_pipeline.pictures.crops import crop_pixels, plan_crop
from data_pipeline.pictures.decoding import decode
from data_pipeline.shards.filters import Filter
from data_pipeline.shards.records import parse_record
from data_pipeline.shards.selection import picture_members

_SAME_ASPECT = 0.03
"""Logarithm of the ratio of two aspects up to which rounding explains it."""


def fill_sample(
    config: DataConfig,
    members: Mapping[str, bytes],
    *,
    late: Filter | None,
    original: tuple[int, int] | None,
    beside: Mapping[str, Any],
    target: tuple[int, int],
    seed: int,
    ordinal: int,
    out: Mapping[str, NDArray[Any]],
    row: int,
) -> str:
    """Decode one sample into row `row` of the batch arrays; returns its caption. Raises Rejected.

    late: clauses of the filter that its json must still satisfy
    original: height and width before whoever stored the picture made it smaller; None: as stored
    beside: captions in the parquet beside the tar, by column
    """
    record = parse_record(members.get("json"))
    if late is not None:
        reason = late.check(record or {})
        if reason is not None:
            raise Rejected(reason)
    caption = choose_caption(
        config.captions,
        members,
        {**beside, **{name: value for name, value in (record or {}).items() if value is not None}},
        require=config.require_caption,
        seed=seed,
        ordinal=ordinal,
    )
    data = next((members[e] for e in picture_members(config) if e in members), None)
    if data is None:
        raise Rejected("no_image")
    picture = decode(data, target=target, max_pixels=config.max_image_pixels)
    if not config.allow_enlarging and (picture.height < target[0] or picture.width < target[1]):
        raise Rejected("too_small", f"{picture.width} x {picture.height} for {target[1]} x {target[0]}")
    geometry = plan_crop(
        picture.height,
        picture.width,
        target,
        random_crop=config.crop == "random",
        may_flip=config.horizontal_flip,
        seed=seed,
        ordinal=ordinal,
    )
    geometry = crop_pixels(picture, geometry, out["pixels"][row])
    before = original and _upright(original, picture.height / picture.width)
    fill_conditions(config, members, record, geometry, before, out, row)
    return caption


def _upright(original: tuple[int, int], aspect: float) -> tuple[int, int]:
    """Height and width, exchanged where only so they have the aspect (height to width) of the picture.

    Who stores a picture as it came notes the size of its pixels, before its EXIF orientation turns them.
    """
    given, turned = (abs(math.log(h / w / aspect)) for h, w in (original, original[::-1]))
    return original[::-1] if turned < _SAME_ASPECT < given else original


def sample_arrays(height: int, width: int) -> dict[str, tuple[str, tuple[int, ...]]]:
    """dtype and shape per sample of pixels and ordinals; conditions come on top."""
    return {"pixels": ("uint8", (height, width, 3)), "ordinals": ("int64", ())}
