"""Refuses numbers outside the range of their field (`data_pipeline.config.number`), and empty names."""

from __future__ import annotations

import dataclasses
import functools
import typing
from collections.abc import Iterator
from typing import Any

from data_pipeline.config import RANGE, Range
from trainer.config.run import ConfigError

types_of = functools.cache(typing.get_type_hints)
"""{field: type} of a section's class. They are texts that Python compiles anew whenever it is asked."""


def check_ranges(section: Any, prefix: str = "") -> None:
    """Raise ConfigError, with the key, the value and the range, for the first number outside.

    Args:
        section: a dataclass of the configuration; sections inside it are checked too.
        prefix: its own key with a dot, empty for the root.
    """
    for key, value, allowed in _numbers(section, prefix):
        if value not in allowed:
            raise ConfigError(f"{key}={value} must be {allowed}.")


_NAMES = ("run_dir", "logging.wandb_project")
"""Texts that name something and have no null."""


def check_names(section: Any, prefix: str = "") -> None:
    """Raise ConfigError for a name, path or URL that is empty, as a variable that is not set leaves it.

    Those are the texts that may be null, which says that there is none, and `_NAMES`.
    """
    hints = types_of(section.__class__)
    for field in dataclasses.fields(section):
        value, key = getattr(section, field.name), f"{prefix}{field.name}"
        if dataclasses.is_dataclass(value):
            check_names(value, f"{key}.")
        elif isinstance(value, str) and not value.strip():
            optional = type(None) in typing.get_args(hints[field.name])
            if optional or key in _NAMES:
                otherwise = ", or null for none" if optional else ""
                raise ConfigError(f"{key} is empty (a variable that is not set?); give it a name{otherwise}.")


def _numbers(section: Any, prefix: str) -> Iterator[tuple[str, float, Range]]:
    for field in dataclasses.fields(section):
        value, key = getattr(section, field.name), f"{prefix}{field.name}"
        for item in value if isinstance(value, tuple) else (value,):
            if dataclasses.is_dataclass(item):
                yield from _numbers(item, f"{key}.")
            elif RANGE in field.metadata and item is not None:
                yield key, item, field.metadata[RANGE]
