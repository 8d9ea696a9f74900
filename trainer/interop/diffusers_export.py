"""A run's networks as a folder of diffusers: components, tokenizers, schedulers, and the pipeline that draws
what the run draws, or why none does."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

import torch
from torch import Tensor

from trainer.conditioning.tokenizers import SPECIAL_TOKENS, ClipTokenizer
from trainer.config.models import ConditioningConfig, OpenCLIPConfig
from trainer.config.network_plan import norm_groups
from trainer.config.run import Config, ConfigError
from trainer.diffusion.processes import at_size
from trainer.interop import diffusers
from trainer.interop.diffusers import Component
from trainer.interop.diffusers_stage import (
    first_stage_to_diffusers,
    noise_level_scheduler,
    scheduler_to_diffusers,
)
from trainer.interop.diffusers_unet import Json, unet_to_diffusers
from trainer.interop.parts import (
    PIXELS,
    TOWERS,
    UPSCALER_SCALE,
    Groups,
    cast,
    convert_part,
    is_one_number,
    latent_statistics,
    with_scale,
)
from trainer.interop.unet_names import UNetSizes

DIFFUSERS_VERSION = "0.30.0"
"""Whose files these are like; pipelines ask for it to mend those of older versions."""
CLIP_END, CLIP_START = 49407, 49406
"""CLIP's end-of-text and start-of-text tokens."""
START, END, PADDING = "<|startoftext|>", "<|endoftext|>", "<|padding|>"
"""Start and end as transformers writes them; padding with 0 has a name of its own, because that id is also
the exclamation mark's: as a special token "!" would be cut out of every text."""


@dataclass(frozen=True)
class Pipeline:
    """A pipeline's class and what its folder says beside its networks."""

    name: str
    needs: tuple[str, ...]
    """Networks without which it is not loaded, by folder."""
    towers: tuple[str, ...] = ()
    """Folders of text towers; each has a tokenizer beside it."""
    reads_penultimate: bool = False
    """It takes the last hidden state but one, so that towers must be whole."""
    scale_factor: float | None = None
    """The autoencoder's, where it must be this one."""
    settings: Json = field(default_factory=dict)
    """Of model_index.json."""


class NoPipeline(Exception):
    """No pipeline of diffusers draws this; the message says why."""


def write_diffusers(
    groups: Groups, url: str, config: Config, dtype: torch.dtype
) -> tuple[list[str], list[str]]:
    """What was written, and notes about it.

    Latent statistics per channel become a part of the autoencoder's weights, because pipelines ignore them.
    Where no pipeline of diffusers draws what the run draws, components are there without model_index.json.

    Raises:
        ConfigError: diffusers has no such network.
    """
    pipeline, notes = _pipeline(groups, config)
    components: dict[str, Component] = {}
    schedulers: dict[str, Json] = {}
    if "unet" in groups:
        components["unet"] = _unet(groups["unet"], config)
        edge = config.data.image_size
        process = at_size(config.diffusion, edge, edge)
        schedulers["scheduler"] = scheduler_to_diffusers(process, config.sampling.spacing)
    if "first_stage" in groups:
        quantised = config.first_stage.name == "vq" or (pipeline is not None and "vqvae" in pipeline.needs)
        required = None if pipeline is None else pipeline.scale_factor
        components["vqvae" if quantised else "vae"] = _first_stage(groups["first_stage"], config, required)
    tokenizers = {}
    for role, section in TOWERS.items():
        if role in groups:
            tower: OpenCLIPConfig = getattr(config.conditioning, section)
            converted = convert_part(config, role, groups[role], "diffusers")
            components[role] = Component(_text_config(tower, groups[role], dtype), converted)
            length = groups[role]["positional_embedding"].shape[0]
            tokenizers[role.replace("text_encoder", "tokenizer")] = tokenizer_files(length, tower.padding)
    if config.conditioning.low_resolution is not None and "unet" in groups:
        schedulers["low_res_scheduler"] = noise_level_scheduler(config.conditioning.low_resolution)
    for component in components.values():
        component.tensors = cast(component.tensors, dtype)
    index: Json | None = None
    if pipeline is not None:
        index = {"_class_name": pipeline.name, "_diffusers_version": DIFFUSERS_VERSION, **pipeline.settings}
    return diffusers.write_folder(url, components, schedulers, tokenizers, index), notes


