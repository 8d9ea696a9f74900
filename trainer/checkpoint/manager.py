"""Saving and loading the whole state of a run: what the training loop talks to."""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from data_pipeline.errors import Failure, as_failure
from data_pipeline.storage.files import check_writable
from data_pipeline.storage.urls import join
from trainer.checkpoint.catalogue import (
    CheckpointHandle,
    Retention,
    checkpoints_url,
    folder_name,
    open_checkpoint,
    problems,
    snapshots_url,
    steps_found,
)
from trainer.checkpoint.contents import Contents, Stored, WholeState, load_averages, load_engine, spans_of
from trainer.checkpoint.export import CONTENTS, read_state
from trainer.checkpoint.host_buffer import HostBuffer
from trainer.checkpoint.layout import FROZEN, MASTER, WHOLE, ShardPlan
from trainer.checkpoint.manifest import BadManifest, Manifest, StoredFile, tables_text
from trainer.checkpoint.reader import EngineReader, check_shapes
from trainer.checkpoint.writer import Commit, Job
from trainer.checkpoint.writer_client import BackgroundWriter, InlineWriter, Writer
from trainer.config.identity import Difference, check_optimizer_state, check_resume
from trainer.config.run import Config, ConfigError
from trainer.distributed import collectives
from trainer.distributed.engine import Engine
from trainer.distributed.env import DistributedEnv
from trainer.distributed.frozen import FrozenWeights
from trainer.ema import EMA
from trainer.reliability.lease import Lease
from trainer.weights import read_weights

logger = logging.getLogger(__name__)

_PATIENCE_S = 1800.0


@dataclass(frozen=True)
class Loaded:
    """What `CheckpointManager.save` was given, and what has changed since."""

    step: int
    state: dict[str, Any]
    tensors: dict[str, Tensor]
    changed: tuple[Difference, ...]
    """Settings that define the run and are not what they were; `resume_changed` names them."""


@dataclass(frozen=True)
class SaveReport:
    """What the last save cost this rank's training."""

    step: int
    blocked_s: float
    """Seconds for which training stood still."""
    waited_s: float
    """Part of it spent on the previous save: storage is slower than the interval."""
    num_bytes: int
    """Bytes of this rank's shard."""


