"""Weights of other programs into ours (`ldm import`)."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

import torch
import yaml
from torch import Tensor

from data_pipeline.storage.files import write_bytes
from trainer.conditioning.transformer import TextTransformer
from trainer.config.io import config_to_dict
from trainer.config.models import FirstStageConfig, UNetConfig
from trainer.config.network_plan import norm_groups, plan_levels
from trainer.config.run import Config, ConfigError
from trainer.first_stage.build import WEIGHTS_FILE, build_first_stage, first_stage_metadata
from trainer.first_stage.statistics import GIVEN, MARK
from trainer.interop import compvis
from trainer.interop.diffusers_stage import SCALES, first_stage_from_diffusers, process_from_diffusers
from trainer.interop.diffusers_unet import unet_from_diffusers
from trainer.interop.first_stage_names import STATISTICS, first_stage_links, usual_attention
from trainer.interop.initialise import INPUT
from trainer.interop.links import Link, TransferReport, import_tensors
from trainer.interop.parts import TOWERS, is_one_number, is_same_scale
from trainer.interop.source import ForeignNetwork, ForeignWeights, open_source
from trainer.interop.text_tower_names import (
    OUTPUT_HEAD,
    open_clip_names,
    text_tower_links,
    text_transformer_links,
)
from trainer.interop.unet_names import UNetSizes, unet_links
from trainer.weights import write_weights

UNET_FILE = "unet.safetensors"
STRUCTURE_FILE = "structure.yaml"
"""Sections unet and first_stage of a configuration."""
STRUCTURE_SECTIONS = ("unet", "first_stage")
UNET_AVERAGE_FILE = "unet_ema.safetensors"
TEXT_FILES = {"text_encoder": "text_encoder.safetensors", "text_encoder_2": "text_encoder_2.safetensors"}
CLASS_TOKENS = "conditions.parts.class_label.embedding.weight"
"""Where the trained network keeps the class embedding of the LDM class-conditional models."""

TEXT_TRANSFORMER = "conditions.parts.text_transformer."
"""The same of the text model of LDM's text-to-image model."""
Imported = tuple[dict[str, Tensor], dict[str, str]]
"""Tensors and metadata of one file."""


def import_weights(source_url: str, destination_url: str, config: Config | None) -> TransferReport:
    """Convert every network of the source that we know, then write one file per network.

    The folder gets unet.safetensors (and unet_ema.safetensors) for `init_from` and sampling,
    first_stage.safetensors for `first_stage.weights`, and text_encoder.safetensors (and
    text_encoder_2.safetensors) for `conditioning.openclip.pretrained`; structure.yaml says the unet and
    first_stage sections of a configuration for them.

    Args:
        source_url: .safetensors or .ckpt file in the original layout, a lone network's file, or a folder
            that diffusers saved; any URL.
        destination_url: folder to write.
        config: structure of the networks; None takes it from the config.json files of diffusers.

    Raises:
        ConfigError: unreadable, unknown, or of another structure; nothing is written then.
    """
    source = open_source(source_url)
    conditions = _conditions(source, config)
    files: dict[str, Imported] = {}
    unet = source.parts.get("unet")
    if unet is not None:
        unet_config = _unet_config(unet, config, source.url)
        if config is not None and source.scheduler is not None:
            for name, theirs in process_from_diffusers(source.scheduler).items():
                ours = getattr(config.diffusion, name)
                _require_same(f"diffusion.{name}", ours, theirs, f"the UNet of {source.url}")
        files[UNET_FILE] = _unet(unet, unet_config, source, config, conditions)
        if "unet_ema" in source.parts:
            average = source.parts["unet_ema"]
            files[UNET_AVERAGE_FILE] = _unet(average, unet_config, source, config, conditions)
    if "first_stage" in source.parts:
        files[WEIGHTS_FILE] = _first_stage(source.parts["first_stage"], config, source)
    for role, file in TEXT_FILES.items():
        if role in source.parts:
            _require_activation(source.parts[role], config, role, source.url)
            files[file] = _text_tower(source.parts[role], f"{role} of {source.url}")
    if not files:
        raise ConfigError(f"{source.url} holds no network that is recognised; nothing was taken from it.")
    files = {file: (_at_most_single(tensors), metadata) for file, (tensors, metadata) in files.items()}
    for tensors, _ in files.values():
        _check_values(tensors, source.url)
    folder = destination_url.rstrip("/")
    if config is not None:
        _describe_run(files, config, folder)
    for file, (tensors, metadata) in files.items():
        write_weights(f"{folder}/{file}", tensors, metadata)
    _write_structure(f"{folder}/{STRUCTURE_FILE}", files)
    taken = [
        f"{file.removesuffix('.safetensors')}: {name}" for file, made in files.items() for name in made[0]
    ]
    written = [f"{folder}/{file}" for file in (*files, STRUCTURE_FILE)]
    notes = () if config is None or unet is None else _notes(unet, config)
    return TransferReport(taken=tuple(taken), left=tuple(source.left), files=tuple(written), notes=notes)


