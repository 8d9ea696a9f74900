"""The training loop, top to bottom, for both stages and every task."""

from __future__ import annotations

import gc
import logging
import math
import os
import socket
from collections.abc import Iterator, Mapping
from contextlib import closing
from functools import partial
from itertools import chain

import torch
from torch import Tensor

from data_pipeline.batch import Batch
from data_pipeline.errors import GivenUp, StorageOutage
from data_pipeline.loader import AnyLoader
from trainer.assembly import build_run
from trainer.config.run import Config
from trainer.distributed import collectives
from trainer.distributed.collectives import Agreed
from trainer.distributed.env import DistributedEnv, initialise, shutdown
from trainer.distributed.evidence import leave_collectives, leave_memory
from trainer.exit_codes import ExitCode, StopRequest
from trainer.metrics.meters import Delayed, LateValues, Meters
from trainer.metrics.pictures import grid
from trainer.metrics.timer import START_VARIABLE, StartTimer, Throughput
from trainer.reliability.doubt import Progress, mark
from trainer.reliability.healing import HealingVerdict, Incident
from trainer.reliability.heartbeat import board_from_environment
from trainer.reliability.peers import peer_phases
from trainer.reliability.preemption import Preemption
from trainer.reliability.requests import profile_url, stop_url
from trainer.reliability.slow_ranks import SlowRanks
from trainer.reliability.watchdog import Watchdog, silence_s
from trainer.rng import step_seed
from trainer.run import Run
from trainer.telling import ServedShare, layer_norms, report, tell_phase
from trainer.validation import cost, validate

logger = logging.getLogger(__name__)


def run(config: Config, env: DistributedEnv) -> ExitCode:
    """Train on this rank until done or told to stop. The entry point of every launcher.

    Raises:
        ConfigError, DataError: a mistake of the user's.
        GivenUp: the loss does not recover.
    """
    start = StartTimer(os.environ.get(START_VARIABLE) if env.is_main else None)
    start.mark("imports and checks")
    watchdog = Watchdog(
        silence_s(config.distributed, env.num_nodes),
        local_rank=env.local_rank,
        board=board_from_environment(env.local_rank),
        # A late recompilation looks like a hang.
        grace_s={"data": config.data.patience_s, "step": 600.0 if config.distributed.compile else 0.0},
        peers=peer_phases(env),
        evidence=partial(leave_collectives, config.run_dir, env.rank),
    )
    files = (stop_url(config.run_dir), profile_url(config.run_dir)) if env.is_main else ()
    with watchdog, Preemption(*files) as preemption:
        env = initialise(env, config.distributed.timeout_s)
        start.mark("process group")
        try:
            while (code := _train_phase(config, env, start, preemption, watchdog)) is None:
                watchdog.begin_anew()
                start = StartTimer()
                start.mark("phases before")
            if env.is_main and code is ExitCode.DONE:
                preemption.acknowledge(StopRequest.NONE)
            return code
        except torch.OutOfMemoryError:
            leave_memory(config.run_dir, env.rank, env.device)
            raise
        finally:
            shutdown()


def _train_phase(
    config: Config, env: DistributedEnv, start: StartTimer, preemption: Preemption, watchdog: Watchdog
) -> ExitCode | None:
    """From the newest checkpoint to the end of its phase; None: another phase follows. Collective.

    Each is what a restart would be: parts of its own, from what was committed. The one before has let go of
    its memory by then.
    """
    parts = build_run(config, env, start, alive=partial(watchdog.beat, 0, "start"))
    try:
        code = train(parts, preemption, watchdog)
    except Exception as error:
        mark(error, Progress(parts.state.step, parts.checkpoints.committed))
        raise
    finally:
        parts.close()
    if code is None:
        for engine in parts.stage.engines.values():
            engine.close()
        del parts, engine
        gc.collect()
        if env.device.type == "cuda":
            torch.cuda.empty_cache()
    return code


