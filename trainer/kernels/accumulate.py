"""Gradients of hundreds of parameters added to one flat vector in fp32, in a single launch.

    parameters   [ a a a a a ][ b b ][ c c c c c c c ]     gradients, each in memory of its own, bf16
    flat         [ a a a a a b b c c c c c c c ]           what the optimizer reads, fp32
    programs       0   1   2   3  4   5   6   7            each adds one chunk of one parameter

Per parameter it would be a cast, an addition and two launches; together they read and write each byte once.
A kernel of a convolution whose gradient is channels-last (o y x i) is read across, into the flat o i y x.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from trainer.kernels.language import cdiv, fused, tl, triton

CHUNK = 8192
"""Elements that one program adds."""
ALIGNED = 4
"""Parameters that begin at multiples of this are read and written in wide words."""


class FlatGradients:
    """Where in `flat` [sum of sizes, possibly padded] each parameter's gradient belongs."""

    def __init__(self, flat: Tensor, sizes: Sequence[int]) -> None:
        self._flat = flat
        self._parts = flat[: sum(sizes)].split(list(sizes))
        if not fused(flat):
            return
        starts = [part.storage_offset() - flat.storage_offset() for part in self._parts]
        chunks = [(p, c * CHUNK) for p, size in enumerate(sizes) for c in range(cdiv(size, CHUNK))]
        self._chunks = torch.tensor(chunks, dtype=torch.int64).to(flat.device)  # [programs, 2]
        self._aligned = all(start % ALIGNED == 0 for start in starts)
        self._places = torch.tensor([starts, list(sizes)], dtype=torch.int64).to(
            flat.device
        )  # [2, parameters]

    @torch.no_grad()
    def add(self, gradients: Sequence[Tensor | None]) -> None:
        """Add one gradient per parameter, in their order; None counts as zero."""
        if not fused(self._flat):
            for part, gradient in zip(self._parts, gradients, strict=True):
                if gradient is not None:
                    part.view(gradient.shape).add_(gradient)
            return
        for dtype in {gradient.dtype for gradient in gradients if gradient is not None}:
            self._add(dtype, [None if g is None or g.dtype != dtype else g for g in gradients])

    def _add(self, dtype: torch.dtype, gradients: Sequence[Tensor | None]) -> None:
        dense = [_dense(gradient) for gradient in gradients]
        # [3, parameters]: address, and of a channels-last kernel its width and cells
        rows = [(0 if g is None else g.data_ptr(), *crossed) for g, crossed in dense]
        sources = torch.tensor(rows, dtype=torch.int64).T.contiguous()
        if self._flat.is_cuda:
            sources = sources.pin_memory().to(self._flat.device, non_blocking=True)
        _accumulate[(len(self._chunks),)](
            sources, self._chunks, self._places, self._flat, len(gradients),
            BF16=dtype == torch.bfloat16, CHUNK=CHUNK, ALIGNED=ALIGNED if self._aligned else 1,
        )  # fmt: skip


def _dense(gradient: Tensor | None) -> tuple[Tensor | None, tuple[int, int]]:
    """A gradient as the kernel reads it, and (channels, cells) where it is of a kernel [o, i, y, x] that lies
    as o y x i; zeros where it lies as written, copied if it must be."""
    if gradient is None or gradient.is_contiguous():
        return gradient, (0, 0)
    if gradient.dim() == 4 and gradient.is_contiguous(memory_format=torch.channels_last):
        return gradient, (gradient.shape[1], gradient.shape[2] * gradient.shape[3])
    return gradient.contiguous(), (0, 0)


@triton.jit
def _accumulate(
    sources, chunks, places, flat, count, BF16: tl.constexpr, CHUNK: tl.constexpr, ALIGNED: tl.constexpr
):
    chunk = tl.program_id(0).to(tl.int64)
    parameter = tl.load(chunks + chunk * 2)
    begin = tl.multiple_of(tl.load(chunks + chunk * 2 + 1), CHUNK)
    address = tl.load(sources + parameter)
    if address != 0:
        if BF16:
            source = address.to(tl.pointer_type(tl.bfloat16))
        else:
            source = address.to(tl.pointer_type(tl.float32))
        source = tl.multiple_of(source, 16)  # torch's allocator aligns to more
        at = begin + tl.arange(0, CHUNK)
        target = flat + tl.multiple_of(tl.load(places + parameter), ALIGNED) + at
        size = tl.load(places + count + parameter)
        width = tl.load(sources + count + parameter).to(tl.int32)
        if width > 0:
            # A chunk holds whole lines of cells of neighbouring channels: what it reads, it reads entirely.
            cells = tl.load(sources + 2 * count + parameter).to(tl.int32)
            place = at.to(tl.int32)
            inside = place % (width * cells)
            place += inside % cells * width + inside // cells - inside
            gradient = tl.load(source + place, mask=at < size, other=0.0).to(tl.float32)
            tl.store(target, tl.load(target, mask=at < size, other=0.0) + gradient, mask=at < size)
        elif begin + CHUNK <= size:  # without a mask, loads are as wide as the alignment allows
            tl.store(target, tl.load(target) + tl.load(source + at).to(tl.float32))
        else:
            gradient = tl.load(source + at, mask=at < size, other=0.0).to(tl.float32)
            tl.store(target, tl.load(target, mask=at < size, other=0.0) + gradient, mask=at < size)