def _at_most_single(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Double precision as float32, in which everything here computes; other types as they are."""
    return {n: t.float() if t.dtype == torch.float64 else t for n, t in tensors.items()}


def _check_values(tensors: Mapping[str, Tensor], url: str) -> None:
    """Raise ConfigError for tensors that no trained network has: they would be taken for weights."""
    for name, tensor in tensors.items():
        if not tensor.dtype.is_floating_point:
            kind = str(tensor.dtype).removeprefix("torch.")
            raise ConfigError(
                f"{url} has {kind} where weights belong (our {name}): quantised, or no weights; take the "
                "file in half or single precision."
            )
        whole = tensor.float() if tensor.element_size() < 2 else tensor  # torch cannot ask those of 8 bits
        if not bool(whole.isfinite().all()):
            raise ConfigError(
                f"{url} has NaN or infinity in its weights (our {name}), so what they compute is none; take "
                "another checkpoint, or the file in a wider precision."
            )


def convert_unet(part: ForeignNetwork, config: UNetConfig, origin: str) -> dict[str, Tensor]:
    """A UNet's tensors under our names (no prefix), strictly."""
    theirs = part.tensors
    if config.attention == "plain" and part.dialect == "diffusers":
        theirs = usual_attention(theirs, part.dialect)
    try:
        expected = UNetSizes.of(part.dialect, theirs).build(config).state_dict()
    except ConfigError as error:
        raise ConfigError(f"{origin}: {error}") from error
    return import_tensors(unet_links(config, expected, part.dialect), expected, theirs, origin)


def convert_first_stage(part: ForeignNetwork, config: FirstStageConfig, origin: str) -> dict[str, Tensor]:
    """A first stage's tensors under our names, strictly; without latent statistics."""
    with torch.device("meta"):
        expected = build_first_stage(config).state_dict()
    links = first_stage_links(config, expected, part.dialect)
    return import_tensors(links, expected, usual_attention(part.tensors, part.dialect), origin)


def _describe_run(files: Mapping[str, Imported], config: Config, folder: str) -> None:
    """Let the UNet's files carry the configuration, with the imported networks named, for `ldm sample`."""
    if WEIGHTS_FILE in files:
        stage = dataclasses.replace(config.first_stage, weights=f"{folder}/{WEIGHTS_FILE}")
        config = dataclasses.replace(config, first_stage=stage)
    conditioning = config.conditioning
    if conditioning.openclip is not None and TEXT_FILES["text_encoder"] in files:
        weights = f"{folder}/{TEXT_FILES['text_encoder']}"
        tower = dataclasses.replace(conditioning.openclip, pretrained=weights)
        conditioning = dataclasses.replace(conditioning, openclip=tower)
    if conditioning.openclip_second is not None and TEXT_FILES["text_encoder_2"] in files:
        weights = f"{folder}/{TEXT_FILES['text_encoder_2']}"
        tower = dataclasses.replace(conditioning.openclip_second, pretrained=weights)
        conditioning = dataclasses.replace(conditioning, openclip_second=tower)
    described = json.dumps(config_to_dict(dataclasses.replace(config, conditioning=conditioning)))
    for file in (UNET_FILE, UNET_AVERAGE_FILE):
        if file in files:
            files[file][1]["config"] = described


def _write_structure(url: str, files: Mapping[str, Imported]) -> None:
    """The configuration sections that fit the imported networks."""
    sections: dict[str, Any] = {}
    for _, metadata in files.values():
        sections |= {name: json.loads(text) for name, text in metadata.items() if name in STRUCTURE_SECTIONS}
    write_bytes(url, yaml.safe_dump(sections, sort_keys=False).encode())


def _unet(
    part: ForeignNetwork,
    config: UNetConfig,
    source: ForeignWeights,
    run: Config | None,
    conditions: dict[str, Tensor],
) -> Imported:
    converted = convert_unet(part, config, f"the UNet of {source.url}")
    order = compvis.input_order(run) if run is not None and part.dialect == "compvis" else None
    if order is not None:
        ours = torch.empty_like(converted[INPUT])
        ours[:, order] = converted[INPUT]
        converted[INPUT] = ours
    tensors = {f"unet.{name}": tensor for name, tensor in converted.items()}
    return tensors | conditions, {"unet": json.dumps(dataclasses.asdict(config))}


def _conditions(source: ForeignWeights, config: Config | None) -> dict[str, Tensor]:
    """What is trained beside the UNet, under our names; what the configuration has no place for is left.

    LDM's layout models read boxes with such a text model, too: the configuration says which it is.
    """
    found = {} if source.class_embedding is None else {CLASS_TOKENS: source.class_embedding}
    section = None if config is None else config.conditioning.text_transformer
    theirs = {} if section is None else dict(source.text_transformer)
    unused = [name for name in source.text_transformer if name in OUTPUT_HEAD or name not in theirs]
    source.left += [f"{compvis.CLIP[0]}{name}" for name in unused]
    if config is None or section is None or not theirs:
        return found
    with torch.device("meta"):
        expected = TextTransformer(section, config.first_stage, 0).trained.state_dict()
    links = text_transformer_links(expected)
    theirs = {name: tensor for name, tensor in theirs.items() if name not in OUTPUT_HEAD}
    ours = import_tensors(links, expected, theirs, f"the text transformer of {source.url}")
    return found | {f"{TEXT_TRANSFORMER}{name}": tensor for name, tensor in ours.items()}


def _first_stage(part: ForeignNetwork, config: Config | None, source: ForeignWeights) -> Imported:
    described = None if part.config is None else first_stage_from_diffusers(part.config)
    if config is not None:
        structure = config.first_stage
    elif described is not None:
        structure = described[0]
    else:
        raise ConfigError(f"{source.url} does not describe its first stage; name a configuration that does.")
    origin = f"the first stage of {source.url}"
    if described is not None:
        _require_same("first_stage.num_groups", norm_groups(structure), norm_groups(described[0]), origin)
    tensors = convert_first_stage(part, structure, origin)
    statistics = described[1:] if described is not None else None
    if source.latent_scale is not None:
        statistics = _one_scale(structure, source.latent_scale)
    if structure.latent_scale is not None:
        if source.latent_scale is not None or any(name in (part.config or {}) for name in SCALES):
            assert statistics is not None
            _require_scale(structure.latent_scale, *statistics, origin)
        statistics = _one_scale(structure, structure.latent_scale)
    metadata = first_stage_metadata(structure)
    if statistics is not None:
        tensors |= {name: torch.tensor(values) for name, values in zip(STATISTICS, statistics, strict=True)}
        metadata[MARK] = GIVEN
    return tensors, metadata


def _one_scale(config: FirstStageConfig, scale: float) -> tuple[list[float], list[float]]:
    return [0.0] * config.latent_channels, [scale] * config.latent_channels


def _require_scale(given: float, shift: list[float], scale: list[float], origin: str) -> None:
    """Raise ConfigError where the configuration would scale latents otherwise than the source."""
    if not is_one_number(shift, scale):
        raise ConfigError(
            f"{origin} has latent statistics per channel, which first_stage.latent_scale={given:g} would "
            "replace; set first_stage.latent_scale=null."
        )
    if not is_same_scale(given, scale[0]):
        _require_same("first_stage.latent_scale", given, scale[0], origin)


def _require_same(setting: str, ours: Any, theirs: Any, origin: str) -> None:
    """Raise ConfigError where weights were made for another value of a setting, which no shape shows."""
    if ours != theirs:
        told, wanted = (f"{v:g}" if isinstance(v, float) else str(v).lower() for v in (ours, theirs))
        raise ConfigError(
            f"{origin} was made for {wanted} and the configuration says {setting}={told}; set "
            f"{setting}={wanted}."
        )


def _require_activation(part: ForeignNetwork, config: Config | None, role: str, url: str) -> None:
    """Raise ConfigError where the source says another activation than the configured tower has."""
    tower = None if config is None else getattr(config.conditioning, TOWERS[role])
    if part.config is None or tower is None:
        return
    from trainer.conditioning.open_clip_towers import QUICK, architecture  # imports open_clip: seconds

    theirs = part.config.get("hidden_act", "quick_gelu")  # as transformers takes an absent one
    if theirs != ("quick_gelu" if architecture(tower).get("quick_gelu") else "gelu"):
        plain = tower.model.removesuffix(QUICK)
        model = f"{plain}{QUICK}" if theirs == "quick_gelu" else plain
        raise ConfigError(
            f"{role} of {url} computes with hidden_act={theirs} and conditioning.{TOWERS[role]}.model="
            f"{tower.model} does not; set it to a model that does, such as {model}."
        )


def _text_tower(part: ForeignNetwork, origin: str) -> Imported:
    if part.dialect == "compvis":
        return dict(part.tensors), {}
    names = open_clip_names(part.tensors)
    links = text_tower_links(names)
    expected = {link.ours: _as_ours(link, part, origin) for link in links}
    return import_tensors(links, expected, part.tensors, origin), {}


def _as_ours(link: Link, part: ForeignNetwork, origin: str) -> Tensor:
    missing = [name for name in link.theirs if name not in part.tensors]
    if missing:
        raise ConfigError(f"{origin} lacks {', '.join(missing)}; nothing was loaded.")
    return link.to_ours({name: part.tensors[name].to("meta") for name in link.theirs})


def _notes(unet: ForeignNetwork, config: Config) -> tuple[str, ...]:
    masked = config.conditioning.masked_image
    if masked is None or unet.dialect != "compvis" or config.unet.attention != "plain":
        return ()
    if masked.form == "ldm":
        return ("input channels were ordered from LDM's latents, masked picture, mask",)
    return (
        "input channels are taken as latents, mask, masked picture; LDM's own inpainting model needs "
        "conditioning.masked_image.form=ldm",
    )


def _unet_config(part: ForeignNetwork, config: Config | None, url: str) -> UNetConfig:
    """The configured structure, checked against the source's own description where it has one."""
    described = None if part.config is None else unet_from_diffusers(part.config).config
    if config is None:
        if described is None:
            raise ConfigError(f"{url} does not describe its UNet; name a configuration that does.")
        return described
    if described is not None:
        ours = [(level.channels, level.heads) for level in plan_levels(config.unet) if level.attention]
        theirs = [(level.channels, level.heads) for level in plan_levels(described) if level.attention]
        if ours != theirs:
            raise ConfigError(
                f"the UNet of {url} has (channels, heads) {theirs} where it attends and the configuration "
                f"says {ours}; set unet.num_heads or unet.head_dim accordingly."
            )
        groups, inside = config.unet.num_groups, config.unet.res_block_groups
        _require_same("unet.num_groups", groups, described.num_groups, f"the UNet of {url}")
        if inside is not None:
            _require_same("unet.res_block_groups", inside, described.num_groups, f"the UNet of {url}")
    return config.unet