def tokenizer_files(max_tokens: int, padding: Literal["zero", "end"]) -> dict[str, bytes]:
    """Contents by name of a CLIPTokenizer's folder: the ids are those of our ClipTokenizer.

    Except where that repairs text as open_clip does (broken encodings, HTML entities), which transformers
    leaves as it is.
    """
    ours = ClipTokenizer(max_tokens, padding)
    spelled = dict(zip(SPECIAL_TOKENS, (START, END), strict=True))
    vocabulary = {spelled.get(piece, piece): number for piece, number in ours.pieces.items()}
    pad = END
    if padding == "zero":
        vocabulary[PADDING], pad = 0, PADDING
    special = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": pad}
    settings: dict[str, Any] = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": max_tokens,
        "do_lower_case": True,
        "errors": "replace",
        "add_prefix_space": False,
        **special,
    }
    merges = "".join(f"{first} {second}\n" for first, second in ours.merges)
    return {
        "vocab.json": json.dumps(vocabulary, ensure_ascii=False).encode(),
        "merges.txt": f"#version: 0.2\n{merges}".encode(),
        "special_tokens_map.json": json.dumps(special, indent=2).encode(),
        "tokenizer_config.json": json.dumps(settings, indent=2).encode(),
    }


def _pipeline(groups: Groups, config: Config) -> tuple[Pipeline | None, list[str]]:
    if "unet" not in groups:
        return None, []  # components alone, whose owner has the rest
    require_vector_as_sdxl(config)
    try:
        pipeline = choose_pipeline(config)
        folders = {"vae": "first_stage", "vqvae": "first_stage"}
        absent = [name for name in pipeline.needs if folders.get(name, name) not in groups]
        if absent:
            raise NoPipeline(f"{pipeline.name} needs {', '.join(absent)}, which this export does not hold")
    except NoPipeline as reason:
        return None, [f"no pipeline: {reason}; each folder is loaded by itself"]
    return pipeline, [f"pipeline: {pipeline.name}"]


def _unet(tensors: Mapping[str, Tensor], config: Config) -> Component:
    cells = config.data.image_size // config.first_stage.downsampling
    described = unet_to_diffusers(config.unet, UNetSizes.of_ours(tensors), cells)
    if config.conditioning.image_size is not None:
        described["addition_time_embed_dim"] = config.conditioning.image_size.width
    return Component(described, convert_part(config, "unet", tensors, "diffusers"))


def _first_stage(tensors: Mapping[str, Tensor], config: Config, required: float | None) -> Component:
    """An autoencoder with one scale factor: the run's, or the one that the pipeline requires."""
    stage = config.first_stage
    shift, scale = latent_statistics(tensors, config)
    factor = scale[0] if is_one_number(shift, scale) else 1.0
    if required is not None:
        factor = required
    if stage.name == "kl":
        tensors = with_scale(tensors, shift, scale, factor)
    elif not is_one_number(shift, scale):
        raise ConfigError("diffusers' VQModel has one scaling_factor and no per-channel latent statistics.")
    same = [factor] * stage.latent_channels
    none = [0.0] * stage.latent_channels
    described = first_stage_to_diffusers(stage, none, same, config.data.image_size, norm_groups(stage))
    return Component(described, convert_part(config, "first_stage", tensors, "diffusers"))


def _text_config(config: OpenCLIPConfig, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Json:
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
        "torch_dtype": str(dtype).removeprefix("torch."),
    }


def choose_pipeline(config: Config) -> Pipeline:
    """The pipeline that computes what `ldm sample` computes.

    Raises:
        NoPipeline: none does; the sentence names the setting.
    """
    if config.diffusion.process == "flow":  # no flow scheduler has scale_model_input, which all of them call
        raise NoPipeline("no pipeline of diffusers with these networks draws by diffusion.process=flow")
    if config.first_stage.input_range != PIXELS:
        raise NoPipeline(
            f"diffusers' pixels lie in {PIXELS}, not first_stage.input_range={config.first_stage.input_range}"
        )
    given = _conditions(config.conditioning)
    stage = config.first_stage.name
    if not given:
        if config.unet.attention != "plain":
            raise NoPipeline("diffusers draws without conditions with unet.attention=plain alone")
        if stage == "identity" and config.diffusion.process != "discrete":
            raise NoPipeline(
                f"DDIMPipeline draws by DDIM, not by diffusion.process={config.diffusion.process}"
            )
        if stage == "identity":
            return Pipeline("DDIMPipeline", ("unet",))
        return Pipeline("LDMPipeline", ("unet", "vqvae"))
    pipeline = _TEXT.get(given)
    if pipeline is None:
        raise NoPipeline(f"no pipeline of diffusers is told {', '.join(sorted(given))} and nothing else")
    for obstacle in _obstacles(config, pipeline):
        raise NoPipeline(f"{pipeline.name} differs from this run: {obstacle}")
    return _with_settings(pipeline, config)


