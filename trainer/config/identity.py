"""What makes a run the run that it is: the settings that say what is learned, compared when it resumes.

Compared are those that change what the loss is an estimate of: the stage, its networks, its objective, its
conditions with the probabilities of leaving them out, and which pictures and texts it is an average over.
Free are those that say how far, how fast and where: steps, rates, batch, averages, ranks, precision. (The
position in the data refuses another seed.) Whatever differs from the start before is recorded (`changes`).
A new field of a compared section is compared, unless it is named as free here.
"""

from __future__ import annotations

import dataclasses
import math
import typing
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

import yaml

from data_pipeline.errors import NotFound
from data_pipeline.storage.files import read_bytes
from data_pipeline.storage.urls import join, without_secrets
from trainer.config.io import config_to_dict, section_of
from trainer.config.models import RANDOM, TOWERS, FirstStageConfig
from trainer.config.network_plan import norm_groups
from trainer.config.ranges import types_of
from trainer.config.run import Config, ConfigError
from trainer.config.training import LoRAConfig

_Flat = dict[str, Any]
"""Values by dotted key; a section that may be absent is itself a key, with `_THERE` or null."""

_THERE = "there"
_SECTIONS = {
    "diffusion": ("unet", "first_stage", "conditioning", "diffusion"),
    "autoencoder": ("first_stage", "autoencoder_loss"),
}
"""By stage: the sections that define it. The others of these do nothing there."""
_FREE = (
    "unet.activation_checkpointing",  # memory against time, the same numbers
    "first_stage.encode_chunk",
    "first_stage.tile_pixels",
    "first_stage.cache",  # what is kept is what would be computed
    "first_stage.cache_bytes",
    "first_stage.cache_dtype",  # precision
    "diffusion.timesteps",  # changes the variance of the loss, not its mean
    "diffusion.sigma_min",  # where a sampler ends and begins
    "diffusion.sigma_max",
    "autoencoder_loss.latent_statistics",  # measured again before they are stored
)
_DATA = (
    *("picture", "image_size", "crop", "allow_enlarging", "horizontal_flip", "buckets", "filter"),
    "require_caption",
)
"""Where shards lie, and what is removed from them, may change: an opt-out needs no permission. What is held
out by data.validation.share may not: it would measure samples that were trained on, or train on the others.
data.conditions and data.max_layout_boxes follow from `conditioning`."""
_OF_A_SOURCE = (
    "weight",
    *("filter", "captions", "caption_weights", "crop", "horizontal_flip", "conditions"),
)
"""What a source has of its own, besides its shards."""
_SOURCES = "data.sources"

SETTINGS = "config.yaml"
"""In a run's folder, written by each start."""
_MOST_SHOWN = 300
"""Characters of a value in a record of what changed."""
_PERCEPTUAL = "autoencoder_loss.perceptual_weights"


@dataclasses.dataclass(frozen=True)
class Difference:
    """One setting that is not what it was."""

    key: str
    """Dotted."""
    was: Any
    now: Any

    def __str__(self) -> str:
        return f"{self.key} was {_shown(self.was)}, is {_shown(self.now)}"


def differences(stored: Mapping[str, Any], now: Mapping[str, Any]) -> tuple[Difference, ...]:
    """In which settings that define a run two configurations differ, as `config_to_dict` writes them.

    A key that the stored one lacks, because it is older, has its default; one that is unknown by now is
    ignored. Different ways of writing the same (one depth for all levels) are equal, and so are settings
    that do nothing on one of the sides (those of buckets without buckets).
    """
    old, new = _defining(_completed(Config, stored)), _defining(_completed(Config, now))
    if old["stage"] != new["stage"]:
        return (Difference("stage", old["stage"], new["stage"]),)  # nothing else can be compared
    if old.get(_PERCEPTUAL) is None or new.get(_PERCEPTUAL) is None:
        new.pop(_PERCEPTUAL, None)  # null is what the machine's cache held, random features before the word
    return tuple(Difference(key, old[key], new[key]) for key in new if key in old and old[key] != new[key])


