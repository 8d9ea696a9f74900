"""From a configuration to the parts of a run, in the order in which mistakes are cheapest."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import nn

from data_pipeline.loader import (
    Dataset,
    WorkerProcess,
    check_layout,
    open_dataset,
    start_workers,
)
from data_pipeline.moments.writer import MomentsWriter
from trainer.checkpoint.catalogue import CheckpointHandle
from trainer.checkpoint.contents import share_bytes
from trainer.checkpoint.export import CONTENTS, open_weights, read_state
from trainer.checkpoint.host_buffer import HostBuffer
from trainer.checkpoint.layout import FROZEN, MASTER
from trainer.checkpoint.manager import CheckpointManager, newest_good
from trainer.checkpoint.reader import EngineReader, check_shapes
from trainer.checkpoint.retirement import abort_dead_uploads
from trainer.config.identity import check_optimizer_state
from trainer.config.io import config_to_dict
from trainer.config.run import Config, ConfigError
from trainer.distributed import collectives
from trainer.distributed.adamw import CONDITIONERS
from trainer.distributed.build import build_engine
from trainer.distributed.engine import Engine
from trainer.distributed.env import DistributedEnv
from trainer.distributed.frozen import FrozenWeights, freeze
from trainer.distributed.lora import add_adapters
from trainer.distributed.process import (
    GarbageCollection,
    bind_to_node,
    configure_process,
    describe_process,
)
from trainer.distributed.shared_reads import read_together
from trainer.ema import EMA
from trainer.evaluation.held_out import Distance, hold_out
from trainer.first_stage.base import FirstStage
from trainer.first_stage.build import frozen_dtype, place_first_stage
from trainer.first_stage.encode_once import EncodeOnce, moments_cache, open_cache
from trainer.first_stage.perceptual import build_perceptual
from trainer.frozen_files import contents_of_frozen, contents_of_perceptual
from trainer.interop.initialise import initialise
from trainer.metrics.long_work import LongWork
from trainer.metrics.sinks import Sinks
from trainer.metrics.step_profile import StepProfiler
from trainer.metrics.timer import StartTimer, StepTimer
from trainer.model import build_autoencoder, build_model
from trainer.provenance import git_commit
from trainer.reliability.gpu_health import open_health
from trainer.reliability.healing import Healer, read_journal
from trainer.reliability.lease import Lease, acquire
from trainer.run import Run
from trainer.stages.autoencoder import AutoencoderStage
from trainer.stages.diffusion import DiffusionStage
from trainer.stages.stage import Stage
from trainer.state import TrainState
from trainer.weights import read_once

logger = logging.getLogger(__name__)

_Built: TypeAlias = tuple[Stage, HostBuffer, FrozenWeights | None, dict[str, Any]]
"""A stage, the memory begun for its checkpoints, what of it is frozen, and facts about it for the log."""


def build_run(
    config: Config,
    env: DistributedEnv,
    start: StartTimer | None = None,
    *,
    alive: Callable[[], object] = lambda: None,
) -> Run:
    """Models, engines, averages and the newest checkpoint, for the phase in which that stands. Collective.

    config: of the whole run.
    alive: called while rank 0 alone indexes shards, which may take hours, or reads weights.

    Raises:
        ConfigError, DataError: a mistake of the user's; nothing has been written.
    """
    _prepare_process(config, env)
    with ExitStack() as undone:
        # Before all that follows, which takes as long as their imports; phases may have others.
        workers = [] if config.phases else start_workers(config.data, env.rank)
        for worker in workers:
            undone.callback(worker.close)
        run = _build(config, env, start or StartTimer(), alive, workers)
        undone.pop_all()
    return run


def _build(
    whole: Config,
    env: DistributedEnv,
    start: StartTimer,
    alive: Callable[[], object],
    workers: Sequence[WorkerProcess],
) -> Run:
    """The run, with loader processes that are its own once it is there. Collective."""
    config, shared, dataset, resumes = _open_phase(whole, env, alive)
    held_out = hold_out(config, dataset, alive)
    start.mark("data set")
    timer = StepTimer(env.device)
    torch.manual_seed(config.seed)
    make = _build_autoencoder if config.stage == "autoencoder" else _build_diffusion
    with read_together(env.device, alive):
        distance = _open_features(config, env)
        stage, buffer, frozen, facts = make(shared, env, timer, start, resumes)
    start.mark("engines")
    ema = EMA(config.ema, stage.engines[stage.averaged].fragments())
    state, healer = TrainState(), Healer(config.healing)
    sinks = Sinks(whole, main_rank=env.is_main, resolved=_resolved(config, shared, env, facts))
    lease = _hold_folder(config.run_dir)
    try:
        checkpoints = CheckpointManager(config, env, buffer, lease)
        parts = (config, whole, env, stage, ema, checkpoints, state, healer, timer, sinks, dataset, start)
        run = Run(
            *parts,
            StepProfiler(config.run_dir, env),
            GarbageCollection(config.distributed.gc_every),
            open_health(env.device),
            lease=lease,
            frozen=frozen,
            held_out=held_out,
            distance=distance,
            encode_once=stage.encode_once if isinstance(stage, DiffusionStage) else None,
            workers=workers,
            contents=facts[CONTENTS],
        )
        if config.ema.snapshot_every:
            run.snapshots = CheckpointManager(config, env, lease=lease)
        _go_on(run, resumes)
    except BaseException:
        if lease is not None:
            lease.release()
        raise
    start.mark("averages and checkpoint")
    return run


def _open_phase(
    whole: Config, env: DistributedEnv, alive: Callable[[], object]
) -> tuple[Config, Config, Dataset | None, CheckpointHandle | None]:
    """Settings of the phase in which the run stands, the same with the data's lanes, the data set, and the
    checkpoint to go on from. Collective; raises as `build_run`.
    """
    # Which phase it is, only the newest checkpoint says; else that is looked up after cheaper mistakes.
    resumes = newest_good(whole.run_dir, env) if whole.phases else None
    config = whole.at(resumes.step if resumes is not None else 0)
    dataset = _open_dataset(config, alive)
    if not whole.phases:
        resumes = newest_good(whole.run_dir, env)
    step = resumes.step if resumes is not None else 0
    for first in whole.phase_starts:
        if first > step:
            _check_phase(whole.at(first), dataset, env, alive)
    shared = _with_lanes(config, dataset, resumes if step > whole.phase(step).first else None)
    sharing = shared.sharing(env.world_size)
    if sharing.waste and env.is_main:
        logger.warning("%s", sharing.sentence())
    return config, shared, dataset, resumes


def _resolved(config: Config, shared: Config, env: DistributedEnv, facts: dict[str, Any]) -> dict[str, Any]:
    """What the log knows of a start: the settings, and what became of them on these ranks."""
    sharing = shared.sharing(env.world_size)
    commit = git_commit(Path(__file__).resolve().parent) if env.is_main else None
    return {
        **config_to_dict(config),
        "world_size": env.world_size,
        "accumulation": sharing.micro_batches,
        "padding": sharing.waste,
        "git_commit": commit or "unknown",
        **facts,
    }


def _go_on(run: Run, resumes: CheckpointHandle | None) -> None:
    """Stand where the checkpoint stands, with what was healed before, and open the sinks. Collective."""
    resumed = run.restore(resumes)
    run.healer.merge(collectives.from_main_rank(lambda: read_journal(run.config.run_dir)))
    state = run.state
    run.sinks.open(start_step=state.step, samples_seen=state.samples_seen, run_id=state.wandb_run_id)
    run.state.wandb_run_id = collectives.broadcast_object(run.sinks.run_id)
    if resumed is not None:
        run.tell_resume(resumed)


def _check_phase(
    config: Config, dataset: Dataset | None, env: DistributedEnv, alive: Callable[[], object]
) -> None:
    """What a later phase needs of ranks and data, before the run spends days on its way there. Collective.

    Raises:
        ConfigError, DataError: it could not begin.
    """
    config.sharing(env.world_size)
    if config.data.buckets:  # which accept other samples at another size
        dataset = _open_dataset(config, alive)
    _with_lanes(config, dataset, None)


def _prepare_process(config: Config, env: DistributedEnv) -> None:
    """How this process computes, and mistakes about the number of ranks, which need no data to be seen."""
    configure_process(config.distributed)
    bound = bind_to_node(env.device) if config.distributed.numa_binding else "cores as given"
    if env.is_main:
        logger.info("computing: %s; %s", describe_process(config.distributed, env.device), bound)
    config.sharing(env.world_size)
    config.shard_size(env.world_size, env.local_world_size)


def _open_dataset(config: Config, alive: Callable[[], object]) -> Dataset | None:
    """The shards; None in resampled order, which reads what cannot be indexed. Collective.

    One rank lists them and indexes new ones: hundreds that did it at once would be an outage.
    """
    if config.data.order == "resampled":
        return None
    with closing(LongWork(alive)) as work:
        return collectives.worked_on_main_rank(
            lambda tell: open_dataset(config.data, progress=tell, at_once=True), work.told
        )


def _with_lanes(config: Config, dataset: Dataset | None, resumes: CheckpointHandle | None) -> Config:
    """With the lanes that the data have: a lane lies on one rank, so who has which samples depends on them.

    A run that goes on has those that it began with: without an index it has others than with one. Collective.

    Raises:
        DataError: the data do not fill the lanes or the buckets.
    """
    if dataset is None:
        return config
    order = check_layout(config.data, dataset, seed=config.seed, global_batch_size=config.global_batch_size)
    position: dict[str, Any] | None = None
    if resumes is not None:
        position = collectives.from_main_rank(lambda: read_state(resumes)["state"]["train"]["position"])
    lanes = (position or {}).get("lanes", order.lanes)
    return dataclasses.replace(config, data=dataclasses.replace(config.data, lanes=lanes))


def _hold_folder(run_dir: str) -> Lease | None:
    """The lease of the run folder, on rank 0. Collective.

    Raises:
        RunTaken: on all ranks, another job's run is alive in it.
    """
    held: list[Lease] = []
    collectives.from_main_rank(lambda: held.append(acquire(run_dir)))
    if held:
        abort_dead_uploads(run_dir, held[0].claim.token)
    return held[0] if held else None


def _build_diffusion(
    config: Config,
    env: DistributedEnv,
    timer: StepTimer,
    start: StartTimer,
    resumes: CheckpointHandle | None,
) -> _Built:
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
    return stage, buffer, frozen, {CONTENTS: contents}


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
) -> _Built:
    perceptual = build_perceptual(config.autoencoder_loss, env.device)
    with env.device:
        networks = build_autoencoder(config)
    _begin_with(config, networks[AutoencoderStage.averaged], resumes)
    start.mark("networks")
    buffer = _begin_buffer(networks, AutoencoderStage.averaged, config, env)
    engines = {name: build_engine(network, config, env) for name, network in networks.items()}
    facts = {
        "perceptual_network": perceptual.name if perceptual is not None else "none",
        CONTENTS: collectives.from_main_rank(lambda: contents_of_perceptual(perceptual)),
    }
    return AutoencoderStage(config, engines, perceptual, timer), buffer, None, facts


def _open_features(config: Config, env: DistributedEnv) -> Callable[[], Distance] | None:
    """What begins R-FID, where the configuration names features. Collective.

    Raises:
        ConfigError: weights that are not at hand; says which file to bring.
    """
    family, weights = config.validation.features, config.validation.features_weights
    if family is None:
        return None
    # Not at the top: few runs need what it imports.
    from trainer.evaluation.networks import FeatureOptions, build_networks
    from trainer.evaluation.survey import ReconstructionDistance

    options = FeatureOptions(
        families=(family,),
        inception_weights=weights,
        dinov2_weights=weights,
    )
    return partial(ReconstructionDistance, build_networks(options, env.device), env.device)


def _begin_buffer(
    networks: Mapping[str, nn.Module], averaged: str, config: Config, env: DistributedEnv
) -> HostBuffer:
    """The memory that checkpoints are copied to, made ready while engines are built."""
    return HostBuffer(share_bytes(networks, averaged, config.ema, env.world_size), env.device)


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
