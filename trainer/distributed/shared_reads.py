"""Weights are read once per job: rank 0 reads a file, and every rank has its tensors.

What reads weights (`trainer.weights.read_weights`, a first stage, a text tower, the file of a tag on the hub)
knows nothing of ranks. Inside `read_together` each such read is rank 0's alone:

    rank 0      asks storage or the hub, and tells the others every second that it is still at it
                names, shapes and types of what it has; or the failure, which every rank raises
    all ranks   the bytes, in buckets of 64 MiB, through NCCL where there are GPUs, else through gloo

So storage sees as many requests for 512 ranks as for one, a file need only be where rank 0 is, and all ranks
hold the same bits. Every rank has to make the same reads in the same order, which follows from the same
configuration.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import AbstractContextManager
from contextvars import copy_context
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils import _pytree as pytree

from trainer.distributed import collectives
from trainer.weights import read_alone, read_through

BUCKET_BYTES = 64 << 20
"""What lies in memory, on the device as well, beside the tensors themselves."""

_PATIENCE_S = 1800
"""Then rank 0 falls silent, and whoever waits gives up in the usual time."""

T = TypeVar("T")


@dataclass(frozen=True)
class _TensorForm:
    """What is told of a tensor before its bytes."""

    shape: torch.Size
    dtype: torch.dtype


def read_together(
    device: torch.device, alive: Callable[[], object] = lambda: None
) -> AbstractContextManager[None]:
    """Inside, rank 0 reads weights for all. Every rank enters.

    Args:
        device: what the ranks compute on; tells by which network they have the bytes.
        alive: called on every rank every second while rank 0 reads, for half an hour at most.
    """

    def of_all(read: Callable[[], T]) -> T:
        return tensors_from_main_rank(read, device, alive)

    return read_through(of_all)


def tensors_from_main_rank(
    make: Callable[[], T], device: torch.device, alive: Callable[[], object] = lambda: None
) -> T:
    """What `make` gives on rank 0, on every rank, with the tensors in it (on the CPU); or its failure.

    Collective. For dictionaries, tuples and lists of tensors of any size and type, and whatever small there
    is beside them.
    """
    if collectives.world_size() == 1:
        return make()
    made: list[T] = []

    def work(tell: collectives.Told) -> object:
        with read_alone():
            made.append(_telling(make, tell))
        return pytree.tree_map_only(Tensor, lambda tensor: _TensorForm(tensor.shape, tensor.dtype), made[0])

    with torch.device("cpu"):  # whatever device modules are being built on
        forms = collectives.worked_on_main_rank(work, lambda what, done, total: alive())
        if not made:
            made.append(
                pytree.tree_map_only(
                    _TensorForm, lambda form: torch.empty(form.shape, dtype=form.dtype), forms
                )
            )
        tensors = [leaf for leaf in pytree.tree_leaves(made[0]) if isinstance(leaf, Tensor)]
        _broadcast_bytes(tensors, device)
    return made[0]


def _telling(make: Callable[[], T], tell: collectives.Told) -> T:
    """What `make` gives in a thread, while this one says that it is at it. `make` must do no collective."""
    with ThreadPoolExecutor(1, "read") as thread:
        reading = thread.submit(copy_context().run, make)
        for second in range(_PATIENCE_S):
            if wait([reading], timeout=1.0).done:
                break
            tell("reading weights", second, _PATIENCE_S)
        return reading.result()


def _broadcast_bytes(tensors: Sequence[Tensor], device: torch.device) -> None:
    """Fill the tensors of all ranks with rank 0's bytes."""
    sends = collectives.rank() == 0
    views = [tensor.detach().contiguous().reshape(-1).view(torch.uint8) for tensor in tensors]
    sizes = [view.numel() for view in views]
    bucket = torch.empty(min(BUCKET_BYTES, sum(sizes)), dtype=torch.uint8, device=device)
    for pieces in _buckets(sizes, BUCKET_BYTES):
        filled = sum(stop - start for _, start, stop in pieces)
        parts = bucket[:filled].split([stop - start for _, start, stop in pieces])
        if sends:
            for part, (index, start, stop) in zip(parts, pieces, strict=True):
                part.copy_(views[index][start:stop])
        dist.broadcast(bucket[:filled], src=0)
        if not sends:
            for part, (index, start, stop) in zip(parts, pieces, strict=True):
                views[index][start:stop].copy_(part)


def _buckets(sizes: Sequence[int], most: int) -> Iterator[list[tuple[int, int, int]]]:
    """(tensor, first byte, end) of every piece, in groups of `most` bytes, the last one smaller.

    >>> list(_buckets([3, 0, 6], 4))
    [[(0, 0, 3), (2, 0, 1)], [(2, 1, 5)], [(2, 5, 6)]]
    """
    pieces: list[tuple[int, int, int]] = []
    room = most
    for index, size in enumerate(sizes):
        start = 0
        while start < size:
            stop = min(size, start + room)
            pieces.append((index, start, stop))
            room -= stop - start
            start = stop
            if not room:
                yield pieces
                pieces, room = [], most
    if pieces:
        yield pieces
