"""A trained diffusion model ready to draw: from a run folder or an exported file."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass

import torch
from torch import nn

from trainer.checkpoint.whole import open_weights
from trainer.conditioning.build import Conditioner, build_conditioner
from trainer.config.io import config_from_dict
from trainer.config.run import Config, ConfigError
from trainer.first_stage.base import FirstStage
from trainer.first_stage.build import load_first_stage
from trainer.interop.initialise import initialise
from trainer.stages.diffusion import build_network


@dataclass(frozen=True)
class Pipeline:
    """Everything that `trainer.sample.generate` needs."""

    config: Config
    network: nn.Module
    conditioner: Conditioner
    first_stage: FirstStage
    description: str
    """Which weights these are, for people."""


def load_pipeline(
    source: str,
    *,
    profile: str | None = None,
    step: int | None = None,
    first_stage_weights: str | None = None,
    device: torch.device,
) -> Pipeline:
    """Networks with their weights, in evaluation mode.

    Args:
        source: run folder, checkpoint folder or exported .safetensors file.
        profile: average to take, or "weights"; unset: the average where there is one.
        step: which checkpoint of a run folder; unset: the newest.
        first_stage_weights: in place of the file that the run was trained with.

    Raises:
        ConfigError: nothing there, or not a diffusion model.
    """
    tensors, metadata = open_weights(source, profile=profile, step=step)
    if "config" not in metadata:
        raise ConfigError(f"{source} carries no configuration; name a run folder or a file of `ldm export`.")
    config = config_from_dict(json.loads(metadata["config"]))
    if config.stage != "diffusion":
        raise ConfigError(f"{source} is a first stage, which draws nothing by itself; name a diffusion run.")
    if first_stage_weights is not None:
        first = dataclasses.replace(config.first_stage, weights=first_stage_weights)
        config = dataclasses.replace(config, first_stage=first)
    torch.manual_seed(config.seed)  # towers without weights of their own are seeded
    first_stage = load_first_stage(config.first_stage).to(device)
    conditioner = build_conditioner(config.conditioning, config.first_stage)
    conditioner.frozen.to(device)
    network = build_network(config, conditioner)
    absent = initialise(network, tensors, source).new
    if absent:
        raise ConfigError(
            f"{source} lacks {len(absent)} tensors of the network, such as {absent[0]}; name a run or an "
            "export of it."
        )
    description = f"step {metadata.get('step', '?')}, {metadata.get('profile', 'weights')}"
    network.eval().requires_grad_(False).to(device)
    return Pipeline(config, network, conditioner, first_stage, description)
