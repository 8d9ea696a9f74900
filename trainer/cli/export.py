"""Write a run's weights, averaged ones unless told otherwise, as a file or folder that others read.

native: one safetensors file with the configuration and the latent statistics, streamed: what
first_stage.weights, init_from and `ldm sample` take. compvis: one file in the original layout, with the
average also where it keeps one (model_ema). diffusers: a folder for the pipeline's from_pretrained. These
two hold the UNet, the frozen first stage and the text towers, and list what they have no place for. lora: the
adapters alone of a run with `lora`, as diffusers' load_lora_weights takes them; the others have them merged.

The latent statistics of a first stage are measured in the last step of its run. Of an earlier checkpoint,
or of a file exported without them, --measure SHARDS measures them here; a second stage takes no others.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing
from typing import Any, Literal

import torch
from torch import Tensor

from data_pipeline.config import DataConfig, SourceConfig
from trainer.checkpoint.export import (
    CONTENTS,
    DTYPES,
    WEIGHTS,
    Exported,
    export,
    export_tensors,
    open_adapters,
    open_weights,
)
from trainer.conditioning.build import build_conditioner
from trainer.config.identity import as_trained
from trainer.config.io import config_from_dict
from trainer.config.models import TOWERS as TOWER_SECTIONS
from trainer.config.models import OpenCLIPConfig
from trainer.config.ranges import check_ranges
from trainer.config.run import Config, ConfigError
from trainer.distributed.env import choose_device
from trainer.evaluation.pictures import pictures_once
from trainer.first_stage.base import LATENT_BUFFERS, FirstStage
from trainer.first_stage.build import FIRST_STAGES, first_stage_of, first_stage_tensors, load_first_stage
from trainer.first_stage.statistics import (
    MARK,
    MEASURED,
    UNMEASURED,
    measure_latent_statistics,
    require_same_statistics,
)
from trainer.frozen_files import FIRST_STAGE, contents_of_frozen, require_contents
from trainer.interop.export import export_weights, write_lora
from trainer.interop.parts import TOWERS, is_clip_l
from trainer.pixels import to_unit_range
from trainer.weights import metadata_object

SAMPLES = 2048
EXAMPLE = "example: ldm export s3://bucket/first_stage_run s3://bucket/first_stage.safetensors"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """From where, to where, which weights."""
    parser.add_argument(
        "source", metavar="RUN", help="run folder or checkpoint folder; with --measure also an exported file"
    )
    parser.add_argument("destination", metavar="DESTINATION", help="path or URL")
    parser.add_argument("--layout", choices=("native", "compvis", "diffusers", "lora"), default="native")
    parser.add_argument(
        "--weights", help="average to write, or `weights` for the trained ones (default: EMA)"
    )
    parser.add_argument("--checkpoint", type=int, metavar="STEP", help="default: the newest")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="fp32", help="of the tensors")
    parser.add_argument(
        "--measure",
        nargs="+",
        metavar="SHARDS",
        help="measure a first stage's latent statistics on these shards (URLs with braces or wildcards)",
    )
    parser.add_argument("--samples", type=int, help=f"pictures for --measure (default: {SAMPLES})")
    parser.add_argument(
        "--latent-scale",
        type=float,
        help="first_stage.latent_scale, where run and first stage do not say it; not for native",
    )
    moved = parser.add_argument_group("frozen networks", "for compvis and diffusers, where files have moved")
    moved.add_argument("--first-stage", metavar="FILE", help="first_stage.weights")
    moved.add_argument("--text-encoder", metavar="FILE", help="conditioning.openclip.pretrained")
    moved.add_argument("--text-encoder-2", metavar="FILE", help="conditioning.openclip_second.pretrained")


def run(args: argparse.Namespace) -> int:
    """Export and say what was written."""
    if args.samples is not None and not args.measure:
        raise ConfigError(f"--samples {args.samples} are pictures to measure on; give --measure SHARDS, too.")
    if args.layout == "lora":
        return _export_lora(args)
    if args.latent_scale is not None and (args.layout == "native" or args.measure):
        raise ConfigError(
            "--latent-scale is for --layout compvis or diffusers without --measure; a native file of a first "
            "stage is given its scale by first_stage.latent_scale where it is used."
        )
    if args.layout != "native":
        return _export_whole(args)
    _require_no_networks(args, "a native file holds no frozen networks")
    made = _export_measured(args) if args.measure else _export_stored(args)
    print(
        f"{made.destination}: {made.num_parameters / 1e6:.2f} M parameters, {made.num_bytes / 1e6:.1f} MB, "
        f"{made.profile} of step {made.step}"
    )
    if made.statistics == UNMEASURED:
        print(
            "ldm: its latent statistics were never measured, so no second stage takes it; measure them with "
            "--measure SHARDS, or export the checkpoint of the run's last step.",
            file=sys.stderr,
        )
    return 0


def with_measured_statistics(
    tensors: dict[str, Tensor],
    metadata: dict[str, str],
    config: Config,
    shards: Sequence[str],
    *,
    samples: int,
    device: torch.device,
    source: str,
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """A first stage's file with latent statistics measured on pictures from shards, and marked so.

    Global or per channel as the run's autoencoder_loss.latent_statistics says, on pictures cut and filtered
    as in the run.

    Args:
        tensors: weights under our names; statistics among them are replaced.
        config: the run's.
        shards: URLs with braces or wildcards.
        samples: pictures to look at; of a smaller set, each once.
        source: names the weights in errors.

    Raises:
        ConfigError: not a first stage that has statistics, or weights of another structure.
        DataError: shards that cannot be read, or that hold no picture.
    """
    if config.stage != "autoencoder" or FIRST_STAGES[config.first_stage.name].statistics_measured:
        raise ConfigError(
            f"{source} is no run of a first stage, which alone has latent statistics; leave out --measure, "
            "or name a run of stage=autoencoder."
        )
    if samples < 1:
        raise ConfigError(f"--samples {samples} measures nothing; give at least 1.")
    module = first_stage_of(config.first_stage, tensors, source, device).requires_grad_(False).eval()
    pixels = (to_unit_range(batch.to(device)) for batch in _pictures(config, shards, samples))
    per_channel = config.autoencoder_loss.latent_statistics == "channel"
    with closing(pixels):
        found = measure_latent_statistics(module, pixels, lambda sums: sums, per_channel=per_channel)
    measured = {name: value.cpu() for name, value in zip(LATENT_BUFFERS, found, strict=True)}
    return tensors | measured, metadata | {MARK: MEASURED}


def _require_no_networks(args: argparse.Namespace, why: str) -> None:
    for option in ("first_stage", "text_encoder", "text_encoder_2"):
        if getattr(args, option) is not None:
            raise ConfigError(f"{why}; leave out --{option.replace('_', '-')}.")


def _export_stored(args: argparse.Namespace) -> Exported:
    return export(args.source, args.destination, profile=args.weights, step=args.checkpoint, dtype=args.dtype)


def _export_measured(args: argparse.Namespace) -> Exported:
    tensors, metadata, _ = _open(args)
    return export_tensors(tensors, metadata, args.source, args.destination, args.dtype)


def _open(args: argparse.Namespace) -> tuple[dict[str, Tensor], dict[str, str], Config]:
    """Tensors, metadata and configuration of the source, with the statistics that are asked for."""
    tensors, metadata = open_weights(args.source, profile=args.weights, step=args.checkpoint)
    config = config_from_dict(metadata_object(metadata, "config", args.source))
    scale = args.latent_scale
    if args.measure:
        tensors, metadata = with_measured_statistics(
            tensors,
            metadata,
            config,
            args.measure,
            samples=SAMPLES if args.samples is None else args.samples,
            device=choose_device(),
            source=args.source,
        )
    if args.measure or scale is not None:  # goes before what the run was configured with
        first = dataclasses.replace(config.first_stage, latent_scale=scale)
        config = dataclasses.replace(config, first_stage=first)
        check_ranges(config)
    return tensors, metadata, config


def _export_lora(args: argparse.Namespace) -> int:
    why = "adapters have no latents and stand beside no networks"
    _require_no_networks(args, why)
    for option, given in (("latent-scale", args.latent_scale is not None), ("measure", bool(args.measure))):
        if given:
            raise ConfigError(f"{why}; leave out --{option}.")
    adapters, metadata = open_adapters(args.source, profile=args.weights, step=args.checkpoint)
    config = config_from_dict(metadata_object(metadata, "config", args.source))
    url = write_lora(adapters, args.destination, config.unet, DTYPES[args.dtype][0])
    print(f"{url}: {len(adapters)} adapters, {metadata['profile']} of step {metadata['step']}")
    return 0


def _export_whole(args: argparse.Namespace) -> int:
    tensors, metadata, config = _open(args)
    average: dict[str, Tensor] | None = None
    if config.stage == "autoencoder":
        _require_no_networks(args, f"{args.source} is a first stage, which has none beside it")
        tensors = {f"first_stage.{name}": value for name, value in tensors.items()}
    else:
        if config.first_stage.name == "identity" and args.first_stage is not None:
            raise ConfigError(f"{args.source} draws pixels without a first stage; leave out --first-stage.")
        config = _with_networks(as_trained(config) if "network" in metadata else config, args)
        trained = tensors
        tensors = {n: v for n, v in trained.items() if n.startswith(("unet.", "conditions."))}
        if args.layout == "compvis":
            average = _average(args, trained, metadata)
        first_stage = load_first_stage(config.first_stage)
        _require_contents(args, metadata, config, first_stage)
        if config.first_stage.name != "identity":
            require_same_statistics(first_stage, trained)
            stage, _ = first_stage_tensors(first_stage)
            tensors |= {f"first_stage.{name}": value for name, value in stage.items()}
        tensors |= _towers(config, args.layout)
    dtype, _ = DTYPES[args.dtype]
    print(export_weights(tensors, args.destination, config, args.layout, average, dtype).describe())
    return 0


def _with_networks(config: Config, args: argparse.Namespace) -> Config:
    """The configuration with the frozen networks that the command names instead of the run's."""
    if args.first_stage is not None:
        first = dataclasses.replace(config.first_stage, weights=args.first_stage)
        config = dataclasses.replace(config, first_stage=first)
    changed: dict[str, Any] = {}
    for name, weights in zip(TOWER_SECTIONS, (args.text_encoder, args.text_encoder_2), strict=True):
        tower: OpenCLIPConfig | None = getattr(config.conditioning, name)
        if weights is not None and tower is None:
            raise ConfigError(f"{args.source} has no text tower conditioning.{name}; leave its weights out.")
        if weights is not None and tower is not None:
            changed[name] = dataclasses.replace(tower, pretrained=weights)
    return dataclasses.replace(config, conditioning=dataclasses.replace(config.conditioning, **changed))


