"""The original single-file layout of CompVis and Stability: which tensor belongs to which part."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from trainer.config.run import Config
from trainer.interop.text_tower_names import NO_WEIGHTS

UNET = "model.diffusion_model."
AVERAGE = "model_ema."
FIRST_STAGE = "first_stage_model."
OPEN_CLIP = ("cond_stage_model.model.", "conditioner.embedders.1.model.")
CLIP = ("cond_stage_model.transformer.", "conditioner.embedders.0.transformer.")
CLASS_EMBEDDING = "cond_stage_model.embedding.weight"
OF_TRANSFORMER, _OF_CLIP = "token_emb.weight", "embeddings.token_embedding.weight"
"""Tensors that tell LDM's own text model (BERTEmbedder) from CLIP; both lie under the prefixes of CLIP."""
SCALE_FACTOR = "scale_factor"


@dataclass
class CompVisParts:
    """A file's tensors by part, each under the names inside its part."""

    unet: dict[str, Tensor] = field(default_factory=dict)
    unet_average: dict[str, Tensor] = field(default_factory=dict)
    """EMA of the UNet, under the same names as `unet`; empty where the file has none."""
    first_stage: dict[str, Tensor] = field(default_factory=dict)
    open_clip: dict[str, Tensor] = field(default_factory=dict)
    """Text tower in open_clip's names."""
    clip: dict[str, Tensor] = field(default_factory=dict)
    """Text tower in the names of transformers' CLIP."""
    text_transformer: dict[str, Tensor] = field(default_factory=dict)
    """LDM's own text model in the names of x-transformers; `join` leaves it out."""
    class_embedding: Tensor | None = None
    """[classes, width] of the LDM class-conditional models."""
    scale_factor: Tensor | None = None
    """0-d latent scale, where the file stores it."""
    schedule: dict[str, Tensor] = field(default_factory=dict)
    """betas, alphas_cumprod and what derives from them."""
    left: list[str] = field(default_factory=list)
    """Names that belong to no part."""


def split(tensors: Mapping[str, Tensor]) -> CompVisParts:
    """Sort a file's tensors into its parts; prefixes are removed."""
    parts = CompVisParts()
    average: dict[str, Tensor] = {}
    clip = any(name.startswith(CLIP) and name.endswith(_OF_CLIP) for name in tensors)
    for name, tensor in tensors.items():
        if name.startswith(UNET):
            parts.unet[name.removeprefix(UNET)] = tensor
        elif name.startswith(AVERAGE):
            average[name.removeprefix(AVERAGE)] = tensor
        elif name.startswith(FIRST_STAGE):
            _sort_first_stage(parts, name, tensor)
        elif name == CLASS_EMBEDDING:
            parts.class_embedding = tensor
        elif name == SCALE_FACTOR:
            parts.scale_factor = tensor
        elif name.startswith(CLIP) and clip:
            _sort_tower(parts.clip, parts.left, name, CLIP, tensor)
        elif name.startswith(CLIP[0]) and f"{CLIP[0]}{OF_TRANSFORMER}" in tensors:
            parts.text_transformer[name.removeprefix(CLIP[0])] = tensor
        elif name.startswith(OPEN_CLIP):
            _sort_tower(parts.open_clip, parts.left, name, OPEN_CLIP, tensor)
        elif "." not in name and tensor.dim() == 1:
            parts.schedule[name] = tensor
        else:
            parts.left.append(name)
    _sort_average(parts, average)
    return parts


def join(parts: CompVisParts) -> dict[str, Tensor]:
    """The inverse of `split`, with text towers where SD1 (CLIP), SD2 (open_clip) or SDXL (both) have them."""
    tensors = {f"{UNET}{name}": tensor for name, tensor in parts.unet.items()}
    for name, tensor in parts.unet_average.items():
        key = average_name(name)
        assert key not in tensors, f"two parameters share the name {key}"
        tensors[key] = tensor
    tensors |= {f"{FIRST_STAGE}{name}": tensor for name, tensor in parts.first_stage.items()}
    place = 1 if parts.open_clip and parts.clip else 0  # both towers: SDXL
    tensors |= {f"{OPEN_CLIP[place]}{name}": tensor for name, tensor in parts.open_clip.items()}
    tensors |= {f"{CLIP[place]}{name}": tensor for name, tensor in parts.clip.items()}
    if parts.class_embedding is not None:
        tensors[CLASS_EMBEDDING] = parts.class_embedding
    if parts.scale_factor is not None:
        tensors[SCALE_FACTOR] = parts.scale_factor
    return tensors | parts.schedule


def input_order(config: Config) -> list[int] | None:
    """Which of our UNet's input channels stands at each place in the file; None where they are the same.

    LDM's inpainting model joins latents, masked picture and mask; ours, as Stable Diffusion's, latents, mask
    and masked picture. No tensor shows it, so the configuration's form says it.
    """
    masked, z = config.conditioning.masked_image, config.first_stage.channels
    if masked is None or masked.form != "ldm":
        return None
    mask = list(range(z, z + masked.mask_channels))
    picture = list(range(z + masked.mask_channels, 2 * z + masked.mask_channels))
    return [*range(z), *picture, *mask]


def average_name(name: str) -> str:
    """Where the EMA of a UNet parameter is stored: all dots are removed."""
    return AVERAGE + f"diffusion_model.{name}".replace(".", "")


def schedule_tensors(betas: Tensor, alphas_cumprod: Tensor) -> dict[str, Tensor]:
    """The buffers that readers of this layout look at, float32 [T]."""
    previous = torch.cat([torch.ones_like(alphas_cumprod[:1]), alphas_cumprod[:-1]])
    values = {
        "betas": betas,
        "alphas_cumprod": alphas_cumprod,
        "alphas_cumprod_prev": previous,
        "sqrt_alphas_cumprod": alphas_cumprod.sqrt(),
        "sqrt_one_minus_alphas_cumprod": (1 - alphas_cumprod).sqrt(),
    }
    return {name: value.float() for name, value in values.items()}


def _sort_first_stage(parts: CompVisParts, name: str, tensor: Tensor) -> None:
    inner = name.removeprefix(FIRST_STAGE)
    if inner.startswith(("loss.", "model_ema.")):
        parts.left.append(name)
    else:
        parts.first_stage[inner] = tensor


def _sort_tower(
    tower: dict[str, Tensor], left: list[str], name: str, prefixes: tuple[str, ...], tensor: Tensor
) -> None:
    inner = next(name.removeprefix(prefix) for prefix in prefixes if name.startswith(prefix))
    if inner in NO_WEIGHTS or inner.startswith("visual."):
        left.append(name)
    else:
        tower[inner] = tensor


def _sort_average(parts: CompVisParts, average: dict[str, Tensor]) -> None:
    for name in parts.unet:
        key = average_name(name).removeprefix(AVERAGE)
        if key in average:
            parts.unet_average[name] = average.pop(key)
    parts.left += [f"{AVERAGE}{name}" for name in average]