def require_vector_as_sdxl(config: Config) -> None:
    """Refuse a vector condition that diffusers' UNet cannot take: it always joins pooled text and six sizes.

    Raises:
        ConfigError: pooled text or sizes stand alone.
    """
    conditioning = config.conditioning
    pooled = [name for name in ("openclip", "openclip_second") if _pooled(getattr(conditioning, name))]
    if bool(pooled) != (conditioning.image_size is not None):
        alone = f"conditioning.{pooled[0]}.pooled" if pooled else "conditioning.image_size"
        raise ConfigError(
            f"diffusers' UNet takes pooled text and picture sizes together, as SDXL does, and this run has "
            f"{alone} alone, with which nothing there could draw; use --layout native or compvis."
        )


_STABLE = {
    "requires_safety_checker": False,
    "safety_checker": [None, None],
    "feature_extractor": [None, None],
}
_SD = ("unet", "vae", "text_encoder")
_TEXT = {
    frozenset({"openclip"}): Pipeline(
        "StableDiffusionPipeline", _SD, ("text_encoder",), settings={**_STABLE, "image_encoder": [None, None]}
    ),
    frozenset({"openclip", "masked_image"}): Pipeline(
        "StableDiffusionInpaintPipeline",
        _SD,
        ("text_encoder",),
        settings={**_STABLE, "image_encoder": [None, None]},
    ),
    frozenset({"openclip", "low_resolution"}): Pipeline(
        "StableDiffusionUpscalePipeline", _SD, ("text_encoder",), scale_factor=UPSCALER_SCALE
    ),
    frozenset({"openclip", "openclip_second", "image_size"}): Pipeline(
        "StableDiffusionXLPipeline",
        (*_SD, "text_encoder_2"),
        ("text_encoder", "text_encoder_2"),
        reads_penultimate=True,
    ),
}
"""By the conditions of a run, the pipeline that is told the same."""


def _conditions(config: ConditioningConfig) -> frozenset[str]:
    names = (f.name for f in fields(config) if f.name != "drop_all_probability")
    return frozenset(name for name in names if getattr(config, name) is not None)


def _obstacles(config: Config, pipeline: Pipeline) -> Iterator[str]:
    """Settings with which the pipeline would draw something else, in words."""
    conditioning, stage = config.conditioning, config.first_stage
    if stage.name != "kl":
        yield f"it decodes with an AutoencoderKL, not first_stage.name={stage.name}"
    towers = {
        name: tower
        for name in ("openclip", "openclip_second")
        for tower in [getattr(conditioning, name)]
        if tower is not None
    }
    for name, tower in towers.items():
        yield from (f"conditioning.{name}: {words}" for words in _tower_obstacles(tower, pipeline))
    if len({tower.null for tower in towers.values()}) > 1:
        yield "the null forms of the two text towers differ"
    if pipeline.reads_penultimate and (towers["openclip"].pooled or not towers["openclip_second"].pooled):
        yield "the second text tower alone is pooled there"
    masked, low = conditioning.masked_image, conditioning.low_resolution
    if masked is not None and masked.mask_channels != 1:
        yield f"its mask has one channel, not conditioning.masked_image.mask_channels={masked.mask_channels}"
    if masked is not None and masked.form != "sd":
        yield "its hidden pixels are grey and its mask is 0 or 1, not conditioning.masked_image.form=ldm"
    if low is not None and not low.max_noise_level:
        yield "it says the noise level of the low-resolution picture, which max_noise_level=0 leaves out"
    for name in ("masked_image", "low_resolution", "image_size"):
        section = getattr(conditioning, name)
        if section is not None and section.drop_probability:
            yield f"its guidance keeps what conditioning.{name}.drop_probability has taught to leave out"


def _tower_obstacles(tower: OpenCLIPConfig, pipeline: Pipeline) -> Iterator[str]:
    if pipeline.reads_penultimate:
        if tower.layer != "penultimate" or tower.final_norm:
            yield "it reads layer=penultimate with final_norm=false"
        return
    if tower.layer == "penultimate" and not tower.final_norm:
        yield "it applies the final norm, which final_norm=false leaves out"
    if tower.null != "empty":
        yield f"its unconditional branch is the empty prompt, not null={tower.null}"


def _with_settings(pipeline: Pipeline, config: Config) -> Pipeline:
    settings = dict(pipeline.settings)
    conditioning = config.conditioning
    if pipeline.reads_penultimate:
        assert conditioning.openclip is not None
        settings["force_zeros_for_empty_prompt"] = conditioning.openclip.null == "zeros"
    if conditioning.low_resolution is not None:
        settings["max_noise_level"] = conditioning.low_resolution.max_noise_level
    return replace(pipeline, settings=settings)


def _pooled(tower: OpenCLIPConfig | None) -> bool:
    return tower is not None and tower.pooled
