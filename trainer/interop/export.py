"""Our weights in the layouts of other programs (`ldm export`)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, Literal

import torch
from torch import Tensor

from trainer.config.models import OpenCLIPConfig
from trainer.config.network_plan import norm_groups
from trainer.config.run import Config, ConfigError
from trainer.diffusion.processes import at_size
from trainer.diffusion.schedule import make_schedule
from trainer.first_stage.build import WEIGHTS_FILE, first_stage_metadata
from trainer.interop import compvis, diffusers
from trainer.interop.convert import CLASS_TOKENS, TEXT_FILES, UNET_AVERAGE_FILE, UNET_FILE
from trainer.interop.diffusers import Component
from trainer.interop.diffusers_stage import first_stage_to_diffusers, scheduler_to_diffusers
from trainer.interop.diffusers_unet import Json, unet_to_diffusers
from trainer.interop.first_stage_names import STATISTICS, first_stage_links
from trainer.interop.links import export_tensors
from trainer.interop.report import TransferReport
from trainer.interop.text_tower_names import text_tower_links
from trainer.interop.unet_names import Dialect, UNetSizes, unet_links
from trainer.weights import write_weights

Layout = Literal["native", "compvis", "diffusers"]
Tensors = Mapping[str, Tensor]

TOWERS = {"text_encoder": "openclip", "text_encoder_2": "openclip_second"}
"""Prefix of a text tower's tensors -> its section of ConditioningConfig."""
CLIP_END, CLIP_START = 49407, 49406
"""CLIP's end-of-text and start-of-text tokens."""


def export_weights(
    tensors: Tensors, destination_url: str, config: Config, layout: Layout, average: Tensors | None = None
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

    Raises:
        ConfigError: the layout cannot express this structure, or nothing is given to export.
    """
    groups = _by_prefix(tensors)
    averaged = _by_prefix(average or {}).get("unet", {})
    if not groups:
        raise ConfigError("there are no weights to export.")
    match layout:
        case "native":
            files = _write_native(groups, averaged, destination_url.rstrip("/"), config)
        case "compvis":
            files = _write_compvis(groups, averaged, destination_url, config)
        case "diffusers":
            files = _write_diffusers(groups, averaged, destination_url.rstrip("/"), config)
    unsaid = () if layout == "native" else tuple(n for n in tensors if _is_unsaid(n, layout))
    return TransferReport(taken=tuple(n for n in tensors if n not in unsaid), left=unsaid, files=tuple(files))


def convert_part(config: Config, role: str, tensors: Tensors, dialect: Dialect) -> dict[str, Tensor]:
    """One network's tensors (names without a prefix) in a dialect."""
    if role == "unet":
        return export_tensors(unet_links(config.unet, tensors, dialect), tensors)
    if role == "first_stage":
        return export_tensors(first_stage_links(config.first_stage, tensors, dialect), tensors)
    if dialect == "compvis":
        return dict(tensors)
    return export_tensors(text_tower_links(tensors), tensors)


def _write_native(
    groups: dict[str, dict[str, Tensor]], averaged: Tensors, url: str, config: Config
) -> list[str]:
    metadata = {"unet": json.dumps(asdict(config.unet))}
    conditions = {f"conditions.{name}": tensor for name, tensor in groups.get("conditions", {}).items()}
    files: dict[str, tuple[dict[str, Tensor], dict[str, str]]] = {}
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
    groups: dict[str, dict[str, Tensor]], averaged: Tensors, url: str, config: Config
) -> list[str]:
    if not url.endswith(".safetensors"):
        raise ConfigError(f"the compvis layout is one file; let the destination {url} end in .safetensors.")
    parts = compvis.CompVisParts()
    if "unet" in groups:
        if config.diffusion.process != "discrete":
            raise ConfigError(
                "the compvis layout holds the levels of a beta schedule, which diffusion.process="
                f"{config.diffusion.process} does not have; export in the native or the diffusers layout."
            )
        parts.unet = convert_part(config, "unet", groups["unet"], "compvis")
        parts.unet_average = convert_part(config, "unet", averaged, "compvis") if averaged else {}
        schedule = make_schedule(config.diffusion)
        parts.schedule = compvis.schedule_tensors(schedule.betas, schedule.alphas_cumprod)
    if "first_stage" in groups:
        parts.first_stage = convert_part(config, "first_stage", groups["first_stage"], "compvis")
        shift, scale = _statistics(groups["first_stage"], config)
        if any(shift) or len(set(scale)) > 1:
            raise ConfigError(
                "the compvis layout has one scale factor; this first stage has statistics per channel."
            )
        parts.scale_factor = torch.tensor(scale[0])
    for role, section in TOWERS.items():
        tower = getattr(config.conditioning, section)
        if role in groups and _is_clip(tower):
            parts.clip = convert_part(config, role, groups[role], "diffusers")
        elif role in groups:
            parts.open_clip = groups[role]
    parts.class_embedding = groups.get("conditions", {}).get(CLASS_TOKENS.removeprefix("conditions."))
    write_weights(url, compvis.join(parts), {"format": "pt"})
    return [url]


