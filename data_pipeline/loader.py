"""build_loader: one rank's share of every optimizer step, in an order that no layout can change.

The door of the pipeline: what else the trainer asks of a data set, held-out samples among it, is here too.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import logging
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch

from data_pipeline.batch import Batch, Cached, Tally, no_pixels
from data_pipeline.config import DataConfig
from data_pipeline.errors import DataError
from data_pipeline.feed.conditions import check_conditions, condition_arrays
from data_pipeline.feed.held_out import HELD_OUT_SEED, HeldOutBatch, held_out_batches
from data_pipeline.feed.share import FilledShare, InlineShare
from data_pipeline.feed.task import ShareTask
from data_pipeline.feed.worker import WorkerProcess
from data_pipeline.moments.entry import Moments, MomentsCache
from data_pipeline.order.lanes import Order, Part, deal, lanes_of
from data_pipeline.order.position import (
    Position,
    beginning,
    earliest_epoch,
    first_epoch_of,
    later,
    merge_positions,
    pack,
    unpack,
)
from data_pipeline.order.turns import Turns
from data_pipeline.shards.dataset import Dataset
from data_pipeline.shards.growth import as_begun, walks_of
from data_pipeline.shards.held_out import HeldOut, open_held_out
from data_pipeline.shards.opening import open_dataset
from data_pipeline.shards.removals import read_removals
from data_pipeline.storage.files import cut_torn_line
from data_pipeline.storage.urls import local_path

if TYPE_CHECKING:
    from data_pipeline.feed.resampled import ResampledLoader

logger = logging.getLogger(__name__)

__all__ = [
    "HELD_OUT_SEED",
    "AnyLoader",
    "Dataset",
    "HeldOut",
    "HeldOutBatch",
    "Loader",
    "Part",
    "Position",
    "WorkerProcess",
    "beginning",
    "blank_batch",
    "build_loader",
    "check_layout",
    "held_out_batches",
    "merge_positions",
    "open_dataset",
    "open_held_out",
    "position_near",
    "start_workers",
]

AnyLoader: TypeAlias = "Loader | ResampledLoader"


def build_loader(
    config: DataConfig,
    *,
    seed: int,
    global_batch_size: int,
    part: Part = Part(),  # noqa: B008 - it is frozen
    position: Position = None,
    skip_ordinals: Iterable[int] = (),
    dataset: Dataset | None = None,
    moments: Moments | None = None,
    workers: Sequence[WorkerProcess] = (),
) -> AnyLoader:
    """Loader of one rank: an endless iterator of Batch, each its part of a global batch.

    `position` is `merge_positions` of what all ranks' last consumed batches carry; it fits any number of
    ranks and workers. Or it is the `beginning` of an indexed order. A rank that no lane is left for has
    batches without samples. `skip_ordinals` are never served again. `moments`: with a cache, batches have
    `cached`, and pixels only where it has nothing. `workers`: of this rank, by `start_workers`; they are
    closed with the loader. Raises DataError within seconds when the storage, the shards or the configuration
    are wrong.
    """
    first_epoch = first_epoch_of(position)
    if first_epoch is not None:
        position = None
    if config.order == "resampled":
        # webdataset is heavy to import, and only this mode needs it
        from data_pipeline.feed.resampled import ResampledLoader

        last = position if isinstance(position, dict) or position is None else merge_positions(position)
        return ResampledLoader(
            config,
            seed=seed,
            global_batch_size=global_batch_size,
            part=part,
            position=last,
        )
    workers = workers or start_workers(config, part.rank)
    try:
        check_conditions(config)
        dataset = dataset or open_dataset(config, at_once=True)
        tasks = _tasks(
            config,
            dataset,
            seed=seed,
            global_batch_size=global_batch_size,
            part=part,
            position=position,
            skip_ordinals=frozenset(int(o) for o in skip_ordinals),
            first_epoch=first_epoch or 0,
        )
        if moments is not None:
            tasks = [dataclasses.replace(task, moments=moments) for task in tasks]
        used = len(tasks) if tasks[0].lanes else 0
        for idle in workers[used:]:
            idle.close()
        return Loader(tasks, workers[:used], rank=part.rank)
    except BaseException:
        for worker in workers:
            worker.close()
        raise


def start_workers(config: DataConfig, rank: int) -> list[WorkerProcess]:
    """The loader processes of a rank, for `build_loader`; to be closed where that is not reached.

    They import what reading takes, and make the storage's client, while others open the data set and build
    networks.
    """
    if config.order == "resampled":
        return []
    return [WorkerProcess(config, name=f"{rank}.{i}") for i in range(config.workers)]


def _tasks(
    config: DataConfig,
    dataset: Dataset,
    *,
    seed: int,
    global_batch_size: int,
    part: Part,
    position: Position,
    skip_ordinals: frozenset[int],
    first_epoch: int,
) -> list[ShareTask]:
    """What each worker of this rank does; at least one task, if need be without lanes."""
    dataset = as_begun(config, dataset, position)
    order = dataset.walk(config, seed=seed, global_batch_size=global_batch_size, position=position)
    mine = lanes_of(part, order.lanes, global_batch_size)
    dataset, buckets, fingerprint = walks_of(config, dataset, order, position)
    # What is accepted is in the orders of the buckets by now.
    dataset = dataclasses.replace(dataset, accepted=None)
    step, states = unpack(position, order, fingerprint, buckets, first_epoch)
    each = len(buckets.orders)
    removals = read_removals(config.removal_lists)
    return [
        ShareTask(
            config=config,
            dataset=dataset,
            order=order,
            lanes=lanes,
            buckets=buckets,
            step=step,
            states=tuple(states[lanes.start * each : lanes.stop * each]),
            per_lane=global_batch_size // order.lanes,
            skip_ordinals=skip_ordinals,
            removals=removals,
        )
        for lanes in deal(mine, max(1, min(config.workers, len(mine))))
    ]


def check_layout(
    config: DataConfig, dataset: Dataset, *, seed: int, global_batch_size: int, position: Position = None
) -> Order | Turns:
    """The order of a run, which is at a position; raises DataError when the data do not fill its lanes or
    buckets."""
    dataset = as_begun(config, dataset, position)
    order = dataset.walk(config, seed=seed, global_batch_size=global_batch_size, position=position)
    dataset.buckets(config, order)
    return order


def position_near(
    config: DataConfig,
    dataset: Dataset,
    *,
    seed: int,
    global_batch_size: int,
    step: int,
    known: Position = None,
    served: float = 1.0,
) -> Position:
    """About the position of a run at a step, from one that is `known` and earlier, the beginning if need be;
    without an index the known one.

    For those who need not read what the run has read, only what it will: where samples are rejected that the
    index could not tell, lanes stand as if it were the share `1 - served` everywhere. Raises DataError when
    the known position belongs to another order.
    """
    dataset = as_begun(config, dataset, known)
    order = dataset.walk(config, seed=seed, global_batch_size=global_batch_size, position=known)
    if isinstance(order, Turns):
        return known
    dataset, buckets, fingerprint = walks_of(config, dataset, order, known)
    before, states = unpack(known, order, fingerprint, buckets)
    if step <= before:
        return known
    steps, per_lane = (before, step), global_batch_size // order.lanes
    moved = later(states, buckets, steps=steps, per_lane=per_lane, served=served)
    return pack(order, dataset.shards, buckets, step, 0, [state.as_json() for state in moved])


def _reject_file(config: DataConfig, rank: int) -> Path | None:
    """The reject file of a rank, known to be writable. Raises DataError when it is not."""
    if not config.reject_file:
        return None
    name = config.reject_file.replace("{rank}", str(rank))
    path = Path(local_path(name))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        cut_torn_line(path)
        there = path.exists()
        path.open("a").close()
        if not there:
            path.unlink()
    except OSError as error:
        raise DataError(
            f"data.reject_file {path} cannot be written ({error.strerror}); name another."
        ) from error
    return path


def blank_batch(config: DataConfig, size: int, caption: str) -> Batch:
    """`size` black squares with conditions of zeros, in the shapes and types that training gets."""
    edge, numbers = config.image_size, torch.arange(size)
    conditions = {
        name: torch.zeros((size, *shape), dtype=getattr(torch, dtype))
        for name, (dtype, shape) in condition_arrays(config, edge, edge).items()
    }
    pixels = torch.zeros((size, edge, edge, 3), dtype=torch.uint8).permute(0, 3, 1, 2)
    return Batch(pixels, (caption,) * size, conditions, ("blank",) * size, numbers, numbers, position={})


class Loader(Iterator[Batch]):
    """Iterator of Batch; close it, or use it as a context manager, to stop its processes."""

    def __init__(self, tasks: Sequence[ShareTask], workers: Sequence[WorkerProcess], *, rank: int) -> None:
        """One worker per task, or none: then this process does the only task itself."""
        task = tasks[0]
        self._tasks = tasks
        self._order = task.order
        self._buckets = task.buckets
        self._step = task.step
        self._shards = task.dataset.shards
        self._size = sum(t.size for t in tasks)
        self._moved([state.as_json() for task in tasks for state in task.states])
        self._first_slot = tasks[0].lanes.start * task.per_lane
        self.tally = Tally()
        """Samples served and rejected, of this rank, since the loader was opened."""
        self.counts: Counter[str] = Counter()
        """requests, bytes, retries, failures of this rank."""
        self.wait_s = 0.0
        """Seconds that __next__ has waited for data in total."""
        self._reject_file = _reject_file(task.config, rank)
        for worker, each in zip(workers, tasks, strict=bool(workers)):
            worker.begin(each)
        self._sources: Sequence[WorkerProcess | InlineShare] = workers or [InlineShare(task)]

    @property
    def epoch(self) -> int | None:
        """The earliest that a lane of this rank is in, by the batches that were taken; None without lanes."""
        return earliest_epoch(self._position, self._buckets)

    @property
    def rejected(self) -> Counter[str]:
        """Rejected samples by reason."""
        return self.tally.rejected

    def __next__(self) -> Batch:
        began = time.monotonic()
        tensors: dict[str, torch.Tensor] = {}
        shares: list[FilledShare] = []
        filled = 0
        for source, task in zip(self._sources, self._tasks, strict=True):
            share, memory, slot = source.take()
            for name, piece in task.layout(share.height, share.width).arrays(memory).items():
                if name == "pixels" and share.without_pixels:
                    continue
                if name not in tensors:
                    tensors[name] = _host_tensor((self._size, *piece.shape[1:]), piece.dtype)
                    if name == "pixels" and filled:  # of rows before, which had none
                        tensors[name][:filled] = 0
                # NumPy copies in this thread; torch would start threads that spin beside the workers.
                tensors[name].numpy()[filled : filled + len(piece)] = piece
            if share.without_pixels and "pixels" in tensors:
                tensors["pixels"][filled : filled + task.size] = 0
            source.release(slot)
            shares.append(share)
            filled += task.size
        self.wait_s += time.monotonic() - began
        self._step += 1
        self.tally.served += self._size
        self._account(shares)
        size = (self._size, shares[0].height, shares[0].width, 3)
        pixels = tensors.pop("pixels") if "pixels" in tensors else no_pixels(size)
        cached = _cached(self._tasks[0].moments.cache, tensors, shares)
        return Batch(
            pixels=pixels.permute(0, 3, 1, 2),  # [B, 3, H, W], channels last in memory
            cached=cached,
            captions=tuple(itertools.chain.from_iterable(share.captions for share in shares)),
            ordinals=tensors.pop("ordinals"),
            conditions=tensors,
            keys=tuple(itertools.chain.from_iterable(share.keys for share in shares)),
            slots=torch.arange(self._first_slot, self._first_slot + self._size),
            position=self._moved([state for share in shares for state in share.states]),
        )

    def _moved(self, states: Sequence[list[Any]]) -> dict[str, Any]:
        """The position with these states of this rank's lanes."""
        first = self._tasks[0].lanes.start
        self._position = pack(self._order, self._shards, self._buckets, self._step, first, states)
        return self._position

    def _account(self, shares: Sequence[FilledShare]) -> None:
        lines = []
        for share in shares:
            self.counts.update(share.counts)
            for reason, key, detail, ordinal in share.rejects:
                self.tally.rejected[reason] += 1
                record = {"reason": reason, "key": key, "detail": detail, "ordinal": ordinal}
                lines.append(json.dumps(record))
        if lines and self._reject_file:
            with self._reject_file.open("a") as f:
                f.write("\n".join(lines) + "\n")

    def close(self) -> None:
        """Stop the loader processes; safe to call twice."""
        for source in self._sources:
            source.close()
        self._sources = []

    def __enter__(self) -> Loader:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __del__(self) -> None:
        with suppress(Exception):
            self.close()


def _host_tensor(shape: tuple[int, ...], dtype: np.dtype[Any]) -> torch.Tensor:
    """Uninitialised; pinned where there is a GPU, or its copy would wait for all work that was launched."""
    kind = torch.from_numpy(np.empty(0, dtype)).dtype
    return torch.empty(shape, dtype=kind, pin_memory=torch.cuda.is_available())


def _cached(
    cache: MomentsCache | None, tensors: dict[str, torch.Tensor], shares: Sequence[FilledShare]
) -> Cached | None:
    """Takes what belongs to the cache of moments out of the tensors of a batch."""
    if cache is None:
        return None
    values = tensors.pop("moments")
    return Cached(
        values.view(torch.bfloat16) if cache.dtype == "bf16" else values,
        tensors.pop("found"),
        tuple(itertools.chain.from_iterable(share.labels for share in shares)),
    )
