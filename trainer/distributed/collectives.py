"""The few collectives that the trainer needs; all do nothing with one rank.

What ranks tell each other on the host goes by recursive doubling, here on six ranks (0 .. 3 are a power of
two, 4 and 5 hand in beforehand and are told afterwards):

    4 -> 0, 5 -> 1 |  0 <-> 1  2 <-> 3  |  0 <-> 2  1 <-> 3  |  0 -> 4, 1 -> 5

After round k each rank knows what 2^k ranks know, so N ranks need log2 N rounds: 9 at 512, where gloo's ring
all-reduce takes 1,022 hops one after another. Both partners of a round form the same sum of two terms, so all
ranks end with the same bits.
"""

from __future__ import annotations

import logging
import math
import pickle
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, TypeAlias, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from data_pipeline.errors import Failure, as_failure
from trainer.exit_codes import StopRequest

logger = logging.getLogger(__name__)
T = TypeVar("T")

Told: TypeAlias = Callable[[str, int, int], object]
"""Called with what is done, how much of it, of how much."""
_SLICE_S = 1.0
"""Seconds between two words of long work: far below any timeout of a group."""


class _Word(NamedTuple):
    """What rank 0 says while it works, where an answer would be the end."""

    said: tuple[str, int, int]


def world_size() -> int:
    """Ranks in the process group; 1 without one."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """This rank; 0 without a process group."""
    return dist.get_rank() if dist.is_initialized() else 0


def reduce_sum(tensor: Tensor) -> Tensor:
    """Sum over ranks, on every rank, as a new tensor."""
    if world_size() == 1:
        return tensor
    total = tensor.detach().clone()
    dist.all_reduce(total)
    return total


def any_rank(flag: bool) -> bool:
    """Whether the flag is set on at least one rank. Does not wait for a GPU."""
    if world_size() == 1:
        return flag
    return bool(_sum(torch.tensor([int(flag)])).item() > 0)


def all_gather_object(value: Any) -> list[Any]:
    """The values of all ranks, in rank order, on every rank."""
    if world_size() == 1:
        return [value]
    known = {rank(): value}
    for partner, sends, receives in _rounds(rank(), world_size()):
        told = _exchange(partner, pickle.dumps(known) if sends else None, receives)
        if told is not None:
            known.update(pickle.loads(told))  # from our own ranks
    return [known[r] for r in range(world_size())]


def _sum(tensor: Tensor) -> Tensor:
    """Sum over ranks of a small tensor on the CPU, the same bits on every rank."""
    for partner, sends, receives in _rounds(rank(), world_size()):
        sending = dist.isend(tensor, partner) if sends else None
        if receives:
            theirs = torch.empty_like(tensor)
            dist.recv(theirs, partner)
        if sending is not None:
            sending.wait()
        if receives:
            told = partner < rank() and not sends  # the whole sum
            tensor = theirs if told else tensor + theirs
    return tensor


def _exchange(partner: int, data: bytes | None, receives: bool) -> bytes | None:
    """Send bytes to another rank, or receive some from it, or both at once."""
    sending = []
    if data is not None:
        content = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        sending = [dist.isend(torch.tensor([len(data)]), partner), dist.isend(content, partner)]
    told = None
    if receives:
        size = torch.empty(1, dtype=torch.int64)
        dist.recv(size, partner)
        buffer = torch.empty(int(size), dtype=torch.uint8)
        dist.recv(buffer, partner)
        told = buffer.numpy().tobytes()
    for work in filter(None, sending):
        work.wait()
    return told


def _rounds(rank: int, ranks: int) -> Iterator[tuple[int, bool, bool]]:
    """(partner, whether to send to it, whether to receive from it) of this rank, round by round.

    >>> list(_rounds(0, 6))
    [(4, False, True), (1, True, True), (2, True, True), (4, True, False)]
    >>> list(_rounds(4, 6))
    [(0, True, False), (0, False, True)]
    """
    power = 1 << (ranks.bit_length() - 1)
    if rank >= power:
        yield rank - power, True, False
        yield rank - power, False, True
        return
    folded = rank + power < ranks
    if folded:
        yield rank + power, False, True
    distance = 1
    while distance < power:
        yield rank ^ distance, True, True
        distance *= 2
    if folded:
        yield rank + power, True, False


def gather_object(value: Any) -> list[Any] | None:
    """The values of all ranks, in rank order, on rank 0; None on the others."""
    if world_size() == 1:
        return [value]
    values: list[Any] | None = [None] * world_size() if rank() == 0 else None
    dist.gather_object(value, values)
    return values


def fold_to_main(tensors: Callable[[], Sequence[Tensor]], merge: Callable[[list[Tensor]], object]) -> None:
    """Merge what the ranks have into rank 0, pair by pair. Collective; goes through the CPU.

    Args:
        tensors: gives what this rank has by now, the same shapes and types on every rank.
        merge: takes in what another rank has.
    """
    step = 1
    while step < world_size():
        if rank() % (2 * step):
            for tensor in tensors():
                dist.send(tensor.cpu(), rank() - step)
            return
        if rank() + step < world_size():
            received = [torch.empty_like(tensor, device="cpu") for tensor in tensors()]
            for tensor in received:
                dist.recv(tensor, rank() + step)
            merge(received)
        step *= 2


def broadcast_object(value: Any, source: int = 0) -> Any:
    """The value that rank `source` passed, on every rank."""
    if world_size() == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values, src=source)
    return values[0]


def from_main_rank(make: Callable[[], T]) -> T:
    """What `make` gives on rank 0, or the failure it ends in there, on every rank; the others only wait."""
    return _made(broadcast_object(_attempt(make) if rank() == 0 else None))


def _attempt(make: Callable[[], T]) -> tuple[T | None, Failure | None]:
    try:
        return make(), None
    except Exception as error:
        failure = as_failure(error, "rank 0")
        if failure is not error:  # the others get the sentence, this rank keeps the traceback
            logger.exception("only rank 0 does this, and it failed")
        return None, failure


def _made(answer: tuple[T | None, Failure | None]) -> T:
    value, failure = answer
    if failure is not None:
        raise failure
    return cast(T, value)


def worked_on_main_rank(make: Callable[[Told], T], told: Told) -> T:
    """The same of work that may take hours, which tells of itself: nobody gives up a rank that gets on.

    A broadcast that waits for hours ends with the group's timeout. So each word of the work goes to all
    ranks, as often as `_SLICE_S` allows: while it speaks, no collective waits for longer than that.

    Args:
        make: is given what it must call again and again, many times within the group's timeout, also when
            nothing new is done.
        told: called on every rank with what rank 0 says: what is done, how much of it, of how much.
    """
    if world_size() == 1:
        return _made(_attempt(partial(make, told)))
    if rank() > 0:
        while isinstance(answer := broadcast_object(None), _Word):
            told(*answer.said)
        return _made(answer)
    spoke = -math.inf

    def tell(what: str, done: int, total: int) -> None:
        nonlocal spoke
        told(what, done, total)
        if time.monotonic() - spoke >= _SLICE_S:
            broadcast_object(_Word((what, done, total)))
            spoke = time.monotonic()

    return _made(broadcast_object(_attempt(partial(make, tell))))


def on_every_rank(make: Callable[[], T]) -> T:
    """What `make` gives on this rank; if it fails on any rank, its failure on all. Collective.

    So no rank waits in the next collective for one that has given up.
    """
    value, failure = None, None
    try:
        value = make()
    except Exception as error:
        failure = as_failure(error, f"rank {rank()}")
        if failure is not error:
            logger.exception("rank %d failed", rank())
    for other in all_gather_object(failure):
        if other is not None:
            raise other
    return cast(T, value)


def barrier() -> None:
    """Wait until every rank is here. Goes through the CPU, so it does not wait for a GPU."""
    any_rank(False)


@dataclass(frozen=True)
class Agreed:
    """The same on every rank."""

    request: StopRequest
    """Strongest stop request of any rank."""
    data_lost: bool
    """Whether some rank cannot get its next batch."""
    save_failed: bool
    """Whether some rank knows that the newest checkpoint could not be written."""
    losses: tuple[float, ...]
    """Means over ranks of the losses that were handed in; NaN where one rank's was."""
    seen: float = 0.0
    """Sum over ranks of the samples that their loaders have looked at."""
    profile: bool = False
    """Whether rank 0 was asked for a profile of the next steps."""


def agree(
    request: StopRequest,
    *,
    data_lost: bool,
    save_failed: bool,
    losses: Sequence[float],
    seen: float = 0.0,
    profile: bool = False,
) -> Agreed:
    """What all ranks decide together, once a step: log2 of the ranks messages; waits for no GPU. Collective.

    Every rank hands in equally many losses. With one rank, the answer is what was handed in.
    """
    ranks = world_size()
    if ranks == 1:
        return Agreed(request, data_lost, save_failed, tuple(losses), seen, profile)
    # One slot per request level makes the maximum a sum, so a single reduction carries everything.
    levels = [float(level is request) for level in StopRequest]
    head = [*levels, float(data_lost), float(save_failed), float(seen), float(profile)]
    message = torch.tensor([*head, *losses], dtype=torch.float64)
    message = _sum(message)
    *counts, lost, failed, seen, profiles = message[: len(head)].tolist()
    asked = max(level for level, count in zip(StopRequest, counts, strict=True) if count > 0)
    means = message[len(head) :] / ranks
    return Agreed(asked, lost > 0, failed > 0, tuple(means.tolist()), seen, profiles > 0)