def changes(stored: Mapping[str, Any], now: Mapping[str, Any]) -> tuple[Difference, ...]:
    """Every setting that two configurations differ in, whatever it is for, with its values in words.

    None stands for a setting that is not there on that side, such as one of a section that is null. A key
    that the stored one lacks has its default, as in `differences`. What URLs carry to be let in is left out,
    and no change.
    """
    old, new = (dict(_leaves(_completed(Config, each))) for each in (stored, now))
    keys = [key for key in dict.fromkeys((*new, *old)) if old.get(key) != new.get(key)]
    return tuple(Difference(key, _cut(old.get(key)), _cut(new.get(key))) for key in keys)


def stored_settings(run_dir: str) -> dict[str, Any] | None:
    """The configuration as the newest start wrote it, of whatever version; None where none can be read."""
    try:
        found = yaml.safe_load(read_bytes(join(run_dir, SETTINGS)))
    except (NotFound, yaml.YAMLError):
        return None
    return found if isinstance(found, dict) else None


def as_trained(config: Config) -> Config:
    """The configuration that a checkpoint stores, in today's words: a tower without weights was random."""
    towers = {name: getattr(config.conditioning, name) for name in TOWERS}
    random = {
        name: dataclasses.replace(tower, pretrained=RANDOM)
        for name, tower in towers.items()
        if tower is not None and tower.pretrained is None
    }
    return dataclasses.replace(config, conditioning=dataclasses.replace(config.conditioning, **random))


def check_optimizer_state(stored: Mapping[str, Any], config: Config, checkpoint: str) -> None:
    """Raise ConfigError where a run resumes with what its optimizer state is not for: no word can help."""
    trainable, name = list(stored.get("trainable", ())), stored.get("optimizer", {}).get("name", "adamw")
    was = f"trainable={_shown(trainable)}" if trainable != list(config.trainable) else ""
    was = was or (f"optimizer.name={name}" if name != config.optimizer.name else "")
    was = was or _other_adapters(stored.get("lora"), config.lora)
    if was:
        raise ConfigError(
            f"the checkpoint {checkpoint} was trained with {was} and goes on with nothing "
            f"else; set it back, or name another run_dir (init_from={config.run_dir} starts it from these "
            "weights)."
        )


def _other_adapters(stored: Mapping[str, Any] | None, lora: LoRAConfig | None) -> str:
    """The setting of `lora` that was another one, as it was; empty where the adapters are the same."""
    if stored is None or lora is None:
        same = stored is None and lora is None
        return "" if same else "lora=null" if stored is None else "lora"
    then, now = _completed(LoRAConfig, stored), config_to_dict(lora)
    for each in (then, now):
        each["alpha"] = float(each["rank"] if each["alpha"] is None else each["alpha"])
    names = [name for name in ("rank", "alpha", "targets") if then[name] != now[name]]
    return f"lora.{names[0]}={_shown(then[names[0]])}" if names else ""


def check_resume(
    stored: Mapping[str, Any],
    config: Config,
    checkpoint: str,
    *,
    held: Mapping[str, str] | None = None,
    holds: Mapping[str, str] | None = None,
) -> tuple[Difference, ...]:
    """What `config.resume_changed` allows to differ from the stored configuration of a checkpoint.

    Args:
        held: checksum of what a file held then, by the setting that names it, as far as that was stored.
        holds: the same of now.

    Raises:
        ConfigError: something differs that it does not name; the sentence names all of that.
    """
    now = config_to_dict(config)
    found = _by_contents(differences(stored, now), (stored, held or {}), (now, holds or {}))
    refused = [difference for difference in found if not _allowed(difference.key, config.resume_changed)]
    if refused:
        words = (*config.resume_changed, *(_word(difference.key) for difference in refused))
        keys = ",".join(dict.fromkeys(words))
        raise ConfigError(
            f"the checkpoint {checkpoint} was trained with other settings: "
            f"{'; '.join(map(str, refused))}; set them back, name another run_dir "
            f"(init_from={config.run_dir} starts it from these weights), or go on with the change by "
            f"'resume_changed=[{keys}]'."
        )
    return found


