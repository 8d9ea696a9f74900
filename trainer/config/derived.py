"""Settings that follow from others: filled in where nobody wrote them, refused where they contradict."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection

from trainer.config.run import Config, ConfigError


def derive(config: Config, given: Collection[str]) -> Config:
    """The same with data.conditions and data.max_layout_boxes as the conditions of a second stage need them.

    `given` names the fields of `data` that somebody wrote; they stay.
    """
    if config.stage != "diffusion":
        return config
    layout = config.conditioning.layout
    found: dict[str, object] = {"conditions": config.conditioning.fields}
    if layout is not None:
        found["max_layout_boxes"] = layout.max_boxes
    found = {name: value for name, value in found.items() if name not in given}
    return dataclasses.replace(config, data=dataclasses.replace(config.data, **found))  # type: ignore[arg-type]


def check_derived(config: Config) -> None:
    """Raise ConfigError where the loader would make something else than the model needs."""
    if config.stage != "diffusion":
        return
    written, needed = config.data.conditions, config.conditioning.fields
    for name in sorted(set(needed) - set(written)):
        raise ConfigError(
            f"data.conditions=[{', '.join(written)}] leaves out {name}, which conditioning.{name} needs; "
            "remove data.conditions, since it follows from the sections of conditioning."
        )
    for name in sorted(set(written) - set(needed)):
        raise ConfigError(
            f"data.conditions names {name} and there is no section conditioning.{name} that would read it; "
            "add the section or remove the name."
        )
    layout, kept = config.conditioning.layout, config.data.max_layout_boxes
    if layout is not None and kept != layout.max_boxes:
        raise ConfigError(
            f"data.max_layout_boxes={kept} contradicts conditioning.layout.max_boxes={layout.max_boxes}; "
            "remove data.max_layout_boxes, since it follows from the other."
        )