def train(run: Run, preemption: Preemption, watchdog: Watchdog) -> ExitCode | None:
    """The loop. One turn is one optimizer step; every rank takes the same turns. None: a phase is over."""
    config, state, timer = run.config, run.state, run.timer
    meters, delayed, throughput = Meters(), Delayed(), Throughput(config.global_batch_size)
    slow_ranks, served_share = SlowRanks(), ServedShare(config.data.max_rejected_share)
    batches = run.open_loader()
    phase = run.phase
    batch = next(batches) if state.step < phase.stop else None
    begin(run)

    while state.step < phase.stop:
        assert batch is not None
        watchdog.beat(state.step, "step")
        rate = config.optimizer.rate(state.step, config.steps)
        metrics = take_step(run, batch, rate)
        meters.add(metrics)
        delayed.push(state.step, metrics, batch.ordinals, batch.keys)
        last_step = state.step == phase.stop

        # While the device works: the next batch, then what all ranks must agree on.
        watchdog.beat(state.step, "data")
        with timer("data"):
            upcoming, data_lost = (None, False) if last_step else fetch(batches)
        watchdog.beat(state.step, "step")
        saving = last_step or due(state.step, config.checkpoint.every)
        snapshot = due(state.step, config.ema.snapshot_every)
        storing, seen = saving or snapshot, batches.tally.seen
        run.profiler.ask(preemption.take_profile())
        incident, agreed = judge(run, delayed, preemption.request, data_lost, seen, everything=storing)
        served_share.judge(agreed.seen, batches.tally, main_rank=run.env.is_main)
        run.profiler.turn(state.step, agreed.profile, busy=partial(watchdog.beat, state.step, "profile"))
        if incident is not None:
            batches.close()
            watchdog.beat(state.step, "start")
            run.rewind(incident)
            if run.phase != phase:
                return None
            batches = run.open_loader()
            batch, delayed, meters = next(batches), Delayed(), Meters()
            continue

        run.sinks.advance(state.step)
        if due(state.step, config.logging.every) or last_step:
            record = {**meters.reduce(), **throughput.read(state.step, timer), "learning_rate": rate}
            report(run, record, batches, slow_ranks)
        if due(state.step, config.logging.layer_norms_every):
            run.sinks.log(state.step, state.samples_seen, layer_norms(run.stage.engines))
        look(run, batch, watchdog)
        store(run, watchdog, checkpoint=saving or must_save(agreed), snapshot=snapshot)
        if must_stop(agreed) and state.step < config.steps:
            settle_all(run, watchdog)
            return leave(run, preemption, agreed)
        run.garbage.turn(state.step)
        batch = upcoming

    return end_phase(run, batches, watchdog)


def begin(run: Run) -> None:
    """The first batch is there: tell what validation will cost, and save a run that is new. Collective."""
    run.start.mark("first batch")
    if run.held_out is not None and run.env.is_main:
        logger.info("validation: %s", cost(run.config, len(run.held_out)))
    if run.state.step == 0:
        run.save()  # what a rewind of the first steps goes back to
        run.start.mark("first save")


def take_step(run: Run, batch: Batch, rate: float) -> dict[str, Tensor]:
    """One optimizer step, its place in the run, and the averages; metrics that are still on the device."""
    state, device = run.state, run.env.device
    torch.manual_seed(step_seed(run.config.seed, state.step, run.env.rank))
    metrics = run.stage.train_step(batch.to(device), state.step, rate)
    state.advance(run.config.global_batch_size, batch.position)
    with run.timer("optimizer"):
        run.ema.update(state.step)
    run.start.first_step(device)
    return metrics


def due(step: int, every: int) -> bool:
    """Whether something with this interval happens after this step; 0 means never."""
    return every > 0 and step % every == 0


def fetch(batches: Iterator[Batch]) -> tuple[Batch | None, bool]:
    """(next batch, whether storage has been unreachable for longer than the configured patience)."""
    try:
        return next(batches), False
    except StorageOutage as outage:
        logger.error("%s", outage)
        return None, True


def judge(
    run: Run, delayed: Delayed, request: StopRequest, data_lost: bool, seen: int, *, everything: bool
) -> tuple[Incident | None, Agreed]:
    """Agree with the other ranks, and judge the losses that may be read by now. Collective.

    The newest step stays unread until the next turn, unless a checkpoint must know it to be good.

    Raises:
        GivenUp: too many rewinds.
    """
    ready = delayed.pop(everything=everything)
    read = [late.read() for late in ready]
    agreed = collectives.agree(
        request,
        data_lost=data_lost,
        save_failed=run.checkpoints.failed,
        seen=seen,
        losses=[values["loss"] for values in read],
        profile=run.profiler.asked,
    )
    for late, values, loss in zip(ready, read, agreed.losses, strict=True):
        verdict = run.healer.check(late.step, loss, worst_norm(values), poisoned=run.is_poisoned)
        if verdict.action == "stop":
            raise GivenUp(verdict.message)
        if verdict.symptom is not None:
            incident = name_incident(run, verdict, late, values["loss"])  # alike on all ranks
            if verdict.action == "rewind":
                return incident, agreed
    if not everything and must_save(agreed):  # a checkpoint is about to be written after all
        return judge(run, delayed, agreed.request, agreed.data_lost, seen, everything=True)
    return None, agreed


def worst_norm(values: Mapping[str, float]) -> float:
    """A gradient norm of the step that is not finite, where one of its networks has one; else the first's."""
    norms = [value for name, value in values.items() if name.endswith("grad_norm")]
    return next((norm for norm in norms if not math.isfinite(norm)), values["grad_norm"])


