"""Group norm over channels-last feature maps, with what surrounds it: a shift before, SiLU after, the skip.

Shapes: B batch, C channels, P = H * W cells, G groups. A channels-last feature map is a matrix of P rows of C
channels per sample. PyTorch's own group norm answers channels-first whatever it gets, which makes every
convolution after it convert its input, its output and both gradients; this one never leaves the layout.

    forward   1. per (sample, channel) sums over the cells, in slices         reads x
              2. per (sample, group) mean and deviation -> y = act(x * scale + offset)
              3. that line, elementwise                                       reads x, writes y
    backward  1. per (sample, channel) sums of g and g * xhat                 reads x, dy
              2. per (sample, group) the two means that the norm's gradient subtracts
              3. dx = g * scale + x * slope + level (+ the skip's gradient)    reads x, dy, writes dx

Only x is kept for backward. `shift` [B, C] is added to x first (a convolution's bias and the timestep
embedding): since it is constant over the cells, it costs nothing, and its gradient is made of sums that are
there anyway. Sums are taken about the first cell of a sample, so that a mean far from zero does not cancel.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.kernels.language import cdiv, channel_block, fused, power_of_two, register, tl, triton

TILE = 4096
"""Elements that one program holds at a time."""
PROGRAMS = 1056
"""Programs wanted in all: eight per multiprocessor of an H100."""
SUMS = 8192
"""Sums that one program of the second kernels holds at most."""


class GroupNorm(nn.GroupNorm):
    """`nn.GroupNorm` that keeps the memory format of its input, and may take its neighbours in."""

    def forward(  # type: ignore[override]
        self, x: Tensor, shift: Tensor | None = None, *, silu: bool = False, fork: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """x [B, C, H, W], shift [B, C] -> y = act(norm(x + shift)), act being SiLU or nothing.

        With `fork` (x, y): whoever goes on with this x has its gradient added inside the norm's kernel.
        """
        if fused(x) and x.dim() == 4:
            both = _FusedGroupNorm.apply(x, shift, self.weight, self.bias, self.num_groups, self.eps, silu)
            return both if fork else both[1]
        y = super().forward(x if shift is None else x + shift[:, :, None, None])
        y = F.silu(y) if silu else y
        return (x, y) if fork else y


class _FusedGroupNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        shift: Tensor | None,
        weight: Tensor,
        bias: Tensor,
        groups: int,
        eps: float,
        silu: bool,
    ) -> tuple[Tensor, Tensor]:
        kept = x
        x = x.contiguous(memory_format=torch.channels_last)
        y, lines, deviations = group_norm_forward(x, shift, weight, bias, groups, eps, silu)
        ctx.save_for_backward(x, weight, lines, deviations)
        ctx.groups, ctx.silu, ctx.shift = groups, silu, None if shift is None else shift.dtype
        ctx.set_materialize_grads(False)
        return kept, y

    @staticmethod
    def backward(ctx: Any, dskip: Tensor | None, dy: Tensor | None) -> tuple[Tensor | None, ...]:
        if dy is None:
            return dskip, None, None, None, None, None, None
        x, weight, lines, deviations = ctx.saved_tensors
        dy = dy.contiguous(memory_format=torch.channels_last)
        if dskip is not None:
            dskip = dskip.contiguous(memory_format=torch.channels_last)
        dx, gradients = group_norm_backward(x, dy, dskip, weight, lines, deviations, ctx.groups, ctx.silu)
        dweight, dbias = gradients[:, 1:].sum(0).to(weight.dtype)
        dshift = gradients[:, 0].to(ctx.shift) if ctx.shift is not None else None
        return dx, dshift, dweight, dbias, None, None, None


# One row of `lines` per sample and role, each [C]: what the elementwise passes need to know.
SCALE, OFFSET, CENTRE, LEAN = range(4)
"""y = act(x * SCALE + OFFSET); xhat = (x - CENTRE) / deviation; LEAN is the mean of xhat over the cells."""


@triton.jit
def _forward_sums(x, sums, cells, channels, rows_per_slice, slices, ROWS: tl.constexpr, COLS: tl.constexpr):
    """sums[b, slice, 0 and 1, c]: sum of (x - x[first cell]) and of its square over the slice's cells."""
    b, s = tl.program_id(0), tl.program_id(2)
    c = tl.program_id(1) * COLS + tl.arange(0, COLS)
    x += b.to(tl.int64) * cells * channels
    pivot = tl.load(x + c, mask=c < channels, other=0.0).to(tl.float32)
    first = tl.zeros([ROWS, COLS], tl.float32)
    second = tl.zeros([ROWS, COLS], tl.float32)
    for start in range(0, rows_per_slice, ROWS):
        row = s * rows_per_slice + start + tl.arange(0, ROWS)
        inside = (row < cells)[:, None] & (c < channels)[None, :]
        value = tl.load(x + row[:, None].to(tl.int64) * channels + c[None, :], mask=inside, other=0.0).to(
            tl.float32
        )
        value = tl.where(inside, value - pivot[None, :], 0.0)
        first += value
        second += value * value
    target = sums + ((b * slices + s) * 2) * channels + c
    tl.store(target, tl.sum(first, 0), mask=c < channels)
    tl.store(target + channels, tl.sum(second, 0), mask=c < channels)