class CheckpointManager:
    """Checkpoints of one run, in run_dir/checkpoints. Methods are collective, but for `close`."""

    def __init__(
        self,
        config: Config,
        env: DistributedEnv,
        buffer: HostBuffer | None = None,
        lease: Lease | None = None,
    ) -> None:
        """Raises UserError or RetryableFault on all ranks when the folder cannot be written to.

        lease: on rank 0, the run's hold on its folder; released by whoever took it.
        buffer: memory for the copy, begun early so that the first save need not wait for it; closed here.
        """
        self._config = config
        self._env = env
        self._folder = checkpoints_url(config.run_dir)
        failure: Failure | None = None
        if env.is_main:
            try:
                check_writable(self._folder)
            except Failure as error:
                failure = as_failure(error, "rank 0")
        session = f"{0 if lease is None else lease.claim.token}-{uuid.uuid4().hex[:8]}"
        session, failure = collectives.broadcast_object((session, failure))
        if failure is not None:
            raise failure
        self._session: str = session
        self._lease = lease
        self._attempts = 0
        self._pending = False
        self._waited_s = 0.0  # since the last save
        self._buffer = buffer
        self._shards: dict[tuple[tuple[str, tuple[str, ...]], ...], tuple[bytes, tuple[int, ...]] | None] = {}
        self._writer: Writer = BackgroundWriter() if config.checkpoint.asynchronous else InlineWriter()
        self.last_save: SaveReport | None = None
        self.committed = False
        """Whether a checkpoint of this configuration is known to be committed, or was taken over."""

    def save(
        self,
        step: int,
        engines: Mapping[str, Stored],
        ema: EMA,
        *,
        state: dict[str, Any],
        tensors: dict[str, Tensor],
        loss: float | None,
        metrics: dict[str, float] | None = None,
    ) -> None:
        """Take a checkpoint. When writing is asynchronous, returns once the state is copied.

        Args:
            state: JSON-able; the same on every rank.
            tensors: small ones beside the weights; rank 0's count.
            loss: recent training loss; rank 0's counts.
            metrics: what was measured on held-out samples at this step. `checkpoint.keep_best` goes by one of
                them, or by the loss.

        Raises:
            UserError, RetryableFault: on all ranks: this save failed, or, when asynchronous, the one
                before (unless `settle` has been told). Earlier checkpoints are intact.
        """
        contents = Contents.of_checkpoint(
            step, engines, ema, state=state, tensors=tensors, loss=loss, metrics=metrics
        )
        wanted = self._config.checkpoint
        retention = Retention(wanted.keep_last, wanted.keep_every, wanted.keep_best, wanted.best_metric)
        self._submit(contents, self._folder, retention)

    def save_snapshot(
        self, step: int, engines: Mapping[str, Stored], ema: EMA, *, tensors: dict[str, Tensor]
    ) -> None:
        """Keep the power-function averages of this step for ever, for `ldm ema`.

        Costs and raises what `save` does.
        """
        contents = Contents.of_snapshot(step, engines, ema, tensors)
        for_ever = Retention(keep_last=1, keep_every=1, keep_best=0)
        self._submit(contents, snapshots_url(self._config.run_dir), for_ever)

    def _submit(self, contents: Contents, folder: str, retention: Retention) -> None:
        self.wait()
        waited, self._waited_s = self._waited_s, 0.0
        begun = time.perf_counter()
        plan = contents.plan()
        shards = self._shards_of_all_ranks(plan)
        buffer = self._buffer_for(plan.data_bytes)
        buffer.fill(contents.vectors(plan))
        commit = self._commit(contents, *shards, retention) if shards else None
        self._attempts += 1
        attempt = f"{self._session}{self._attempts:04x}"
        self._writer.submit(Job(folder, contents.step, attempt, self._env.rank, plan, commit), buffer)
        self._pending = True
        if not self._config.checkpoint.asynchronous:
            self.wait()
        blocked = waited + time.perf_counter() - begun
        self.last_save = SaveReport(contents.step, blocked, waited, plan.data_bytes)
        logger.debug(
            "checkpoint of step %d: blocked %.3f s, %d bytes", contents.step, blocked, plan.data_bytes
        )

    @property
    def failed(self) -> bool:
        """Whether this rank knows by now that the newest save failed, or the next one will: another job has
        taken the folder. Does not wait; not collective."""
        taken = self._lease is not None and self._lease.lost is not None
        return taken or (self._pending and self._writer.failed())

    def settle(self) -> Failure | None:
        """Return when everything submitted is committed, or with the reason why it is not."""
        if not self._pending:
            return None
        begun = time.perf_counter()
        self._pending = False
        of_ranks: list[Failure | None] = collectives.all_gather_object(self._writer.shard_result())
        failure = next(filter(None, of_ranks), None)
        if failure is not None:
            failure.share = sum(each is not None for each in of_ranks) / len(of_ranks)
        if failure is None:
            # Every rank's shard is there, so that the commit waits for nobody.
            committed = self._writer.commit_result() if self._env.is_main else None
            if committed is not None and self._lease is not None:
                committed = self._lease.taken() or committed  # the writer process knows no class of errors
            if committed is not None:
                committed.share = 0.0
            failure = collectives.broadcast_object(committed)
            self.committed = self.committed or failure is None
        else:
            self._writer.abandon()  # rank 0's waits for the shard that is missing
        self._waited_s += time.perf_counter() - begun
        return failure

    def wait(self) -> None:
        """The same, but raises that reason: UserError or RetryableFault, on all ranks."""
        failure = self.settle()
        if failure is not None:
            raise failure

    def latest_good(self, known: CheckpointHandle | None = None) -> CheckpointHandle | None:
        """See `newest_good`."""
        return newest_good(self._config.run_dir, self._env, known)

    def load(
        self,
        handle: CheckpointHandle,
        engines: Mapping[str, Engine],
        ema: EMA,
        frozen: FrozenWeights | None = None,
        expected: Config | None = None,
        contents: Mapping[str, str] | None = None,
    ) -> Loaded:
        """Restore engines and averages, whatever the layout of ranks and ZeRO stage that saved them.

        Args:
            expected: the configuration that the checkpoint's last step was to be made with; None: the run's.
            contents: checksums of what the run has read from files, by setting (`trainer/frozen_files.py`).

        Raises:
            ConfigError: the networks or the frozen weights are not the stored ones, or a setting that
                defines the run is not what it was (`trainer/config/identity.py`); nothing has been restored.
        """
        stored, tensors = collectives.from_main_rank(lambda: _read_small(handle))
        check_optimizer_state(stored["config"], self._config, handle.url)
        for name, engine in engines.items():  # first: no word lets weights of other shapes in
            check_shapes(handle, name, engine.parameter_shapes)
        held = stored["state"].get(CONTENTS)
        now = expected or self._config
        changed = check_resume(stored["config"], now, handle.url, held=held, holds=contents)
        if frozen is not None:
            self._check_frozen(handle, frozen)
        for name, engine in engines.items():
            reader = EngineReader(handle, name)
            load_engine(reader, engine, int(stored["optimizer_steps"][name]))
            if engine.whole_state:
                WholeState(engine.whole_state).load(EngineReader(handle, f"{name}.{WHOLE}"))
            if engine.fragments() is ema.fragments:
                load_averages(reader, handle.manifest.kinds[name], ema)
            engine.refresh(moments=True)
        self.committed = True
        return Loaded(handle.step, stored["state"], tensors, changed)

    def _check_frozen(self, handle: CheckpointHandle, frozen: FrozenWeights) -> None:
        check_shapes(handle, FROZEN, frozen.parameter_shapes)
        stored = [torch.empty_like(fragment.master) for fragment in frozen.fragments()]
        EngineReader(handle, FROZEN).read_into(MASTER, spans_of(frozen.fragments()), stored)
        of_ranks = collectives.all_gather_object(frozen.differing(stored))
        names = sorted({name for names in of_ranks for name in names})
        if names:
            raise ConfigError(
                f"the checkpoint {handle.url} was trained beside other frozen weights: {len(names)} of them "
                f"differ, such as {names[0]}; let init_from name the weights that it began with, or name "
                f"another run_dir (init_from={self._config.run_dir} starts it from these weights)."
            )

    def close(self) -> None:
        """Let go of the writer and the buffer. Not collective; `wait` first to learn of failures."""
        self._writer.close()
        if self._buffer is not None:
            self._buffer.close()
            self._buffer = None

    def _shards_of_all_ranks(self, plan: ShardPlan) -> tuple[bytes, tuple[int, ...]] | None:
        """On rank 0, their tables as JSON and the bytes of their files; None on the others.

        Told once per set of flat tensors, since the layout of a run does not change; as text, so that rank 0
        has nothing to do for each of the 270,000 spans of SD2 under ZeRO-3 on 512 ranks.
        """
        key = tuple(plan.kinds.items())
        if key not in self._shards:
            everywhere = collectives.gather_object((tables_text(plan.tables), plan.file_bytes))
            if everywhere is None:
                self._shards[key] = None
            else:
                tables, sizes = zip(*everywhere, strict=True)
                self._shards[key] = b"[%s]" % b",".join(tables), sizes
        return self._shards[key]

    def _buffer_for(self, num_bytes: int) -> HostBuffer:
        """Memory for the copy, kept between saves. The writer attaches to the first: it is the largest."""
        if self._buffer is not None and self._buffer.num_bytes < num_bytes:
            self._writer.close()
            self._buffer.close()
            self._buffer = None
        if self._buffer is None:
            self._buffer = HostBuffer(num_bytes, self._env.device)
        return self._buffer

    def _commit(
        self, contents: Contents, tables: bytes, sizes: tuple[int, ...], retention: Retention
    ) -> Commit:
        unknown = StoredFile("", 0, "")
        return Commit(
            manifest=Manifest(
                step=contents.step,
                shards=(),
                state=unknown,
                tensors=unknown,
                tables=(),
                kinds=contents.kinds,
                shapes=contents.shapes(),
                loss=contents.loss,
                best_metric=self._config.checkpoint.best_metric,
                metrics=contents.metrics,
            ),
            tables=tables,
            sizes=sizes,
            state=contents.state_file(self._config, self._env.world_size),
            tensors=contents.tensors_file(),
            retention=retention,
            patience_s=_PATIENCE_S,
            claim=self._lease.claim if self._lease is not None else None,
        )


