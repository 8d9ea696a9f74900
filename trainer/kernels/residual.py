"""x + branch + bias in one pass, and two feature maps side by side; rows of C channels, whatever the shape.

A layer before a residual leaves its bias to the sum (`product_and_bias`): elementwise addition of a bias to a
channels-last convolution costs as much as the sum itself. The bias gradient is a sum over rows of a gradient
that is passed on unchanged.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.kernels.language import cdiv, channel_block, fused, register, tl, triton

TILE = 2048
"""Elements that one program holds at a time."""
SLICES = 1024
"""Most partial sums per column."""


def product_and_bias(layer: nn.Linear | nn.Conv2d, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """The layer's product, and the bias that is still to be added: None where it has been."""
    if not leaves_bias(layer, x):
        return layer(x), None
    if isinstance(layer, nn.Linear):
        return F.linear(x, layer.weight), layer.bias
    assert isinstance(layer.padding, tuple)
    return F.conv2d(x, layer.weight, None, layer.stride, layer.padding), layer.bias


def leaves_bias(layer: nn.Linear | nn.Conv2d, x: Tensor) -> bool:
    """Whether a kernel after this layer adds its bias.

    Under ZeRO-3 a layer's weights are there only while the layer itself runs, so there it adds its own; so
    does a layer inside of an adapter.
    """
    bare = isinstance(layer, nn.Linear | nn.Conv2d)
    return fused(x) and bare and layer.bias is not None and not hasattr(layer.weight, "ds_id")


def add_residual(x: Tensor, branch: Tensor, bias: Tensor | None = None) -> Tensor:
    """x + branch + bias; [B, C, H, W] or [..., C] both, bias [C]."""
    if bias is not None and fused(x):
        return _AddResidual.apply(x, branch, bias)
    total = x + branch
    return total if bias is None else total + (bias[:, None, None] if x.dim() == 4 else bias)


def concatenate(x: Tensor, skip: Tensor) -> Tensor:
    """[B, C1, H, W] and [B, C2, H, W] -> [B, C1 + C2, H, W]."""
    return _Concatenate.apply(x, skip) if fused(x) else torch.cat([x, skip], dim=1)


class _AddResidual(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, branch: Tensor, bias: Tensor) -> Tensor:
        ctx.dtype = bias.dtype
        return add_forward(dense(x), dense(branch), bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        dy = dense(dy)
        return dy, dy, column_sums(dy).sum(0).to(ctx.dtype)


class _Concatenate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, skip: Tensor) -> Tensor:
        ctx.first = x.shape[1]
        return concatenate_forward(dense(x), dense(skip))

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
        return concatenate_backward(dense(dy), ctx.first)


def dense(x: Tensor) -> Tensor:
    """Rows of channels end to end: channels-last feature maps, contiguous tokens."""
    return x.contiguous(memory_format=torch.channels_last if x.dim() == 4 else torch.contiguous_format)


def rows_and_channels(x: Tensor) -> tuple[int, int]:
    """Size of the matrix behind a `dense` tensor."""
    channels = x.shape[1] if x.dim() == 4 else x.shape[-1]
    return x.numel() // channels, channels


