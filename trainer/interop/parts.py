"""The networks of an export: grouped by their names, in a dialect, with their latent statistics."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from trainer.config.models import OpenCLIPConfig
from trainer.config.run import Config, ConfigError
from trainer.interop import compvis
from trainer.interop.first_stage_names import STATISTICS, first_stage_links
from trainer.interop.initialise import INPUT
from trainer.interop.links import export_tensors
from trainer.interop.text_tower_names import text_tower_links
from trainer.interop.unet_names import Dialect, unet_links

Groups = Mapping[str, Mapping[str, Tensor]]
"""Tensors by role (unet, conditions, first_stage, text_encoder, text_encoder_2), named as inside it."""

TOWERS = {"text_encoder": "openclip", "text_encoder_2": "openclip_second"}
"""Prefix of a text tower's tensors -> its section of ConditioningConfig."""


def is_clip_l(tower: OpenCLIPConfig | None) -> bool:
    """Whether the original layout stores this tower in the names of transformers (SD1, SDXL's first)."""
    return tower is not None and tower.model.startswith("ViT-L-14")


def by_role(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Tensors grouped by the first part of their name.

    Raises:
        ConfigError: a name begins with none of the known parts.
    """
    groups: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        role, _, rest = name.partition(".")
        if role not in ("unet", "conditions", "first_stage", *TOWERS):
            raise ConfigError(f"the tensor {name} belongs to no network that can be exported.")
        groups.setdefault(role, {})[rest] = tensor
    return groups


def convert_part(
    config: Config, role: str, tensors: Mapping[str, Tensor], dialect: Dialect
) -> dict[str, Tensor]:
    """One network's tensors (names without a prefix) in a dialect."""
    if role == "unet":
        order = compvis.input_order(config) if dialect == "compvis" else None
        if order is not None:
            tensors = {**tensors, INPUT: tensors[INPUT][:, order]}
        return export_tensors(unet_links(config.unet, tensors, dialect), tensors)
    if role == "first_stage":
        return export_tensors(first_stage_links(config.first_stage, tensors, dialect), tensors)
    if dialect == "compvis":
        return dict(tensors)
    return export_tensors(text_tower_links(tensors), tensors)


def latent_statistics(tensors: Mapping[str, Tensor], config: Config) -> tuple[list[float], list[float]]:
    """Latent shift and scale per channel: those configured, else those stored with the weights.

    Raises:
        ConfigError: there are none.
    """
    channels = config.first_stage.latent_channels
    if config.first_stage.latent_scale is not None:
        return [0.0] * channels, [config.first_stage.latent_scale] * channels
    shift, scale = (tensors.get(name) for name in STATISTICS)
    if shift is None or scale is None:
        raise ConfigError(
            "the first stage has no latent statistics, which are measured in the last step of its run; "
            "measure them with --measure SHARDS, or set first_stage.latent_scale (--latent-scale)."
        )
    return shift.tolist(), scale.tolist()


def cast(tensors: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Floating-point tensors in a type, the others as they are."""
    return {name: t.to(dtype) if t.is_floating_point() else t for name, t in tensors.items()}
