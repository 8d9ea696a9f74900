"""Our weights in the layouts of other programs (`ldm export`)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Literal

import torch
from torch import Tensor

from data_pipeline.storage.urls import join
from trainer.config.models import OpenCLIPConfig, UNetConfig
from trainer.config.run import Config, ConfigError
from trainer.diffusion.schedule import make_schedule
from trainer.first_stage.build import WEIGHTS_FILE, first_stage_metadata
from trainer.interop import compvis
from trainer.interop.convert import CLASS_TOKENS, TEXT_FILES, UNET_AVERAGE_FILE, UNET_FILE
from trainer.interop.diffusers_export import write_diffusers
from trainer.interop.first_stage_names import STATISTICS
from trainer.interop.links import Link, TransferReport
from trainer.interop.parts import (
    PIXELS,
    SD_SCALE,
    SDXL_SCALE,
    TOWERS,
    UPSCALER_SCALE,
    Groups,
    by_role,
    cast,
    convert_part,
    is_clip_l,
    is_one_number,
    latent_statistics,
    with_scale,
)
from trainer.interop.unet_names import unet_links
from trainer.weights import TORCH_ENDINGS, WEIGHT_ENDINGS, write_weights

Layout = Literal["native", "compvis", "diffusers"]
Tensors = Mapping[str, Tensor]
_SD1 = {"layer": "last", "padding": "end", "null": "empty"}
_SD2 = {"layer": "penultimate", "final_norm": True, "padding": "zero", "null": "empty"}
_SDXL = {"layer": "penultimate", "final_norm": False, "padding": "zero"}
_SDXL_CLIP = _SDXL | {"padding": "end"}
"""How readers of the original layout use its towers. Of SDXL some take zeros for no text, and some do not."""
LORA_FILE = "pytorch_lora_weights.safetensors"


def export_weights(
    tensors: Tensors,
    destination_url: str,
    config: Config,
    layout: Layout,
    average: Tensors | None = None,
    dtype: torch.dtype = torch.float32,
) -> TransferReport:
    """Write weights in a layout, completely converted before the first byte is written.

    Args:
        tensors: under our names: "unet.*" and "conditions.*" as in the trained network, "first_stage.*",
            and text towers in open_clip's names as "text_encoder.*" and "text_encoder_2.*"; any subset.
        destination_url: folder, or for compvis a .safetensors file; any URL.
        config: the run's configuration.
        layout: native (what `init_from` and `first_stage.weights` read), compvis (one file as of Stable
            Diffusion), diffusers (a pipeline's folder).
        average: EMA of the UNet, "unet.*"; stored beside the weights, except for diffusers, which gets the
            average in their place.
        dtype: of what is written for compvis and diffusers.

    Raises:
        ConfigError: the layout cannot express this structure, or nothing is given to export.
    """
    groups = by_role(tensors)
    averaged = by_role(average or {}).get("unet", {})
    if not groups:
        raise ConfigError("there are no weights to export.")
    notes: list[str] = []
    match layout:
        case "native":
            files = _write_native(groups, averaged, destination_url.rstrip("/"), config)
        case "compvis":
            files, notes = _write_compvis(groups, averaged, destination_url, config, dtype)
        case "diffusers":
            if not destination_url.strip() or destination_url.endswith(WEIGHT_ENDINGS):
                raise ConfigError(
                    f"the diffusers layout is a folder; name one in the place of {destination_url!r}."
                )
            best = {**groups, "unet": averaged} if averaged else groups
            files, notes = write_diffusers(best, destination_url.rstrip("/"), config, dtype)
    unsaid = () if layout == "native" else tuple(n for n in tensors if _is_unsaid(n, layout))
    taken = tuple(n for n in tensors if n not in unsaid)
    return TransferReport(taken=taken, left=unsaid, files=tuple(files), notes=tuple(notes))


def _write_native(groups: Groups, averaged: Tensors, url: str, config: Config) -> list[str]:
    metadata = {"unet": json.dumps(asdict(config.unet))}
    conditions = {f"conditions.{name}": tensor for name, tensor in groups.get("conditions", {}).items()}
    files: dict[str, tuple[Tensors, dict[str, str]]] = {}
    if "unet" in groups:
        files[UNET_FILE] = ({f"unet.{n}": t for n, t in groups["unet"].items()} | conditions, metadata)
    if averaged:
        files[UNET_AVERAGE_FILE] = ({f"unet.{n}": t for n, t in averaged.items()} | conditions, metadata)
    if "first_stage" in groups:
        files[WEIGHTS_FILE] = (groups["first_stage"], first_stage_metadata(config.first_stage))
    for role, file in TEXT_FILES.items():
        if role in groups:
            files[file] = (groups[role], {})
    for file, (named, about) in files.items():
        write_weights(f"{url}/{file}", named, about)
    return [f"{url}/{file}" for file in files]


def _write_compvis(
    groups: Groups, averaged: Tensors, url: str, config: Config, dtype: torch.dtype
) -> tuple[list[str], list[str]]:
    """What was written, and notes about it."""
    if not url.endswith(".safetensors"):
        raise ConfigError(f"the compvis layout is one file; let the destination {url} end in .safetensors.")
    parts = compvis.CompVisParts()
    notes: list[str] = []
    if "unet" in groups:
        if config.diffusion.process != "discrete":
            raise ConfigError(
                "the compvis layout holds the levels of a beta schedule, which diffusion.process="
                f"{config.diffusion.process} does not have; export in the native or the diffusers layout."
            )
        if config.first_stage.input_range != PIXELS:
            raise ConfigError(
                f"readers of the compvis layout take pixels to lie in {PIXELS}, not first_stage.input_range="
                f"{config.first_stage.input_range}; export in the native or the diffusers layout."
            )
        parts.unet = convert_part(config, "unet", groups["unet"], "compvis")
        notes += _what_readers_take_otherwise(config)
        if averaged:  # of memory of its own, which files want, where it stands in both places
            copies = {name: tensor.clone() for name, tensor in averaged.items()}
            parts.unet_average = convert_part(config, "unet", copies, "compvis")
        schedule = make_schedule(config.diffusion)
        parts.schedule = compvis.schedule_tensors(schedule.betas, schedule.alphas_cumprod)
    if "first_stage" in groups:
        parts.first_stage, factor = _first_stage_to_compvis(groups["first_stage"], config)
        parts.scale_factor = torch.tensor(factor)
        if config.first_stage.name != "kl" and factor != 1:
            notes.append(
                f"the scale factor of the first stage is {factor:g}; programs that do not read the file's "
                "must be told, such as by `scale_factor` in their YAML"
            )
    for role, section in TOWERS.items():
        if role in groups:
            _place_tower(parts, config, role, section, groups[role])
    embedding = groups.get("conditions", {}).get(CLASS_TOKENS.removeprefix("conditions."))
    parts.class_embedding = None if embedding is None else embedding.to(dtype)
    for name in ("unet", "unet_average", "first_stage", "clip", "open_clip"):
        setattr(parts, name, cast(getattr(parts, name), dtype))
    write_weights(url, compvis.join(parts), {"format": "pt"})
    return [url], notes


def _what_readers_take_otherwise(config: Config) -> list[str]:
    """A note of the settings that the file has no place for, where they are not those of Stable Diffusion."""
    unusual = []
    if config.diffusion.prediction != "eps":
        unusual.append(f"diffusion.prediction={config.diffusion.prediction}")
    if config.diffusion.zero_terminal_snr:
        unusual.append("diffusion.zero_terminal_snr=true")
    towers = {name: getattr(config.conditioning, name) for name in TOWERS.values()}
    two = None not in towers.values()
    for name, tower in towers.items():
        if tower is None:
            continue
        usual = (_SDXL_CLIP if is_clip_l(tower) else _SDXL) if two else _SD1 if is_clip_l(tower) else _SD2
        for setting, value in usual.items():
            idle = setting == "final_norm" and tower.layer == "last"
            if getattr(tower, setting) != value and not idle:
                told = str(getattr(tower, setting)).lower()
                unusual.append(f"conditioning.{name}.{setting}={told}")
    if not unusual:
        return []
    return [f"the file does not say {', '.join(unusual)}; programs must be told, such as by their YAML"]


def _first_stage_to_compvis(tensors: Tensors, config: Config) -> tuple[dict[str, Tensor], float]:
    """Weights with one scale factor: a KL autoencoder's with the one that readers assume.

    Few look at the factor in the file: they have one of their own for each kind of model.
    """
    shift, scale = latent_statistics(tensors, config)
    if config.first_stage.name == "kl":
        factor = _assumed_scale(config)
        tensors = with_scale(tensors, shift, scale, factor)
        return convert_part(config, "first_stage", tensors, "compvis"), factor
    if not is_one_number(shift, scale):
        raise ConfigError(
            "the compvis layout has one scale factor; this first stage has statistics per channel, which "
            "only those of first_stage.name=kl can take into their weights."
        )
    return convert_part(config, "first_stage", tensors, "compvis"), scale[0]


def _assumed_scale(config: Config) -> float:
    if config.conditioning.openclip_second is not None:
        return SDXL_SCALE
    return SD_SCALE if config.conditioning.low_resolution is None else UPSCALER_SCALE


def _place_tower(
    parts: compvis.CompVisParts, config: Config, role: str, section: str, tensors: Tensors
) -> None:
    clip = is_clip_l(getattr(config.conditioning, section))
    if parts.clip if clip else parts.open_clip:
        raise ConfigError(
            "the compvis layout holds two text towers as SDXL does, ViT-L-14 and another one; these are "
            f"{config.conditioning.openclip and config.conditioning.openclip.model} and "
            f"{config.conditioning.openclip_second and config.conditioning.openclip_second.model}."
        )
    if clip:
        _require_quick_gelu(section, getattr(config.conditioning, section))
        parts.clip = convert_part(config, role, tensors, "diffusers")
    else:
        parts.open_clip = dict(tensors)


def _require_quick_gelu(name: str, tower: OpenCLIPConfig) -> None:
    from trainer.conditioning.open_clip_towers import architecture  # imports open_clip, which takes seconds

    if not architecture(tower).get("quick_gelu"):
        raise ConfigError(
            f"readers of the compvis layout compute its ViT-L-14 with QuickGELU, and conditioning.{name}"
            f".model={tower.model} has GELU; export in the native or the diffusers layout."
        )


def _is_unsaid(name: str, layout: Layout) -> bool:
    """Whether a layout has no place for this tensor."""
    if name.removeprefix("first_stage.") in (*STATISTICS, "logvar"):
        return name.endswith("logvar")  # statistics travel as scale factors
    if name.startswith("conditions."):
        return not (layout == "compvis" and name == CLASS_TOKENS)
    return False


def write_lora(
    adapters: Mapping[str, tuple[Tensor, Tensor]],
    destination: str,
    config: UNetConfig,
    dtype: torch.dtype = torch.float32,
) -> str:
    """Write the adapters as the file that diffusers' training scripts write; return its URL.

        pytorch_lora_weights.safetensors
            unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k.lora.down.weight  A [r, in]
            unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k.lora.up.weight    alpha / r B [out, r]

    Readers that are told no alpha take alpha = r, so its scale is a part of B. An adapter of a product of
    several projections becomes one for each of them, with the same A.

    Args:
        adapters: (A [r, in], B [out, r]) by our name of the weight that they adapt, "unet.*".
        destination: folder, or a .safetensors file; any URL.

    Raises:
        ConfigError: the destination is no such thing, or diffusers has no name for a layer.
    """
    if not destination.strip() or destination.endswith(TORCH_ENDINGS):
        raise ConfigError(
            f"the lora layout is a folder or a .safetensors file; name one in the place of {destination!r}."
        )
    url = destination if destination.endswith(".safetensors") else join(destination, LORA_FILE)
    inside = {name.removeprefix("unet."): both for name, both in adapters.items()}
    links = unet_links(config, inside, "diffusers")
    made = {name: value for link in links for name, value in _of_layer(link, *inside[link.ours]).items()}
    write_weights(url, {name: value.to(dtype) for name, value in made.items()}, {"format": "pt"})
    return url


def _of_layer(link: Link, down: Tensor, up: Tensor) -> dict[str, Tensor]:
    ones = (1,) * link.ones  # of a layer that is a 1x1 convolution there
    made = {}
    for theirs, rows in zip(link.theirs, up.chunk(len(link.theirs)), strict=True):
        layer = f"unet.{theirs.removesuffix('.weight')}.lora"
        made[f"{layer}.down.weight"] = down.reshape(down.shape + ones).clone()
        made[f"{layer}.up.weight"] = rows.reshape(rows.shape + ones).clone()
    return made
