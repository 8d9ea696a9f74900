"""Latent statistics of a first stage after its training, as the last step of a run measures them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import closing

import torch
from torch import Tensor

from data_pipeline.config import DataConfig, SourceConfig
from trainer.config.run import Config, ConfigError
from trainer.evaluation.pictures import pictures_once
from trainer.first_stage.base import LATENT_BUFFERS
from trainer.first_stage.build import FIRST_STAGES, first_stage_of
from trainer.first_stage.statistics import MARK, MEASURED, measure_latent_statistics
from trainer.pixels import to_unit_range


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


def _pictures(config: Config, shards: Sequence[str], samples: int) -> Iterator[Tensor]:
    """uint8 [B, 3, H, W], `samples` pictures in all."""
    sources = tuple(SourceConfig(url) for url in shards)
    data: DataConfig = dataclasses.replace(config.data, shards="", sources=sources, index=None)
    size = config.micro_batch_size
    return pictures_once(data, samples, batch_size=size, seed=config.seed, purpose="latent statistics")
