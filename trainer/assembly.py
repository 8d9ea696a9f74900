"""From a configuration to the parts of a run, in the order in which mistakes are cheapest."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path
from typing import Any

import torch

from data_pipeline.loader import (
    Dataset,
    WorkerProcess,
    check_layout,
    open_dataset,
    start_workers,
)
from trainer.checkpoint.catalogue import CheckpointHandle
from trainer.checkpoint.export import CONTENTS, read_state
from trainer.checkpoint.manager import CheckpointManager, newest_good
from trainer.checkpoint.retirement import abort_dead_uploads
from trainer.config.io import config_to_dict
from trainer.config.run import Config
from trainer.distributed import collectives
from trainer.distributed.env import DistributedEnv
from trainer.distributed.process import (
    GarbageCollection,
    bind_to_node,
    configure_process,
    describe_process,
)
from trainer.distributed.shared_reads import read_together
from trainer.ema import EMA
from trainer.evaluation.held_out import Distance, hold_out
from trainer.metrics.jsonl import MEASURED_BY
from trainer.metrics.long_work import LongWork
from trainer.metrics.sinks import Sinks
from trainer.metrics.step_profile import StepProfiler
from trainer.metrics.timer import StartTimer, StepTimer
from trainer.provenance import git_commit
from trainer.reliability.gpu_health import open_health
from trainer.reliability.healing import Healer, read_journal
from trainer.reliability.lease import Lease, acquire
from trainer.run import Run
from trainer.stages.build import build_stage
from trainer.stages.diffusion import DiffusionStage
from trainer.state import TrainState

logger = logging.getLogger(__name__)


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
    with read_together(env.device, alive):
        distance, networks = _open_features(config, env)
        stage, buffer, frozen, contents, facts = build_stage(shared, env, timer, start, resumes)
    start.mark("engines")
    ema = EMA(config.ema, stage.engines[stage.averaged].fragments())
    state, healer = TrainState(), Healer(config.healing)
    by = {MEASURED_BY: {"networks": networks}} if networks else {}
    resolved = _resolved(config, shared, env, {**facts, CONTENTS: contents, **by})
    sinks = Sinks(whole, main_rank=env.is_main, resolved=resolved)
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
            networks=networks,
            encode_once=stage.encode_once if isinstance(stage, DiffusionStage) else None,
            workers=workers,
            contents=contents,
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
    config.shard_size(env.world_size, env.ranks_per_node)


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


def _open_features(
    config: Config, env: DistributedEnv
) -> tuple[Callable[[], Distance] | None, dict[str, list[str]]]:
    """What begins R-FID, where the configuration names features, and what those are of. Collective.

    Raises:
        ConfigError: weights that are not at hand; says which file to bring.
    """
    family, weights = config.validation.features, config.validation.features_weights
    if family is None:
        return None, {}
    # Not at the top: few runs need what it imports.
    from trainer.evaluation.networks import FeatureOptions, build_networks, identities
    from trainer.evaluation.survey import ReconstructionDistance

    options = FeatureOptions(
        families=(family,),
        inception_weights=weights,
        dinov2_weights=weights,
    )
    networks = build_networks(options, env.device)
    known = identities(networks)
    for each, (name, digest, sees) in known.items() if env.is_main else ():
        logger.info("R-FID by %s: %s, weights %s, %s", each, name, digest[:16], sees)
    return partial(ReconstructionDistance, networks, env.device), known