def _require_contents(
    args: argparse.Namespace, metadata: dict[str, str], config: Config, first_stage: FirstStage
) -> None:
    """Raise ConfigError where frozen networks are not those of training and the command names no others."""
    towers = [f"conditioning.{section}.pretrained" for section in TOWER_SECTIONS]
    given = zip(
        (FIRST_STAGE, *towers), (args.first_stage, args.text_encoder, args.text_encoder_2), strict=True
    )
    meant = [setting for setting, file in given if file is not None]
    if CONTENTS in metadata:
        conditioner = build_conditioner(config.conditioning, config.first_stage)
        found = contents_of_frozen(config, first_stage, conditioner)
        require_contents(metadata, config, found, args.source, meant=meant)


def _average(
    args: argparse.Namespace, tensors: dict[str, Tensor], metadata: dict[str, str]
) -> dict[str, Tensor] | None:
    """The run's average of the UNet, of which the original layout keeps a copy; None where there is none."""
    if metadata.get("profile", WEIGHTS) == WEIGHTS:
        if args.source.endswith(".safetensors"):
            return None  # a file holds one set of weights
        tensors, metadata = open_weights(args.source, step=args.checkpoint)
        if metadata.get("profile", WEIGHTS) == WEIGHTS:
            return None
    return {name: value for name, value in tensors.items() if name.startswith("unet.")}