def newest_good(
    run_dir: str, env: DistributedEnv, known: CheckpointHandle | None = None
) -> CheckpointHandle | None:
    """The newest checkpoint whose every byte is as written; None when there is none. Collective.

    All ranks share the reading. A damaged checkpoint is reported and passed over.

    Args:
        known: one that was found good before, and is not read again.
    """
    folder = checkpoints_url(run_dir)
    for step in collectives.from_main_rank(lambda: steps_found(folder)):
        url = join(folder, folder_name(step))
        if known is not None and known.url == url:
            return known
        handle, found = _inspect(url, env)
        if handle is not None and not found:
            return handle
        if env.is_main:
            logger.warning("checkpoint %s is not used: %s", url, "; ".join(found[:5]))
    return None


def _inspect(url: str, env: DistributedEnv) -> tuple[CheckpointHandle | None, list[str]]:
    def opened() -> tuple[CheckpointHandle | None, list[str]]:
        try:
            return open_checkpoint(url), []
        except BadManifest as error:
            return None, [str(error)]

    handle, found = collectives.from_main_rank(opened)
    if handle is not None:
        found = problems(handle, handle.manifest.files[env.rank :: env.world_size])
    elif not env.is_main:
        found = []
    return handle, [line for lines in collectives.all_gather_object(found) for line in lines]


def _read_small(handle: CheckpointHandle) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What is stored beside the shards."""
    tensors, _ = read_weights(join(handle.url, handle.manifest.tensors.name))
    return read_state(handle), tensors