def _write_diffusers(
    groups: dict[str, dict[str, Tensor]], averaged: Tensors, url: str, config: Config
) -> list[str]:
    components: dict[str, Component] = {}
    scheduler: Json | None = None
    cells = config.data.image_size // config.first_stage.downsampling
    if "unet" in groups:
        weights = averaged or groups["unet"]
        json_config = unet_to_diffusers(config.unet, UNetSizes.of_ours(weights), cells)
        components["unet"] = Component(json_config, convert_part(config, "unet", weights, "diffusers"))
        edge = config.data.image_size
        scheduler = scheduler_to_diffusers(at_size(config.diffusion, edge, edge))
    if "first_stage" in groups:
        stage = config.first_stage
        shift, scale = _statistics(groups["first_stage"], config)
        described = first_stage_to_diffusers(stage, shift, scale, config.data.image_size, norm_groups(stage))
        converted = convert_part(config, "first_stage", groups["first_stage"], "diffusers")
        components["vqvae" if stage.name == "vq" else "vae"] = Component(described, converted)
    for role, section in TOWERS.items():
        if role in groups:
            tower: OpenCLIPConfig = getattr(config.conditioning, section)
            names = convert_part(config, role, groups[role], "diffusers")
            components[role] = Component(_text_config(tower, groups[role]), names)
    diffusers.write_folder(url, components, scheduler, _pipeline(config))
    return [f"{url}/{name}" for name in (*components, "model_index.json")]


def _text_config(config: OpenCLIPConfig, tensors: Tensors) -> Json:
    """config.json of the CLIPTextModel with these weights."""
    from trainer.conditioning.open_clip_towers import architecture  # imports open_clip, which takes seconds

    model = architecture(config)
    text: dict[str, Any] = model["text_cfg"]
    vocabulary, width = tensors["token_embedding.weight"].shape
    projected = "text_projection" in tensors
    return {
        "architectures": ["CLIPTextModelWithProjection" if projected else "CLIPTextModel"],
        "model_type": "clip_text_model",
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": tensors["transformer.resblocks.0.mlp.c_fc.weight"].shape[0],
        "num_hidden_layers": sum(name.endswith(".attn.in_proj_bias") for name in tensors),
        "num_attention_heads": text["heads"],
        "max_position_embeddings": tensors["positional_embedding"].shape[0],
        "hidden_act": "quick_gelu" if model.get("quick_gelu") else "gelu",
        "projection_dim": tensors["text_projection"].shape[1] if projected else width,
        "layer_norm_eps": 1e-5,
        "bos_token_id": CLIP_START,
        "eos_token_id": CLIP_END,
        "pad_token_id": 0 if config.padding == "zero" else CLIP_END,
        "torch_dtype": "float32",
    }


def _pipeline(config: Config) -> str:
    """The pipeline class of diffusers for this task."""
    conditioning = config.conditioning
    if config.diffusion.process == "flow":
        return "DiffusionPipeline"  # those below ask for scale_model_input, which no flow scheduler has
    if conditioning.openclip_second is not None:
        return "StableDiffusionXLPipeline"
    if conditioning.masked_image is not None:
        return "StableDiffusionInpaintPipeline"
    if conditioning.low_resolution is not None:
        return "StableDiffusionUpscalePipeline"
    if conditioning.depth is not None:
        return "StableDiffusionDepth2ImgPipeline"
    if conditioning.openclip is not None:
        return "StableDiffusionPipeline"
    return "LDMPipeline" if config.unet.attention == "plain" else "DiffusionPipeline"


def _statistics(tensors: Tensors, config: Config) -> tuple[list[float], list[float]]:
    """Latent shift and scale per channel: those configured, else those stored with the weights."""
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


def _is_clip(tower: OpenCLIPConfig | None) -> bool:
    """Whether the original layout stores this tower in the names of transformers (SD1, SDXL's first)."""
    return tower is not None and tower.model.startswith("ViT-L-14")


def _is_unsaid(name: str, layout: Layout) -> bool:
    """Whether a layout has no place for this tensor."""
    if name.removeprefix("first_stage.") in (*STATISTICS, "logvar"):
        return name.endswith("logvar")  # statistics travel as scale factors
    if name.startswith("conditions."):
        return not (layout == "compvis" and name == CLASS_TOKENS)
    return False


def _by_prefix(tensors: Tensors) -> dict[str, dict[str, Tensor]]:
    """Tensors grouped by the first part of their name.

    Raises:
        ConfigError: a name begins with none of the known parts.
    """
    groups: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        prefix, _, rest = name.partition(".")
        if prefix not in ("unet", "conditions", "first_stage", *TOWERS):
            raise ConfigError(f"the tensor {name} belongs to no network that can be exported.")
        groups.setdefault(prefix, {})[rest] = tensor
    return groups