def _towers(config: Config, layout: Literal["compvis", "diffusers"]) -> dict[str, Tensor]:
    """Text towers, "text_encoder.*" and "text_encoder_2.*", with as much of each as the layout's readers
    want."""
    towers: dict[str, Tensor] = {}
    for index, (role, section) in enumerate(TOWERS.items()):
        tower: OpenCLIPConfig | None = getattr(config.conditioning, section)
        if tower is None:
            continue
        from trainer.conditioning.openclip import stored_tower  # imports open_clip, which takes seconds

        second = config.conditioning.openclip_second is not None
        if layout == "diffusers" and not second:
            weights = stored_tower(tower, index, "read")
        elif layout == "diffusers" or is_clip_l(tower):
            weights = stored_tower(tower, index, "blocks")
        else:
            weights = stored_tower(tower, index, "all")
        towers |= {f"{role}.{name}": value for name, value in weights.items()}
    return towers


def _pictures(config: Config, shards: Sequence[str], samples: int) -> Iterator[Tensor]:
    """uint8 [B, 3, H, W], `samples` pictures in all."""
    sources = tuple(SourceConfig(url) for url in shards)
    data: DataConfig = dataclasses.replace(config.data, shards="", sources=sources, index=None)
    size = config.micro_batch_size
    return pictures_once(data, samples, batch_size=size, seed=config.seed, purpose="latent statistics")
