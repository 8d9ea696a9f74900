"""Chooses the caption of a sample."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from data_pipeline.errors import Rejected
from data_pipeline.order.draws import Draw, below
from data_pipeline.shards.records import clean, text_of


def choose_caption(
    sources: Sequence[str],
    members: Mapping[str, bytes],
    record: Mapping[str, Any],
    *,
    require: bool,
    seed: int,
    ordinal: int,
) -> str:
    """One of the captions that `sources` offer, chosen by (seed, ordinal).

    A source is a member (`txt`, `caption`) or a field of `record`, the json or parquet, where a list means
    several captions. Raises Rejected("no_caption") when there is none and `require`; otherwise the empty
    caption stands for it.
    """
    found: list[str] = []
    for source in sources:
        if source in members:
            found.append(text_of(members[source]))
        if source == "txt":
            continue
        value = record.get(source)
        values = value if isinstance(value, list) else [value]
        found += [v for v in values if isinstance(v, str)]
        found += [text_of(v) for v in values if isinstance(v, bytes)]
    captions = [c for c in map(clean, found) if c]
    if not captions:
        if require:
            raise Rejected("no_caption")
        return ""
    return captions[below(seed, ordinal, Draw.CAPTION, len(captions))]
