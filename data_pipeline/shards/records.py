"""Parses the json member of a sample, whatever is in it."""

from __future__ import annotations

import json
from typing import Any

_MAX_JSON = 4_000_000


def parse_record(body: bytes | None) -> dict[str, Any] | None:
    """The json member as a dict; None when absent or not an object. Bad JSON counts as absent."""
    if body is None or len(body) > _MAX_JSON:
        return None
    try:
        value = json.loads(body)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None
