"""Chooses and cleans the caption of a sample."""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

from data_pipeline.errors import Rejected
from data_pipeline.order.draws import Draw, below

_MAX_CHARACTERS = 4000


def clean(text: str) -> str:
    """NFC, no control characters, single spaces; at most 4000 characters."""
    text = unicodedata.normalize("NFC", text[: 4 * _MAX_CHARACTERS])
    text = "".join(c if unicodedata.category(c)[0] != "C" or c in "\u200d" else " " for c in text)
    return " ".join(text.split())[:_MAX_CHARACTERS]


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
            found.append(members[source].decode("utf-8", "replace"))
        if source == "txt":
            continue
        value = record.get(source)
        values = value if isinstance(value, list) else [value]
        found += [v for v in values if isinstance(v, str)]
        found += [v.decode("utf-8", "replace") for v in values if isinstance(v, bytes)]
    captions = [c for c in map(clean, found) if c]
    if not captions:
        if require:
            raise Rejected("no_caption")
        return ""
    return captions[below(seed, ordinal, Draw.CAPTION, len(captions))]