def _by_contents(
    found: Collection[Difference],
    then: tuple[Mapping[str, Any], Mapping[str, str]],
    now: tuple[Mapping[str, Any], Mapping[str, str]],
) -> tuple[Difference, ...]:
    """The differences, where files of known contents are compared by these instead of their names.

    then, now: a configuration as `config_to_dict` writes it, and checksums by setting.
    """
    known = [key for key in now[1] if key in then[1]]
    others = [difference for difference in found if difference.key not in known]
    changed = [
        Difference(
            key, *(f"{_shown(_value(config, key))} of contents {sums[key]}" for config, sums in (then, now))
        )
        for key in known
        if then[1][key] != now[1][key]
    ]
    return (*others, *changed)


def _value(config: Mapping[str, Any], dotted: str) -> Any:
    """Of a setting; null where its section is absent."""
    value: Any = config
    for name in dotted.split("."):
        value = value.get(name) if isinstance(value, Mapping) else None
    return value


def _word(key: str) -> str:
    """What resume_changed says of a setting: sources are no settings one by one."""
    return _SOURCES if key.startswith(f"{_SOURCES}.") else key


def _allowed(key: str, words: Collection[str]) -> bool:
    return any(key == word or key.startswith(f"{word}.") for word in words)


def _leaves(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Each setting below `key` in words; sections that lie in a list have numbers."""
    if isinstance(value, Mapping):
        inside: Iterable[tuple[Any, Any]] = value.items()
    elif isinstance(value, list) and any(isinstance(item, Mapping) for item in value):
        inside = enumerate(value)
    else:
        yield key, without_secrets(_shown(value))
        return
    for name, child in inside:
        yield from _leaves(child, f"{key}.{name}" if key else str(name))


def _cut(text: str | None) -> str | None:
    """A record of a change stays small, however many shards a list names."""
    if text is None or len(text) <= _MOST_SHOWN:
        return text
    return f"{text[:_MOST_SHOWN]}... ({len(text):,} characters)"


def _completed(cls: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a section, with the defaults of those that are missing."""
    hints, completed = types_of(cls), config_to_dict(cls())
    for name in completed:
        section, value = section_of(hints[name]), values.get(name, completed[name])
        inside = section is not None and isinstance(value, Mapping)
        completed[name] = _completed(typing.cast(type, section), value) if inside else _plain(value)
    return completed


def _plain(value: Any) -> Any:
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def _defining(config: dict[str, Any]) -> _Flat:
    """What defines the run, in one form whatever the way of writing it, without what does nothing."""
    stage = config["stage"]
    flat: _Flat = {"stage": stage}
    for section in _SECTIONS[stage]:
        flat |= _flattened(config[section], f"{section}.")
    flat |= {f"data.{name}": config["data"][name] for name in _DATA}
    flat["data.filter"] = flat["data.filter"].strip()
    flat |= _sources(config["data"]["sources"])
    flat["data.validation.share"] = config["data"]["validation"]["share"]
    if config["data"]["buckets"]:
        flat |= {f"data.{name}": config["data"][name] for name in ("bucket_step", "bucket_max_aspect")}
    if stage == "diffusion":
        for name in ("captions", "caption_weights", "shorten_captions"):
            flat[f"data.{name}"] = config["data"][name]
        _normalise_unet(flat)
        _normalise_towers(flat)
        _normalise_objective(flat)
    _normalise_first_stage(flat, stage)
    if stage != "diffusion" or not (flat["data.crop"] == "random" or flat["data.horizontal_flip"]):
        flat.pop("first_stage.cache_variants", None)  # of one crop
    return {key: value for key, value in flat.items() if key not in _FREE}


def _sources(sources: list[Any]) -> _Flat:
    """What sources have of their own; one that joins is not compared."""
    found = [{n: source.get(n) for n in _OF_A_SOURCE} for source in sources if isinstance(source, dict)]
    return {
        f"{_SOURCES}.{number}.{name}": value
        for number, own in enumerate(found)
        for name, value in own.items()
    }


def _flattened(section: dict[str, Any], prefix: str) -> _Flat:
    flat: _Flat = {}
    for name, value in section.items():
        if isinstance(value, dict):
            flat |= {prefix + name: _THERE, **_flattened(value, f"{prefix}{name}.")}
        else:
            flat[prefix + name] = value
    return flat


def _normalise_unet(flat: _Flat) -> None:
    levels = len(flat["unet.channel_multipliers"])
    depths, cross_only = flat["unet.transformer_depth"], flat["unet.cross_attention_only"] or [False]
    if flat["unet.middle_transformer_depth"] is None:
        flat["unet.middle_transformer_depth"] = depths[-1]
    flat["unet.transformer_depth"] = depths * levels if len(depths) == 1 else depths
    flat["unet.cross_attention_only"] = cross_only * levels if len(cross_only) == 1 else cross_only
    if flat["unet.res_block_groups"] is None:
        flat["unet.res_block_groups"] = flat["unet.num_groups"]


def _normalise_towers(flat: _Flat) -> None:
    for name in TOWERS:
        key = f"conditioning.{name}.pretrained"
        if key in flat and flat[key] is None:
            flat[key] = RANDOM  # what null meant before the word


def _normalise_objective(flat: _Flat) -> None:
    process, density, idle = flat["diffusion.process"], flat["diffusion.density"], list[str]()
    if flat["diffusion.loss"] != "huber":
        idle.append("huber_delta")
    if process != "discrete":
        idle += ["beta_schedule", "beta_start", "beta_end", "zero_terminal_snr", "min_snr_gamma"]
    if process != "flow":
        idle += ["shift", "shift_pixels", "weighting"]
    if process == "edm":
        idle.append("num_timesteps")
    else:
        idle.append("sigma_data")
    if density != "mode":
        idle.append("mode_scale")
    if density not in ("logit_normal", "log_normal"):
        idle += ["density_mean", "density_std"]
    for name, (logit, logarithm) in {
        "density_mean": (0.0, math.log(2.0 * flat["diffusion.sigma_data"]) - 1.2),
        "density_std": (1.0, 1.2),
    }.items():
        if flat[f"diffusion.{name}"] is None:
            flat[f"diffusion.{name}"] = logit if density == "logit_normal" else logarithm
    for key in idle:
        flat.pop(f"diffusion.{key}")


def _normalise_first_stage(flat: _Flat, stage: str) -> None:
    name, idle = flat["first_stage.name"], list[str]()
    if name == "identity":
        fields = (field.name for field in dataclasses.fields(FirstStageConfig))
        idle += [field for field in fields if field not in ("name", "input_range", "latent_scale")]
    else:
        idle += ["codebook_size"] if name != "vq" else []
        sizes = FirstStageConfig(
            base_channels=flat["first_stage.base_channels"],
            num_groups=flat["first_stage.num_groups"],
            channel_multipliers=(),
        )
        flat["first_stage.num_groups"] = norm_groups(sizes)
    if stage == "autoencoder":
        idle += ["weights", "latent_scale", "input_range"]  # a second stage's
    else:
        idle.append("dropout")  # frozen
        # The latent statistics in the file tell another first stage; a scale that is set hides them.
        if flat["first_stage.latent_scale"] is None:
            idle.append("weights")
    for key in idle:
        flat.pop(f"first_stage.{key}", None)


def _shown(value: Any) -> str:
    """As it is written in YAML."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return f"[{', '.join(map(_shown, value))}]"
    return str(value) if value != "" else "empty"
