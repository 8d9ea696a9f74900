"""A run: its parts, and what it does with them besides training steps."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from data_pipeline.errors import FatalFault
from data_pipeline.loader import (
    AnyLoader,
    Dataset,
    HeldOut,
    Part,
    WorkerProcess,
    beginning,
    build_loader,
    merge_positions,
)
from data_pipeline.moments.entry import Moments
from data_pipeline.storage.urls import join
from trainer.checkpoint.catalogue import CheckpointHandle
from trainer.checkpoint.contents import Stored
from trainer.checkpoint.export import CONTENTS
from trainer.checkpoint.layout import FROZEN
from trainer.checkpoint.manager import CheckpointManager, Loaded
from trainer.config.run import Config, Phase
from trainer.distributed import collectives
from trainer.distributed.env import DistributedEnv
from trainer.distributed.frozen import FrozenWeights
from trainer.distributed.process import GarbageCollection
from trainer.ema import EMA
from trainer.evaluation.held_out import Distance
from trainer.first_stage.encode_once import EncodeOnce
from trainer.metrics.sinks import Sinks
from trainer.metrics.step_profile import StepProfiler
from trainer.metrics.timer import StartTimer, StepTimer
from trainer.reliability.gpu_health import GpuHealth
from trainer.reliability.healing import Healer, Incident, write_journal
from trainer.reliability.lease import Lease
from trainer.stages.stage import Stage
from trainer.state import TrainState

logger = logging.getLogger(__name__)


@dataclass
class Run:
    """Everything the loop touches."""

    config: Config
    """Of the phase in which the run stands."""
    whole: Config
    """As it was given."""
    env: DistributedEnv
    stage: Stage
    ema: EMA
    checkpoints: CheckpointManager
    state: TrainState
    healer: Healer
    timer: StepTimer
    sinks: Sinks
    dataset: Dataset | None
    """None in resampled order."""
    start: StartTimer
    profiler: StepProfiler
    garbage: GarbageCollection
    gpu: GpuHealth | None
    """What the driver says of this rank's GPU; None where it says nothing."""
    snapshots: CheckpointManager | None = None
    """Writes averages for `ldm ema`, beside the checkpoints: with a buffer and a process of its own."""
    lease: Lease | None = None
    frozen: FrozenWeights | None = None
    """What of the network is not trained."""
    held_out: HeldOut | None = None
    """The samples that validation measures; None where there is none."""
    distance: Callable[[], Distance] | None = None
    """Begins a distance of held-out pictures from what the first stage makes of them."""
    networks: dict[str, list[str]] = field(default_factory=dict)
    """Those whose features it is of, see `evaluation.networks.identities`."""
    measured: tuple[int, dict[str, float]] = (-1, {})
    """Step and figures of the last validation."""
    encode_once: EncodeOnce | None = None
    workers: Sequence[WorkerProcess] = ()
    """Loader processes that were started ahead, for the first loader."""
    contents: dict[str, str] = field(default_factory=dict)
    """Checksums of what was read from files and is not trained, by setting."""

    @property
    def phase(self) -> Phase:
        """The one that makes the next step, which after its end or a rewind is not that of `config`."""
        return self.whole.phase(self.state.step)

    def open_loader(self, *, from_start: bool = False) -> AnyLoader:
        """Batches from the current position on, without the samples that healing skips."""
        ranks, dataset = self.env.world_size, self.dataset
        begins = from_start or self.state.step == self.phase.first
        workers, self.workers = self.workers, ()
        return build_loader(
            self.config.data,
            seed=self.config.seed,
            global_batch_size=self.config.global_batch_size,
            part=Part(self.env.rank, ranks, self.config.sharing(ranks).together),
            position=beginning(self.phase.first_epoch) if begins else self.state.position,
            skip_ordinals=self.healer.skipped,
            dataset=dataset and replace(dataset, record_in=join(self.config.run_dir, "index")),
            moments=self._moments,
            workers=workers,
        )

    @property
    def _moments(self) -> Moments | None:
        cache = self.encode_once.cache if self.encode_once is not None else None
        variants = self.config.first_stage.cache_variants
        return Moments(variants, cache) if variants or cache is not None else None

    def save(self) -> None:
        """Checkpoint where the run stands. Collective."""
        positions = collectives.all_gather_object(self.state.position)
        position = merge_positions(positions) if self.state.step else None
        self.checkpoints.save(
            self.state.step,
            self._stored,
            self.ema,
            state={
                "train": self.state.state_dict(position),
                "healer": self.healer.state(),
                CONTENTS: self.contents,
            },
            tensors=self.stage.state(),
            loss=self.healer.recent_loss,
            metrics=self.measured[1] if self.measured[0] == self.state.step else None,
        )
        self.sinks.flush()

    def save_snapshot(self) -> None:
        """Store the power-function averages for `ldm ema`. Waits for no checkpoint. Collective."""
        assert self.snapshots is not None
        self.settle_snapshot()
        tensors = self.stage.state()
        self.snapshots.save_snapshot(self.state.step, self._stored, self.ema, tensors=tensors)

    def settle_snapshot(self) -> None:
        """Return when the last snapshot is stored, or is known not to be: the run goes on without it.
        Collective."""
        failure = self.snapshots.settle() if self.snapshots is not None else None
        if failure is not None:
            logger.error("a snapshot of the averages is not stored: %s", failure)
            self.sinks.event(self.state.step, self.state.samples_seen, "snapshot failed")

    @property
    def _stored(self) -> dict[str, Stored]:
        frozen = {FROZEN: self.frozen} if self.frozen is not None else {}
        return {**self.stage.engines, **frozen}

    def save_record(self) -> dict[str, float]:
        """What the last checkpoint cost this rank's training."""
        last = self.checkpoints.last_save
        if last is None:
            return {}
        return {
            "checkpoint/blocked_s": last.blocked_s,
            "checkpoint/waited_s": last.waited_s,
            "checkpoint/bytes": float(last.num_bytes),
        }

    def restore(self, known: CheckpointHandle | None = None) -> Loaded | None:
        """Take over the newest good checkpoint; None when there is none. Collective.

        Args:
            known: one that was found good before, and need not be read through again.

        Raises:
            ConfigError: it is of another network, or of other settings without the word for it.
        """
        handle = self.checkpoints.latest_good(known)
        if handle is None:
            return None
        before = self.whole.at(max(0, handle.step - 1))  # the phase of the last step that is in it
        loaded = self.checkpoints.load(
            handle, self.stage.engines, self.ema, self.frozen, before, self.contents
        )
        self.stage.load_state(loaded.tensors)
        self.state.load_state_dict(loaded.state["train"])
        self.healer.load_state(loaded.state["healer"])
        if 0 < self.state.step == self.phase.first:
            self.healer.forget_losses()
        return loaded

    def tell_resume(self, loaded: Loaded) -> None:
        """Into log and records: where the run goes on, and as what else than before."""
        step, samples = self.state.step, self.state.samples_seen
        logger.info("resuming from step %d (%d samples)", step, samples)
        if not 0 < step == self.phase.first:  # where the run came without a restart
            self.sinks.event(step, samples, "resume", world_size=self.env.world_size)
        if not loaded.changed:
            return
        changed = [str(difference) for difference in loaded.changed]
        self.sinks.event(step, samples, "resume changed", changed=changed)
        if self.env.is_main:
            logger.warning("going on with other settings, as resume_changed says: %s", "; ".join(changed))

    def is_poisoned(self) -> bool:
        """Whether weights, moments or averages hold something that is not finite. Collective; reads all."""
        engines = self.stage.engines.values()
        fragments = [f for engine in engines for f in engine.fragments()]
        parts = [part for f in fragments for part in (f.master, *f.moments.values())]
        parts += [part for engine in engines for part in engine.whole_state.values()]
        parts += [value for profile in self.ema.profiles for value in self.ema.values(profile)]
        return collectives.any_rank(not all(bool(torch.isfinite(part).all()) for part in parts))

    def rewind(self, incident: Incident) -> None:
        """Back to the newest good checkpoint, never to see the incident's samples again. Collective."""
        if self.env.is_main:
            write_journal(self.config.run_dir, self.healer.journal())
        details: dict[str, Any] = {"kind": incident.kind, "value": incident.value}
        details |= {"skipped": list(incident.ordinals), "culprits": list(incident.culprits)}
        failure = self.checkpoints.settle()
        if failure is not None:
            logger.error("%s", failure)
        handle = self.checkpoints.latest_good()
        if handle is not None:
            details |= {"reached": self.state.step, "back_to": handle.step}
        self.sinks.event(incident.step, self.state.samples_seen, "rewind", **details)
        if handle is None:
            raise FatalFault(f"{incident.kind} at step {incident.step}, and no checkpoint to go back to.")
        self.restore(handle)
        logger.warning("rewound to step %d", self.state.step)

    def averaged_weights(self) -> AbstractContextManager[None]:
        """The averaged weights in place of the trained ones, for pictures. Collective."""
        if not self.config.ema.decay:
            return nullcontext()
        return self.ema.swapped(self.stage.engines[self.stage.averaged], "decay")

    def close(self) -> None:
        """Let go of writers, sinks, and loader processes that nobody has taken."""
        for worker in self.workers:
            worker.close()
        self.garbage.close()
        self.profiler.close(self.state.step)
        if self.encode_once is not None:
            self.encode_once.close()
        self.checkpoints.close()
        if self.snapshots is not None:
            self.snapshots.close()
        self.sinks.close()
        if self.lease is not None:
            self.lease.release()
