"""The networks of an export: grouped by their names, in a dialect, with their latent statistics.

Programs that know one scale factor or none get the statistics inside the weights of the KL autoencoder:

    quant_conv, the encoder's last layer:       mean' = (mean - shift) * scale, logvar' = logvar + 2 ln scale
    post_quant_conv, the decoder's first layer:  z = z' / scale + shift

Both are 1x1 convolutions, so this is exact. A quantised stage is another matter: its nearest codebook entry
is not the nearest any more when channels are scaled differently.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

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
QUANT, POST_QUANT = "quant_conv", "post_quant_conv"
PIXELS = "-1..1"
"""The range that an encoder is shown, and a decoder gives, in other programs."""
SD_SCALE, SDXL_SCALE, UPSCALER_SCALE = 0.18215, 0.13025, 0.08333
"""Scale factors that programs put in the place of any other, by the kind of model."""


def is_clip_l(tower: OpenCLIPConfig | None) -> bool:
    """Whether the original layout stores this tower in the names of transformers (SD1, SDXL's first).

    Its readers build OpenAI's CLIP ViT-L there, with QuickGELU, whatever the file holds.
    """
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


def folded(
    tensors: Mapping[str, Tensor], shift: Sequence[float], scale: Sequence[float]
) -> dict[str, Tensor]:
    """Weights whose plain latents are (z - shift) * scale of the given ones.

    Args:
        tensors: of a KL autoencoder, "quant_conv.weight" [2 z, 2 z, 1, 1] and "post_quant_conv.weight"
            [z, z, 1, 1] with their biases among them.
        shift: z numbers.
        scale: z numbers, above 0.
    """
    down, by = torch.tensor(shift, dtype=torch.float64), torch.tensor(scale, dtype=torch.float64)
    z = len(by)
    made = dict(tensors)
    weight, bias = (tensors[f"{QUANT}.{kind}"].double() for kind in ("weight", "bias"))
    made[f"{QUANT}.weight"] = torch.cat([weight[:z] * by.view(-1, 1, 1, 1), weight[z:]])
    made[f"{QUANT}.bias"] = torch.cat([(bias[:z] - down) * by, bias[z:] + 2 * by.log()])
    weight, bias = (tensors[f"{POST_QUANT}.{kind}"].double() for kind in ("weight", "bias"))
    made[f"{POST_QUANT}.weight"] = weight / by.view(1, -1, 1, 1)
    made[f"{POST_QUANT}.bias"] = bias + (weight.flatten(1) @ down)
    changed = [f"{layer}.{kind}" for layer in (QUANT, POST_QUANT) for kind in ("weight", "bias")]
    return made | {name: made[name].to(tensors[name].dtype) for name in changed}


def with_scale(
    tensors: Mapping[str, Tensor], shift: Sequence[float], scale: Sequence[float], factor: float
) -> dict[str, Tensor]:
    """A KL autoencoder's weights whose latents, times the factor, are the run's; unchanged where they are."""
    if not any(shift) and all(is_same_scale(s, factor) for s in scale):
        return dict(tensors)
    return folded(tensors, shift, [s / factor for s in scale])


def is_same_scale(one: float, other: float) -> bool:
    """Whether two scale factors are the same number, of which one has been through single precision."""
    return math.isclose(one, other, rel_tol=1e-6)


def is_one_number(shift: Sequence[float], scale: Sequence[float]) -> bool:
    """Whether a single scale factor says the same."""
    return not any(shift) and len(set(scale)) == 1
