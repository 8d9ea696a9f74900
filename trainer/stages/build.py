"""From a configuration to a stage that stands on its engines, with the weights that it begins with.

Networks are built, what of them is not trained is frozen, they get their weights, and then adapters, which
change names; engines come last, for they copy what they are to train.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import nn

from data_pipeline.moments.writer import MomentsWriter
from trainer.checkpoint.catalogue import CheckpointHandle
from trainer.checkpoint.contents import share_bytes
from trainer.checkpoint.export import open_weights, read_state
from trainer.checkpoint.host_buffer import HostBuffer
from trainer.checkpoint.layout import FROZEN, MASTER
from trainer.checkpoint.reader import EngineReader, check_shapes
from trainer.conditioning.build import require_activations
from trainer.config.identity import check_optimizer_state
from trainer.config.run import Config, ConfigError
from trainer.distributed import collectives
from trainer.distributed.adamw import CONDITIONERS
from trainer.distributed.build import build_engine
from trainer.distributed.engine import Engine
from trainer.distributed.env import DistributedEnv
from trainer.distributed.frozen import FrozenWeights, freeze
from trainer.distributed.lora import add_adapters
from trainer.first_stage.base import FirstStage
from trainer.first_stage.build import frozen_dtype, place_first_stage
from trainer.first_stage.encode_once import EncodeOnce, moments_cache, open_cache
from trainer.first_stage.perceptual import build_perceptual
from trainer.frozen_files import contents_of_frozen, contents_of_perceptual
from trainer.interop.initialise import initialise
from trainer.metrics.timer import StartTimer, StepTimer
from trainer.model import build_autoencoder, build_model
from trainer.stages.autoencoder import AutoencoderStage
from trainer.stages.diffusion import DiffusionStage
from trainer.stages.stage import Stage
from trainer.weights import read_once

logger = logging.getLogger(__name__)


class Built(NamedTuple):
    """A stage, and what came with it."""

    stage: Stage
    buffer: HostBuffer
    """The memory begun for its checkpoints."""
    frozen: FrozenWeights | None
    """What of its network is not trained."""
    contents: dict[str, str]
    """Checksums of what was read from files and is not trained, by setting."""
    facts: dict[str, str]
    """For the log."""


def build_stage(
    config: Config,
    env: DistributedEnv,
    timer: StepTimer,
    start: StartTimer,
    resumes: CheckpointHandle | None,
) -> Built:
    """The stage of `config`, before `resumes` is loaded into it. Collective.

    Raises:
        ConfigError: weights that are not there or do not fit, or nothing to be trained where something is.
        UserError, RetryableFault: the cache of moments cannot be written.
    """
    build = _build_autoencoder if config.stage == "autoencoder" else _build_diffusion
    return build(config, env, timer, start, resumes)


def _build_diffusion(
    config: Config,
    env: DistributedEnv,
    timer: StepTimer,
    start: StartTimer,
    resumes: CheckpointHandle | None,
) -> Built:
    if resumes is None:
        require_activations(config.conditioning)
    model = build_model(config, env.device)
    # One rank has read the files for all of them.
    contents = collectives.from_main_rank(
        lambda: contents_of_frozen(config, model.first_stage, model.conditioner)
    )
    place_first_stage(model.first_stage, config.distributed, env.device)
    model.conditioner.frozen.to(env.device, frozen_dtype(config.distributed))
    freeze(model.network, config.trainable)
    if config.lora is not None:
        model.network.requires_grad_(False)
    _begin_with(config, model.network, resumes)
    add_adapters(model.network, config.lora)  # after the weights, whose names they change
    if config.optimizer.conditioner_learning_rate is not None:
        _require_conditioners(model.network)
    frozen = FrozenWeights(model.network, env.rank, env.world_size) if config.freezes else None
    start.mark("networks")
    buffer = _begin_buffer({"unet": model.network}, DiffusionStage.averaged, config, env)
    engines: dict[str, Engine] = {"unet": build_engine(model.network, config, env)}
    once = _open_moments(config, env, model.first_stage)
    stage = DiffusionStage(config, engines, model.conditioner, model.first_stage, timer, once)
    return Built(stage, buffer, frozen, contents, {})


def _require_conditioners(network: nn.Module) -> None:
    """Raise ConfigError where the rate of trained conditioners would be that of nothing."""
    trained = [name for name, parameter in network.named_parameters() if parameter.requires_grad]
    if not any(name.startswith(CONDITIONERS) for name in trained):
        raise ConfigError(
            "optimizer.conditioner_learning_rate is set, and no conditioner is trained here; remove it."
        )


def _open_moments(config: Config, env: DistributedEnv, first_stage: FirstStage) -> EncodeOnce | None:
    """The cache of moments, where the configuration names one. Collective.

    Raises:
        UserError, RetryableFault: it cannot be written.
    """
    if config.first_stage.cache is None:
        return None
    cache = moments_cache(config.first_stage, first_stage)
    allowance = collectives.from_main_rank(lambda: open_cache(config.first_stage, cache))
    share = None if allowance is None else allowance // env.world_size
    rows = config.sharing(env.world_size).rows
    return EncodeOnce(first_stage, cache, MomentsWriter(cache, allowance=share), rows)


def _build_autoencoder(
    config: Config,
    env: DistributedEnv,
    timer: StepTimer,
    start: StartTimer,
    resumes: CheckpointHandle | None,
) -> Built:
    perceptual = build_perceptual(config.autoencoder_loss, env.device)
    with env.device:
        networks = build_autoencoder(config)
    _begin_with(config, networks[AutoencoderStage.averaged], resumes)
    start.mark("networks")
    buffer = _begin_buffer(networks, AutoencoderStage.averaged, config, env)
    engines = {name: build_engine(network, config, env) for name, network in networks.items()}
    contents = collectives.from_main_rank(lambda: contents_of_perceptual(perceptual))
    stage = AutoencoderStage(config, engines, perceptual, timer)
    facts = {"perceptual_network": perceptual.name if perceptual is not None else "none"}
    return Built(stage, buffer, None, contents, facts)


def _begin_buffer(
    networks: Mapping[str, nn.Module], averaged: str, config: Config, env: DistributedEnv
) -> HostBuffer:
    """The memory that checkpoints are copied to, made ready while engines are built."""
    return HostBuffer(share_bytes(networks, averaged, config, env.world_size), env.device)


def _begin_with(config: Config, network: nn.Module, resumes: CheckpointHandle | None) -> None:
    """The weights that `init_from` names, unless a checkpoint is about to replace them.

    What is frozen no engine restores: where the run goes on, it comes out of the checkpoint as well, unless
    `init_from` is another one by now; then restoring compares the two.

    Raises:
        ConfigError: weights that are not there or do not fit.
    """
    source = config.init_from
    if resumes is not None:
        if config.freezes:
            stored = read_once(lambda: read_state(resumes))["config"]
            check_optimizer_state(stored, config, resumes.url)
            if stored.get("init_from") == source:
                _take_frozen(network, resumes)
                return
        elif source is not None:
            logger.info("%s is not read: the run goes on from step %d", source, resumes.step)
            return
    if source is not None:
        tensors, _ = read_once(lambda: open_weights(source))
        report = initialise(network, tensors, source)
        logger.info("starting from %s\n%s", source, report.describe())
        added = (*report.new, *report.widened)
        if config.lora is not None and added:
            raise ConfigError(
                f"{source} lacks {added[0]}, which lora would leave untrained; train the whole network with "
                "its added conditions first, or remove them."
            )


@torch.no_grad()
def _take_frozen(network: nn.Module, handle: CheckpointHandle) -> None:
    frozen = {name: p for name, p in network.named_parameters() if not p.requires_grad}
    check_shapes(handle, FROZEN, {name: tuple(p.shape) for name, p in frozen.items()})
    stored = read_once(lambda: EngineReader(handle, FROZEN).whole(MASTER, list(frozen)))
    for name, parameter in frozen.items():
        parameter.copy_(stored[name])