@triton.jit
def _forward_lines(
    x, shift, weight, bias, sums, lines, deviations, cells, channels, slices, groups, eps,
    HAS_SHIFT: tl.constexpr, SLICES: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """One (sample, group): from sums to the four rows of `lines` and 1 / deviation."""
    b, g = tl.program_id(0), tl.program_id(1)
    width = channels // groups
    k = tl.arange(0, COLS)
    own = k < width
    c = g * width + k
    s = tl.arange(0, SLICES)
    source = sums + (b * slices + s[:, None]) * 2 * channels + c[None, :]
    inside = (s < slices)[:, None] & own[None, :]
    first = tl.sum(tl.load(source, mask=inside, other=0.0), 0) / cells
    second = tl.sum(tl.load(source + channels, mask=inside, other=0.0), 0)
    mean = first + tl.load(x + b.to(tl.int64) * cells * channels + c, mask=own, other=0.0).to(tl.float32)
    before = tl.zeros([COLS], tl.float32)
    if HAS_SHIFT:
        before = tl.load(shift + b * channels + c, mask=own, other=0.0).to(tl.float32)
    mean = tl.where(own, mean + before, 0.0)
    centre = tl.sum(mean, 0) / width
    away = tl.where(own, mean - centre, 0.0)
    # Within the channels, and between them (Chan et al. 1979).
    square = tl.sum(tl.where(own, second - cells * first * first, 0.0), 0) + cells * tl.sum(away * away, 0)
    rdev = 1.0 / tl.sqrt(tl.maximum(square, 0.0) / (cells * width) + eps)
    tl.store(deviations + b * groups + g, rdev)
    scale = rdev * tl.load(weight + c, mask=own, other=0.0).to(tl.float32)
    shifted = centre - before
    offset = tl.load(bias + c, mask=own, other=0.0).to(tl.float32) - shifted * scale
    target = lines + b * 4 * channels + c
    tl.store(target, scale, mask=own)
    tl.store(target + channels, offset, mask=own)
    tl.store(target + 2 * channels, shifted, mask=own)
    tl.store(target + 3 * channels, away * rdev, mask=own)


@triton.jit
def _forward_apply(
    x, y, lines, cells, channels, rows_per_slice,
    ROWS: tl.constexpr, COLS: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """y = act(x * scale + offset)."""
    b, s = tl.program_id(0), tl.program_id(2)
    c = tl.program_id(1) * COLS + tl.arange(0, COLS)
    known = c < channels
    base = b.to(tl.int64) * cells * channels
    lines += b * 4 * channels + c
    scale = tl.load(lines, mask=known, other=0.0)[None, :]
    offset = tl.load(lines + channels, mask=known, other=0.0)[None, :]
    for start in range(0, rows_per_slice, ROWS):
        row = s * rows_per_slice + start + tl.arange(0, ROWS)
        inside = (row < cells)[:, None] & known[None, :]
        at = base + row[:, None].to(tl.int64) * channels + c[None, :]
        value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32) * scale + offset
        if SILU:
            value = value / (1.0 + tl.exp(-value))
        tl.store(y + at, value.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _backward_sums(
    x, dy, lines, sums, cells, channels, rows_per_slice, slices,
    ROWS: tl.constexpr, COLS: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """sums[b, slice, 0 and 1, c]: sum of g and of g * (x - centre); g is the gradient of the norm."""
    b, s = tl.program_id(0), tl.program_id(2)
    c = tl.program_id(1) * COLS + tl.arange(0, COLS)
    known = c < channels
    base = b.to(tl.int64) * cells * channels
    lines += b * 4 * channels + c
    scale = tl.load(lines, mask=known, other=0.0)[None, :]
    offset = tl.load(lines + channels, mask=known, other=0.0)[None, :]
    centre = tl.load(lines + 2 * channels, mask=known, other=0.0)[None, :]
    first = tl.zeros([ROWS, COLS], tl.float32)
    second = tl.zeros([ROWS, COLS], tl.float32)
    for start in range(0, rows_per_slice, ROWS):
        row = s * rows_per_slice + start + tl.arange(0, ROWS)
        inside = (row < cells)[:, None] & known[None, :]
        at = base + row[:, None].to(tl.int64) * channels + c[None, :]
        value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        gradient = tl.load(dy + at, mask=inside, other=0.0).to(tl.float32)
        if SILU:
            before = value * scale + offset
            gate = 1.0 / (1.0 + tl.exp(-before))
            gradient *= gate * (1.0 + before * (1.0 - gate))
        first += gradient
        second += gradient * (value - centre)
    target = sums + ((b * slices + s) * 2) * channels + c
    tl.store(target, tl.sum(first, 0), mask=known)
    tl.store(target + channels, tl.sum(second, 0), mask=known)


@triton.jit
def _backward_lines(
    weight, lines, deviations, sums, slopes, gradients, cells, channels, slices, groups,
    SLICES: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """One (sample, group): slope and level of dx, and its part of the gradients of shift, weight, bias."""
    b, g = tl.program_id(0), tl.program_id(1)
    width = channels // groups
    k = tl.arange(0, COLS)
    own = k < width
    c = g * width + k
    s = tl.arange(0, SLICES)
    source = sums + (b * slices + s[:, None]) * 2 * channels + c[None, :]
    inside = (s < slices)[:, None] & own[None, :]
    rdev = tl.load(deviations + b * groups + g)
    total = tl.sum(tl.load(source, mask=inside, other=0.0), 0)
    against = tl.sum(tl.load(source + channels, mask=inside, other=0.0), 0) * rdev
    w = tl.load(weight + c, mask=own, other=0.0).to(tl.float32)
    mean_gradient = tl.sum(w * total, 0) / (cells * width)
    mean_against = tl.sum(w * against, 0) / (cells * width)
    centre = tl.load(lines + b * 4 * channels + 2 * channels + c, mask=own, other=0.0)
    lean = tl.load(lines + b * 4 * channels + 3 * channels + c, mask=own, other=0.0)
    slope = -mean_against * rdev * rdev
    target = slopes + b * 2 * channels + c
    tl.store(target, tl.zeros([COLS], tl.float32) + slope, mask=own)
    tl.store(target + channels, -mean_gradient * rdev - slope * centre, mask=own)
    target = gradients + b * 3 * channels + c
    tl.store(target, rdev * (w * total - cells * (mean_gradient + mean_against * lean)), mask=own)
    tl.store(target + channels, against, mask=own)
    tl.store(target + 2 * channels, total, mask=own)


@triton.jit
def _backward_apply(
    x, dy, dskip, dx, lines, slopes, cells, channels, rows_per_slice,
    ROWS: tl.constexpr, COLS: tl.constexpr, SILU: tl.constexpr, HAS_SKIP: tl.constexpr,
):  # fmt: skip
    """dx = g * scale + x * slope + level, plus the gradient that came along the skip."""
    b, s = tl.program_id(0), tl.program_id(2)
    c = tl.program_id(1) * COLS + tl.arange(0, COLS)
    known = c < channels
    base = b.to(tl.int64) * cells * channels
    lines += b * 4 * channels + c
    slopes += b * 2 * channels + c
    scale = tl.load(lines, mask=known, other=0.0)[None, :]
    offset = tl.load(lines + channels, mask=known, other=0.0)[None, :]
    slope = tl.load(slopes, mask=known, other=0.0)[None, :]
    level = tl.load(slopes + channels, mask=known, other=0.0)[None, :]
    for start in range(0, rows_per_slice, ROWS):
        row = s * rows_per_slice + start + tl.arange(0, ROWS)
        inside = (row < cells)[:, None] & known[None, :]
        at = base + row[:, None].to(tl.int64) * channels + c[None, :]
        value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        gradient = tl.load(dy + at, mask=inside, other=0.0).to(tl.float32)
        if SILU:
            before = value * scale + offset
            gate = 1.0 / (1.0 + tl.exp(-before))
            gradient *= gate * (1.0 + before * (1.0 - gate))
        result = gradient * scale + value * slope + level
        if HAS_SKIP:
            result += tl.load(dskip + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(dx + at, result.to(dx.dtype.element_ty), mask=inside)


def _tiles(batch: int, cells: int, channels: int, groups: int) -> tuple[tuple[int, int, int], dict[str, int]]:
    """Launch grid (sample, channel block, slice of cells), and the sizes that go with it."""
    cols = channel_block(channels)
    rows = min(TILE // cols, power_of_two(cells))
    blocks = cdiv(channels, cols)
    # A program of the second kernel holds the sums of all slices of one group.
    most = max(1, SUMS // power_of_two(channels // groups))
    slices = max(1, min(cdiv(cells, rows), cdiv(PROGRAMS, batch * blocks), most))
    rows_per_slice = cdiv(cdiv(cells, slices), rows) * rows
    slices = cdiv(cells, rows_per_slice)
    return (batch, blocks, slices), {"rows_per_slice": rows_per_slice, "ROWS": rows, "COLS": cols}


def _launch_forward(
    x: Tensor, shift: Tensor | None, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    batch, channels, height, width = x.shape
    cells = height * width
    grid, tiles = _tiles(batch, cells, channels, groups)
    slices = grid[2]
    sums = x.new_empty((batch, slices, 2, channels), dtype=torch.float32)
    y, lines, deviations = _forward_results(x, shift, weight, bias, groups, eps, silu)
    if shift is not None:
        shift = shift.contiguous()
    _forward_sums[grid](x, sums, cells, channels, slices=slices, **tiles)
    _forward_lines[(batch, groups)](
        x, shift, weight, bias, sums, lines, deviations, cells, channels, slices, groups, eps,
        HAS_SHIFT=shift is not None, SLICES=power_of_two(slices), COLS=power_of_two(channels // groups),
    )  # fmt: skip
    _forward_apply[grid](x, y, lines, cells, channels, SILU=silu, **tiles)
    return y, lines, deviations


def _forward_results(
    x: Tensor, shift: Tensor | None, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    batch, channels = x.shape[:2]
    y = torch.empty_like(x, memory_format=torch.channels_last)
    lines = x.new_empty((batch, 4, channels), dtype=torch.float32)
    return y, lines, x.new_empty((batch, groups), dtype=torch.float32)


def _launch_backward(
    x: Tensor,
    dy: Tensor,
    dskip: Tensor | None,
    weight: Tensor,
    lines: Tensor,
    deviations: Tensor,
    groups: int,
    silu: bool,
) -> tuple[Tensor, Tensor]:
    batch, channels, height, width = x.shape
    cells = height * width
    grid, tiles = _tiles(batch, cells, channels, groups)
    slices = grid[2]
    sums = x.new_empty((batch, slices, 2, channels), dtype=torch.float32)
    slopes = x.new_empty((batch, 2, channels), dtype=torch.float32)
    dx, gradients = _backward_results(x, dy, dskip, weight, lines, deviations, groups, silu)
    _backward_sums[grid](x, dy, lines, sums, cells, channels, slices=slices, SILU=silu, **tiles)
    _backward_lines[(batch, groups)](
        weight, lines, deviations, sums, slopes, gradients, cells, channels, slices, groups,
        SLICES=power_of_two(slices), COLS=power_of_two(channels // groups),
    )  # fmt: skip
    _backward_apply[grid](
        x, dy, dskip, dx, lines, slopes, cells, channels, SILU=silu, HAS_SKIP=dskip is not None, **tiles
    )
    return dx, gradients


def _backward_results(
    x: Tensor,
    dy: Tensor,
    dskip: Tensor | None,
    weight: Tensor,
    lines: Tensor,
    deviations: Tensor,
    groups: int,
    silu: bool,
) -> tuple[Tensor, Tensor]:
    dx = torch.empty_like(x, memory_format=torch.channels_last)
    return dx, x.new_empty((x.shape[0], 3, x.shape[1]), dtype=torch.float32)


group_norm_forward = register(
    "group_norm_forward(Tensor x, Tensor? shift, Tensor weight, Tensor bias, int groups, float eps,"
    " bool silu) -> (Tensor, Tensor, Tensor)",
    _launch_forward,
    _forward_results,
)
group_norm_backward = register(
    "group_norm_backward(Tensor x, Tensor dy, Tensor? dskip, Tensor weight, Tensor lines, Tensor deviations,"
    " int groups, bool silu) -> (Tensor, Tensor)",
    _launch_backward,
    _backward_results,
)