def name_incident(run: Run, verdict: HealingVerdict, late: LateValues, own_loss: float) -> Incident:
    """Record what went wrong at a step, and on which ranks, hosts and samples. Collective."""
    finite = math.isfinite(own_loss)
    own = (late.ordinals.tolist(), socket.gethostname(), () if finite else late.keys, finite)
    parts = collectives.all_gather_object(own)
    culprits = [
        f"rank {rank} ({host}): {', '.join(keys)}"
        for rank, (_, host, keys, was_finite) in enumerate(parts)
        if not was_finite
    ]
    ordinals = list(chain.from_iterable(each for each, *_ in parts))
    incident = run.healer.record(verdict, ordinals, culprits)
    what = {
        "skipped": "the step is left out",
        "noted": "noted",
        "rewound": f"rewinding and skipping {len(ordinals)} samples",
    }[incident.action]
    where = "; ".join(culprits) or "on no rank's own loss"
    if run.env.is_main:
        logger.warning("%s, %s: %s", verdict.symptom, where, what)
    if verdict.action != "rewind":  # that is an event of its own
        details = {"kind": incident.kind, "value": incident.value, "culprits": culprits}
        run.sinks.event(incident.step, run.state.samples_seen, f"step {incident.action}", **details)
    return incident


def must_save(agreed: Agreed) -> bool:
    """Whether the state is saved now, due or not: the last upload failed, or the run ends."""
    return agreed.save_failed or must_stop(agreed)


def must_stop(agreed: Agreed) -> bool:
    """Whether the run ends at this step boundary."""
    return agreed.request is not StopRequest.NONE or agreed.data_lost


def store(run: Run, watchdog: Watchdog, *, checkpoint: bool, snapshot: bool) -> None:
    """The state, the averages, or both, on their way to storage. Collective; raises as `settle`."""
    if checkpoint:
        watchdog.beat(run.state.step, "checkpoint")
        if not settle(run, watchdog):
            run.save()
    if snapshot:
        watchdog.beat(run.state.step, "checkpoint")
        run.save_snapshot()


def settle(run: Run, watchdog: Watchdog) -> bool:
    """Return when the newest checkpoint is committed; the present state takes the place of one that failed.

    Collective. Whether it did.

    Raises:
        UserError, RetryableFault: that failed, too.
    """
    failure = run.checkpoints.settle()
    if failure is None:
        return False
    logger.error("%s Saving the present state instead.", failure)
    run.sinks.event(run.state.step, run.state.samples_seen, "save failed")
    watchdog.beat(run.state.step, "checkpoint")  # the tries that failed took their time
    run.save()
    run.checkpoints.wait()
    return True


def settle_all(run: Run, watchdog: Watchdog) -> None:
    """Return when nothing of the run is on its way to storage any more. Collective; raises as `settle`."""
    settle(run, watchdog)
    run.settle_snapshot()


def end_phase(run: Run, batches: AnyLoader, watchdog: Watchdog) -> ExitCode | None:
    """All steps of a phase are made: done, or None where another phase follows. Collective."""
    state = run.state
    watchdog.beat(state.step, "finish")
    settle_all(run, watchdog)
    if state.step < run.config.steps:
        batches.close()
        tell_phase(run)
        return None
    logger.info("done: %d steps, %d samples", state.step, state.samples_seen)
    return ExitCode.DONE


def look(run: Run, batch: Batch, watchdog: Watchdog) -> None:
    """At the weights as they are, before they are saved: pictures, held-out samples, at the end the latents,
    each where it is due. Collective."""
    config, step = run.config, run.state.step
    last_step = step == config.steps
    if due(step, config.sampling.every):
        watchdog.beat(step, "preview")
        preview(run, batch)
    if last_step or due(step, config.validation.every):
        validate(run, watchdog)
    if last_step:
        watchdog.beat(step, "finish")
        finish(run)


def preview(run: Run, batch: Batch) -> None:
    """A grid with the averaged weights, into the run folder and W&B. Collective.

    Pictures that do not fit into memory are left out: training does fit, and goes on.
    """
    state = run.state
    try:
        with run.averaged_weights():
            made = run.stage.preview(batch.to(run.env.device))
    except (torch.OutOfMemoryError, MemoryError) as error:
        if run.env.device.type == "cuda":
            torch.cuda.empty_cache()
        logger.warning("no preview, for want of memory (lower sampling.num_previews): %s", error)
        run.sinks.event(state.step, state.samples_seen, "preview failed")
        return
    run.sinks.picture(
        state.step, state.samples_seen, "preview", grid(made.pixels, made.captions, made.columns)
    )


def finish(run: Run) -> None:
    """Measure on data what the exported weights must carry. Collective."""
    batches = run.open_loader(from_start=True)
    with run.averaged_weights(), closing(batches):
        run.stage.finish(batch.to(run.env.device) for batch in batches)


def leave(run: Run, preemption: Preemption, agreed: Agreed) -> ExitCode:
    """The state is saved: say why the run stops."""
    if agreed.data_lost:
        run.sinks.event(run.state.step, run.state.samples_seen, "storage outage")
        return ExitCode.RETRYABLE
    request = preemption.acknowledge(agreed.request) if run.env.is_main else agreed.request
    word, since = request.name.lower(), preemption.since_s
    if run.env.is_main and since is not None:
        logger.info("%s: step %d is committed, %.1f s after it was asked for", word, run.state.step, since)
    details = {} if since is None else {"committed_after_s": since}
    run.sinks.event(run.state.step, run.state.samples_seen, word, **details)
    return request.exit_code
