"""Gradients of all micro-batches and ranks; each rank gets the mean of the part that it updates, once a step.

    parameters  w0 w1 w2 | w3 w4 | w5 w6 w7      buckets in the parameters' order; each has an fp32 vector of
                                                 its own, to which every micro-batch is added
    a bucket    | rank 0 | rank 1 | rank 2 --|   padded and cut in equal parts: one reduce-scatter sends each
                                                 element once, where an all-reduce sends it twice
    backward    w7 w6 w5 > w4 w3 > w2 w1 w0 >    of the last micro-batch reaches the last parameters first: a
                     sent^   sent^    sent^      bucket that is whole leaves while backward goes on

Buckets leave last first on every rank, whatever the order in which gradients arrive, so that ranks whose
graphs differ still meet in the same collective.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from trainer.kernels.accumulate import FlatGradients


def in_buckets(parameters: Iterable[nn.Parameter], elements: int) -> list[list[nn.Parameter]]:
    """The parameters in their order, in groups that end as soon as they have so many elements."""
    buckets: list[list[nn.Parameter]] = [[]]
    size = 0
    for parameter in parameters:
        if size >= elements:
            buckets.append([])
            size = 0
        buckets[-1].append(parameter)
        size += parameter.numel()
    return buckets


class ScatteredGradients:
    """The fp32 vectors of all buckets, and what is under way."""

    def __init__(
        self,
        buckets: Sequence[Sequence[nn.Parameter]],
        flats: Sequence[Tensor],
        *,
        sent_as: torch.dtype,
        overlap: bool,
    ) -> None:
        """flats: fp32 [ranks x part] of each bucket, zero; sent_as: dtype in which gradients travel."""
        self._ranks = dist.get_world_size()
        self._buckets, self._flats, self._sent_as = buckets, flats, sent_as
        sizes = [[parameter.numel() for parameter in bucket] for bucket in buckets]
        self._sums = [FlatGradients(flat, size) for flat, size in zip(flats, sizes, strict=True)]
        self.parts = [flat.chunk(self._ranks)[dist.get_rank()] for flat in flats]
        """fp32 [part] of each bucket: this rank's, a view of its vector; the mean once a step is complete."""
        self._last = False
        self._next = -1
        self._missing: list[int] = []
        self._under_way: list[tuple[dist.Work, Tensor, Tensor]] = []
        if overlap and self._ranks > 1:
            for index, bucket in enumerate(buckets):
                for parameter in bucket:
                    parameter.register_post_accumulate_grad_hook(lambda _, index=index: self._arrived(index))

    def begin(self, *, last: bool) -> None:
        """Before backward of a micro-batch; `last`: the one after which the step is made."""
        for bucket in self._buckets:
            for parameter in bucket:
                parameter.grad = None
        self._last, self._next = last, len(self._buckets) - 1
        self._missing = [len(bucket) for bucket in self._buckets]

    def finish(self) -> None:
        """After backward: what has not left yet is added, and after the last micro-batch sent. Collective."""
        self._take(self._next + 1)
        if not self._last:
            return
        for work, received, part in self._under_way:
            work.wait()
            part.copy_(received).mul_(1.0 / self._ranks)
        self._under_way.clear()
        late = [p for bucket in self._buckets for p in bucket if p.grad is not None]
        assert not late, "a gradient came after its bucket had left: backward ran twice over a parameter"

    def norm(self) -> Tensor:
        """0-d fp32: norm of the whole mean gradient, the same bits on every rank. Collective."""
        own = nn.utils.get_total_norm(self.parts)
        if self._ranks == 1:
            return own
        square = own.square()
        dist.all_reduce(square)
        return square.sqrt()

    def _arrived(self, index: int) -> None:
        """One more gradient of this bucket is whole."""
        if not self._last:
            return
        self._missing[index] -= 1
        ready = 0
        while ready <= self._next and self._missing[self._next - ready] == 0:
            ready += 1
        self._take(ready)

    @torch.no_grad()
    def _take(self, count: int) -> None:
        """The next buckets' gradients into their vectors, and after the last micro-batch to their ranks."""
        for _ in range(count):
            bucket = self._buckets[self._next]
            self._sums[self._next].add([parameter.grad for parameter in bucket])
            for parameter in bucket:
                parameter.grad = None
            if self._last and self._ranks > 1:
                self._send(self._flats[self._next].to(self._sent_as), self.parts[self._next])
            self._next -= 1

    def _send(self, sums: Tensor, part: Tensor) -> None:
        received = torch.empty_like(part, dtype=sums.dtype)
        # The work keeps `sums` alive until it is waited for.
        work = dist.reduce_scatter_tensor(received, sums, async_op=True)
        assert work is not None
        self._under_way.append((work, received, part))
