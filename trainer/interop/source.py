"""Recognise what a file or folder of weights is, and hand out its parts."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

from torch import Tensor

from trainer.config.run import ConfigError
from trainer.interop import compvis, diffusers
from trainer.interop.diffusers_unet import Json
from trainer.interop.text_tower_names import NO_WEIGHTS, with_text_model
from trainer.interop.unet_names import Dialect
from trainer.weights import WEIGHT_ENDINGS, read_tensors

OPENAI_CLIP: Json = {"hidden_act": "quick_gelu"}
"""Of the tower that the original layout stores in the names of transformers, which says nothing of it."""
_SIGNS = (
    ("input_blocks.0.0.weight",),
    ("time_embedding.linear_1.weight", "conv_in.weight"),
    ("encoder.conv_in.weight",),
    ("text_model.final_layer_norm.weight",),
    ("final_layer_norm.weight", "embeddings.token_embedding.weight"),
    ("ln_final.weight",),
)
"""Tensors by which a lone network is told."""
_STRANGERS = (
    ("joint_blocks.", "the transformer of SD3, and our networks are UNets"),
    ("double_blocks.", "the transformer of Flux, and our networks are UNets"),
    ("add_k_proj", "a transformer of diffusers (SD3, Flux), and our networks are UNets"),
    ("lora_", "a LoRA, which changes a network and is none"),
    ("controlnet_cond_embedding", "a ControlNet"),
    ("zero_convs.", "a ControlNet"),
    ("quant_map", "quantised weights; take the file in half or single precision"),
)
"""Parts of names that tell what a file is that we do not read."""


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
    text_transformer: dict[str, Tensor] = field(default_factory=dict)
    """LDM's own text model, in the names of x-transformers."""
    latent_scale: float | None = None
    """Scale factor stored in the file."""
    scheduler: Json | None = None
    """scheduler_config.json of the UNet, where there is one."""
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
    source = ForeignWeights(url, scheduler=diffusers.read_scheduler(url))
    for name, component in diffusers.read_folder(url).items():
        role = "first_stage" if name in ("vae", "vqvae") else name
        stored = with_text_model(component.tensors) if role.startswith("text_encoder") else component.tensors
        tensors = {n: t for n, t in stored.items() if n not in NO_WEIGHTS}
        source.left += [f"{name}.{n}" for n in stored if n in NO_WEIGHTS]
        source.parts[role] = ForeignNetwork("diffusers", tensors, component.config)
    return source


def _from_file(url: str, tensors: dict[str, Tensor]) -> ForeignWeights:
    if any(name.startswith((compvis.UNET, compvis.FIRST_STAGE)) for name in tensors):
        return _from_compvis(url, tensors)
    source = ForeignWeights(url)
    if any(name.startswith(compvis.AVERAGE) for name in tensors):
        beside = _without((compvis.AVERAGE,), tensors, source)
        if not _is_known(beside):
            return _from_compvis(url, tensors)
        tensors = beside  # an autoencoder of CompVis with its own average
    bare = tensors
    while not _is_known(bare) and (prefix := _common_prefix(bare)):
        bare = {name.removeprefix(prefix): tensor for name, tensor in bare.items()}
    tensors = bare if _is_known(bare) else tensors
    if "input_blocks.0.0.weight" in tensors:
        source.parts["unet"] = ForeignNetwork("compvis", tensors)
    elif "time_embedding.linear_1.weight" in tensors and "conv_in.weight" in tensors:
        source.parts["unet"] = ForeignNetwork("diffusers", tensors)
    elif "encoder.conv_in.weight" in tensors:
        dialect: Dialect = "compvis" if "encoder.norm_out.weight" in tensors else "diffusers"
        source.parts["first_stage"] = ForeignNetwork(
            dialect, _without(("loss.", "model_ema."), tensors, source)
        )
    elif _is_known(tensors):
        dialect = "compvis" if "ln_final.weight" in tensors else "diffusers"
        foreign = (*NO_WEIGHTS, "visual.", "vision_model.", "visual_projection.")
        tower = tensors if dialect == "compvis" else with_text_model(tensors)
        source.parts["text_encoder"] = ForeignNetwork(dialect, _without(foreign, tower, source))
    else:
        raise _unknown(url, tensors)
    return source


def _is_known(tensors: Collection[str]) -> bool:
    """Whether the names are those of a lone network that `_from_file` tells."""
    return any(all(name in tensors for name in names) for names in _SIGNS)


def _common_prefix(tensors: Collection[str]) -> str:
    """The first part of all names, where they share one: `vae.`, `model.`, ..."""
    first = {name.partition(".")[0] for name in tensors if "." in name}
    return f"{first.pop()}." if len(first) == 1 and all("." in name for name in tensors) else ""


def _unknown(url: str, tensors: Collection[str]) -> ConfigError:
    names = ", ".join(list(tensors)[:5]) or "none"
    what = next((f", but {what}" for mark, what in _STRANGERS if any(mark in name for name in tensors)), "")
    return ConfigError(f"{url} holds no network that is recognised{what}; its first tensors are {names}.")


def _without(
    foreign: tuple[str, ...], tensors: dict[str, Tensor], source: ForeignWeights
) -> dict[str, Tensor]:
    """Tensors whose names do not start so; the others are noted as left."""
    source.left += [name for name in tensors if name.startswith(foreign)]
    return {name: tensor for name, tensor in tensors.items() if not name.startswith(foreign)}


def _from_compvis(url: str, file: dict[str, Tensor]) -> ForeignWeights:
    split = compvis.split(file)
    if split.unet and "input_blocks.0.0.weight" not in split.unet:
        raise _unknown(url, list(split.unet))
    averaged = sum(name.startswith(f"{compvis.AVERAGE}diffusion_model") for name in split.left)
    if averaged and not split.unet:
        raise ConfigError(
            f"{url} holds the UNet as an average alone ({averaged} tensors {compvis.AVERAGE}*, whose names "
            "have lost their dots); take the file that holds the weights beside it."
        )
    source = ForeignWeights(
        url,
        class_embedding=split.class_embedding,
        text_transformer=split.text_transformer,
        left=split.left,
    )
    if split.scale_factor is not None:
        source.latent_scale = float(split.scale_factor)
    for role, part in (
        ("unet", split.unet),
        ("unet_ema", split.unet_average),
        ("first_stage", split.first_stage),
    ):
        if part:
            source.parts[role] = ForeignNetwork("compvis", part)
    towers = [
        ForeignNetwork("diffusers", with_text_model(split.clip), OPENAI_CLIP),
        ForeignNetwork("compvis", split.open_clip),
    ]
    for role, tower in zip(
        ("text_encoder", "text_encoder_2"), (t for t in towers if t.tensors), strict=False
    ):
        source.parts[role] = tower
    return source
