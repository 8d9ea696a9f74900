"""Gradients of hundreds of parameters added to one flat vector in fp32, in a single launch.

    parameters   [ a a a a a ][ b b ][ c c c c c c c ]     gradients, each in memory of its own, bf16
    flat         [ a a a a a b b c c c c c c c ]           what the optimizer reads, fp32
    programs       0   1   2   3  4   5   6   7            each adds one chunk of one parameter

Per parameter it would be a cast, an addition and two launches; together they read and write each byte once.
A chunk goes by in tiles: held whole, it takes more registers than a thread has, and most of the time with it.
Gradients that are not contiguous (channels-last kernels of convolutions) are copied first, which an H200 does
faster than one kernel that reads them across.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from trainer.kernels.language import cdiv, fused, tl, triton

CHUNK, TILE = 8192, 1024
"""Elements that one program adds, and of them those that it holds at a time."""
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
        dense = [None if gradient is None else gradient.contiguous() for gradient in gradients]
        addresses = torch.tensor([0 if g is None else g.data_ptr() for g in dense], dtype=torch.int64)
        if self._flat.is_cuda:
            addresses = addresses.pin_memory().to(self._flat.device, non_blocking=True)
        _accumulate[(len(self._chunks),)](
            addresses, self._chunks, self._places, self._flat, len(gradients),
            BF16=dtype == torch.bfloat16, CHUNK=CHUNK, TILE=TILE, ALIGNED=ALIGNED if self._aligned else 1,
        )  # fmt: skip


@triton.jit
def _accumulate(
    addresses, chunks, places, flat, count,
    BF16: tl.constexpr, CHUNK: tl.constexpr, TILE: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    chunk = tl.program_id(0).to(tl.int64)
    parameter = tl.load(chunks + chunk * 2)
    begin = tl.multiple_of(tl.load(chunks + chunk * 2 + 1), CHUNK)
    address = tl.load(addresses + parameter)
    if address != 0:
        if BF16:
            source = address.to(tl.pointer_type(tl.bfloat16))
        else:
            source = address.to(tl.pointer_type(tl.float32))
        source = tl.multiple_of(source, 16) + begin  # torch's allocator aligns to more
        target = flat + tl.multiple_of(tl.load(places + parameter), ALIGNED) + begin
        left = tl.minimum(tl.load(places + count + parameter) - begin, CHUNK)
        at = tl.arange(0, TILE)
        whole = left // TILE
        for _ in range(whole):  # without a mask, loads are as wide as the alignment allows
            tl.store(target + at, tl.load(target + at) + tl.load(source + at).to(tl.float32))
            source += TILE
            target += TILE
        left -= whole * TILE
        if left > 0:
            gradient = tl.load(source + at, mask=at < left, other=0.0).to(tl.float32)
            tl.store(target + at, tl.load(target + at, mask=at < left, other=0.0) + gradient, mask=at < left)