@triton.jit
def _add(x, branch, bias, y, rows, channels, ROWS: tl.constexpr, COLS: tl.constexpr):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    c = tl.program_id(1) * COLS + tl.arange(0, COLS)
    inside = (row < rows)[:, None] & (c < channels)[None, :]
    at = row[:, None].to(tl.int64) * channels + c[None, :]
    value = tl.load(bias + c, mask=c < channels, other=0.0).to(tl.float32)[None, :]
    value += tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    value += tl.load(branch + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + at, value.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _column_sums(x, sums, rows, channels, rows_per_slice, ROWS: tl.constexpr, COLS: tl.constexpr):
    s = tl.program_id(0)
    c = tl.program_id(1) * COLS + tl.arange(0, COLS)
    total = tl.zeros([ROWS, COLS], tl.float32)
    for start in range(0, rows_per_slice, ROWS):
        row = s * rows_per_slice + start + tl.arange(0, ROWS)
        inside = (row < rows)[:, None] & (c < channels)[None, :]
        at = row[:, None].to(tl.int64) * channels + c[None, :]
        total += tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(sums + s * channels + c, tl.sum(total, 0), mask=c < channels)


@triton.jit
def _copy_columns(
    source, target, rows, channels, source_width, target_width, ROWS: tl.constexpr, COLS: tl.constexpr
):
    """target[:, :channels] = source[:, :channels] for matrices of these widths, from the pointers on."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    c = tl.program_id(1) * COLS + tl.arange(0, COLS)
    inside = (row < rows)[:, None] & (c < channels)[None, :]
    row = row[:, None].to(tl.int64)
    value = tl.load(source + row * source_width + c[None, :], mask=inside)
    tl.store(target + row * target_width + c[None, :], value, mask=inside)


def _grid(rows: int, channels: int) -> tuple[tuple[int, int], dict[str, int]]:
    cols = channel_block(channels)
    return (cdiv(rows, TILE // cols), cdiv(channels, cols)), {"ROWS": TILE // cols, "COLS": cols}


def _launch_add(x: Tensor, branch: Tensor, bias: Tensor) -> Tensor:
    rows, channels = rows_and_channels(x)
    grid, tiles = _grid(rows, channels)
    y = torch.empty_like(x)
    _add[grid](x, branch, bias, y, rows, channels, **tiles)
    return y


def sum_slices(rows: int, rows_per_tile: int, most: int = SLICES) -> tuple[int, int]:
    """(slices, rows per slice) for partial sums over rows."""
    per_slice = cdiv(cdiv(rows, most), rows_per_tile) * rows_per_tile
    return cdiv(rows, per_slice), per_slice


def _launch_column_sums(x: Tensor) -> Tensor:
    rows, channels = rows_and_channels(x)
    (_, blocks), tiles = _grid(rows, channels)
    slices, per_slice = sum_slices(rows, tiles["ROWS"])
    sums = x.new_empty((slices, channels), dtype=torch.float32)
    _column_sums[(slices, blocks)](x, sums, rows, channels, per_slice, **tiles)
    return sums


def _column_sums_result(x: Tensor) -> Tensor:
    rows, channels = rows_and_channels(x)
    slices, _ = sum_slices(rows, TILE // channel_block(channels))
    return x.new_empty((slices, channels), dtype=torch.float32)


def _launch_concatenate(x: Tensor, skip: Tensor) -> Tensor:
    y = _concatenate_result(x, skip)
    rows, width = rows_and_channels(y)
    start = 0
    for part in (x, skip):
        channels = part.shape[1]
        grid, tiles = _grid(rows, channels)
        _copy_columns[grid](part, y[:, start:], rows, channels, channels, width, **tiles)
        start += channels
    return y


def _concatenate_result(x: Tensor, skip: Tensor) -> Tensor:
    shape = (x.shape[0], x.shape[1] + skip.shape[1], *x.shape[2:])
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def _launch_split(dy: Tensor, first: int) -> tuple[Tensor, Tensor]:
    parts = _split_result(dy, first)
    rows, width = rows_and_channels(dy)
    start = 0
    for part in parts:
        channels = part.shape[1]
        grid, tiles = _grid(rows, channels)
        _copy_columns[grid](dy[:, start:], part, rows, channels, width, channels, **tiles)
        start += channels
    return parts


def _split_result(dy: Tensor, first: int) -> tuple[Tensor, Tensor]:
    def make(channels: int) -> Tensor:
        shape = (dy.shape[0], channels, *dy.shape[2:])
        return torch.empty(shape, dtype=dy.dtype, device=dy.device, memory_format=torch.channels_last)

    return make(first), make(dy.shape[1] - first)


add_forward = register(
    "add_residual(Tensor x, Tensor branch, Tensor bias) -> Tensor",
    _launch_add,
    lambda x, branch, bias: torch.empty_like(x),
)
column_sums = register("column_sums(Tensor x) -> Tensor", _launch_column_sums, _column_sums_result)
concatenate_forward = register(
    "concatenate(Tensor x, Tensor skip) -> Tensor", _launch_concatenate, _concatenate_result
)
concatenate_backward = register(
    "split(Tensor dy, int first) -> (Tensor, Tensor)", _launch_split, _split_result
)
