"""Refuses numbers outside the range that their field declares (`data_pipeline.config.number`)."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from data_pipeline.config import RANGE, Range
from trainer.config.run import ConfigError


def check_ranges(section: Any, prefix: str = "") -> None:
    """Raise ConfigError, with the key, the value and the range, for the first number outside.

    Args:
        section: a dataclass of the configuration; sections inside it are checked too.
        prefix: its own key with a dot, empty for the root.
    """
    for key, value, allowed in _numbers(section, prefix):
        if value not in allowed:
            raise ConfigError(f"{key}={value} must be {allowed}.")


def _numbers(section: Any, prefix: str) -> Iterator[tuple[str, float, Range]]:
    for field in dataclasses.fields(section):
        value, key = getattr(section, field.name), f"{prefix}{field.name}"
        for item in value if isinstance(value, tuple) else (value,):
            if dataclasses.is_dataclass(item):
                yield from _numbers(item, f"{key}.")
            elif RANGE in field.metadata and item is not None:
                yield key, item, field.metadata[RANGE]
