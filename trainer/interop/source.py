"""Recognise what a file or folder of weights is, and hand out its parts."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from trainer.config.run import ConfigError
from trainer.interop import compvis, diffusers
from trainer.interop.diffusers_unet import Json
from trainer.interop.text_tower_names import NO_WEIGHTS
from trainer.interop.unet_names import Dialect
from trainer.weights import WEIGHT_ENDINGS, read_tensors


@dataclass(frozen=True)
class ForeignNetwork:
    """One network in some dialect."""

    dialect: Dialect
    """For text towers: compvis means open_clip's names, diffusers those of transformers."""
    tensors: dict[str, Tensor]
    """Its weights, without a prefix."""
    config: Json | None = None
    """Its config.json, where there is one."""


@dataclass
class ForeignWeights:
    """The parts of a file or folder."""

    url: str
    parts: dict[str, ForeignNetwork] = field(default_factory=dict)
    """By role: unet, unet_ema, first_stage, text_encoder, text_encoder_2."""
    class_embedding: Tensor | None = None
    """[classes, width] of the LDM class-conditional models."""
    latent_scale: float | None = None
    """Scale factor stored in the file."""
    left: list[str] = field(default_factory=list)
    """Names of tensors that belong to no part."""


def open_source(url: str) -> ForeignWeights:
    """Read a single file in the original layout, a lone network, or a folder of diffusers.

    Raises:
        ConfigError: it cannot be read, or nothing in it is recognised.
    """
    url = url.rstrip("/")
    if url.endswith(WEIGHT_ENDINGS):
        return _from_file(url, read_tensors(url))
    if diffusers.is_folder(url):
        return _from_folder(url)
    raise ConfigError(
        f"{url} is neither a weights file ({', '.join(WEIGHT_ENDINGS)}) nor a folder of diffusers."
    )


def _from_folder(url: str) -> ForeignWeights:
    source = ForeignWeights(url)
    for name, component in diffusers.read_folder(url).items():
        role = "first_stage" if name in ("vae", "vqvae") else name
        tensors = {n: t for n, t in component.tensors.items() if n not in NO_WEIGHTS}
        source.left += [f"{name}.{n}" for n in component.tensors if n in NO_WEIGHTS]
        source.parts[role] = ForeignNetwork("diffusers", tensors, component.config)
    return source


def _from_file(url: str, tensors: dict[str, Tensor]) -> ForeignWeights:
    if any(name.startswith((compvis.UNET, compvis.FIRST_STAGE)) for name in tensors):
        return _from_compvis(url, tensors)
    source = ForeignWeights(url)
    if "input_blocks.0.0.weight" in tensors:
        source.parts["unet"] = ForeignNetwork("compvis", tensors)
    elif "time_embedding.linear_1.weight" in tensors and "conv_in.weight" in tensors:
        source.parts["unet"] = ForeignNetwork("diffusers", tensors)
    elif "encoder.conv_in.weight" in tensors:
        dialect: Dialect = "compvis" if "encoder.norm_out.weight" in tensors else "diffusers"
        source.parts["first_stage"] = ForeignNetwork(
            dialect, _without(("loss.", "model_ema."), tensors, source)
        )
    elif "text_model.final_layer_norm.weight" in tensors or "ln_final.weight" in tensors:
        dialect = "compvis" if "ln_final.weight" in tensors else "diffusers"
        foreign = (*NO_WEIGHTS, "visual.", "vision_model.", "visual_projection.")
        source.parts["text_encoder"] = ForeignNetwork(dialect, _without(foreign, tensors, source))
    else:
        names = ", ".join(list(tensors)[:5])
        raise ConfigError(f"{url} holds no network that is recognised; its first tensors are {names}.")
    return source


def _without(
    foreign: tuple[str, ...], tensors: dict[str, Tensor], source: ForeignWeights
) -> dict[str, Tensor]:
    """Tensors whose names do not start so; the others are noted as left."""
    source.left += [name for name in tensors if name.startswith(foreign)]
    return {name: tensor for name, tensor in tensors.items() if not name.startswith(foreign)}


def _from_compvis(url: str, file: dict[str, Tensor]) -> ForeignWeights:
    split = compvis.split(file)
    source = ForeignWeights(url, class_embedding=split.class_embedding, left=split.left)
    if split.scale_factor is not None:
        source.latent_scale = float(split.scale_factor)
    for role, part in (
        ("unet", split.unet),
        ("unet_ema", split.unet_average),
        ("first_stage", split.first_stage),
    ):
        if part:
            source.parts[role] = ForeignNetwork("compvis", part)
    towers = [ForeignNetwork("diffusers", split.clip), ForeignNetwork("compvis", split.open_clip)]
    for role, tower in zip(
        ("text_encoder", "text_encoder_2"), (t for t in towers if t.tensors), strict=False
    ):
        source.parts[role] = tower
    return source
