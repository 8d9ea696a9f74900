"""Chooses the caption of a sample, and how much of it is told.

Most recipes of today mix a long caption of many sentences with the short text of the web page (DALL-E 3: 95
and 5 %, SD3: 50 and 50 %): `weights` over the sources. A model that saw long captions only draws little from
a short prompt: `shorten` tells no more than the beginning of some.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

from data_pipeline.errors import Rejected
from data_pipeline.order.draws import Draw, below, uniform
from data_pipeline.shards.records import clean, text_of

_SENTENCE_END = re.compile(r"(?<=[.!?])\s+|(?<=[\u3002\uff01\uff1f])")
_PART_END = re.compile(r"[,;]\s+|(?<=[\u3001\uff0c])")


def choose_caption(
    sources: Sequence[str],
    members: Mapping[str, bytes],
    record: Mapping[str, Any],
    *,
    require: bool,
    seed: int,
    ordinal: int,
    weights: Sequence[float] = (),
    shorten: float = 0.0,
) -> str:
    """One of the captions that `sources` offer, chosen by (seed, ordinal).

    A source is a member (`txt`, `caption`) or a field of `record`, the json or parquet, where a list means
    several captions. Raises Rejected("no_caption") when there is none and `require`; otherwise the empty
    caption stands for it.

    Args:
        weights: of each source, among those that have a caption, whose captions are then alike; empty: all
            captions of all sources are alike.
        shorten: share of the captions that end after one of their sentences or parts.
    """
    offered = [_captions_of(source, members, record) for source in sources]
    if weights:
        there = [(captions, weight) for captions, weight in zip(offered, weights, strict=True) if captions]
        offered = [_drawn(there, uniform(seed, ordinal, Draw.CAPTION_SOURCE))] if there else []
    captions = [caption for captions in offered for caption in captions]
    if not captions:
        if require:
            raise Rejected("no_caption")
        return ""
    caption = captions[below(seed, ordinal, Draw.CAPTION, len(captions))]
    if uniform(seed, ordinal, Draw.SHORTEN) < shorten:
        beginnings = _beginnings(caption)
        caption = beginnings[below(seed, ordinal, Draw.CAPTION_END, len(beginnings))]
    return caption


def _captions_of(source: str, members: Mapping[str, bytes], record: Mapping[str, Any]) -> list[str]:
    found: list[str] = []
    if source in members:
        found.append(text_of(members[source]))
    if source != "txt":
        value = record.get(source)
        values = value if isinstance(value, list) else [value]
        found += [v for v in values if isinstance(v, str)]
        found += [text_of(v) for v in values if isinstance(v, bytes)]
    return [c for c in map(clean, found) if c]


def _drawn(there: Sequence[tuple[list[str], float]], point: float) -> list[str]:
    """The source on which `point`, in [0, 1), falls when each is as long as its weight."""
    ends = [*accumulate(weight for _, weight in there)]
    return there[min(bisect_right(ends, point * ends[-1]), len(there) - 1)][0]


def _beginnings(caption: str) -> list[str]:
    """All but the whole of its beginnings that end with a sentence, else with a part; the caption if none."""
    for end in (_SENTENCE_END, _PART_END):
        found = [caption[: match.start()].rstrip() for match in end.finditer(caption)]
        found = [beginning for beginning in found if beginning and beginning != caption]
        if found:
            return found
    return [caption]
