"""Gated GELU (Shazeer 2020) with the pending bias of the layer before: (a + bias_a) gelu(b + bias_b)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from trainer.kernels.language import cdiv, channel_block, fused, register, tl, triton
from trainer.kernels.residual import dense, rows_and_channels, sum_slices

TILE, BACKWARD_TILE = 2048, 1024
"""Elements of one half that one program holds at a time."""
SLICES = 128
"""Most partial sums per column of the backward pass."""


def geglu(hidden: Tensor, bias: Tensor | None = None) -> Tensor:
    """hidden [..., 2D], pending bias [2D] -> [..., D]: first half times the (exact) GELU of the second."""
    if bias is not None and fused(hidden):
        return _GEGLU.apply(hidden, bias)
    value, gate = (hidden if bias is None else hidden + bias).chunk(2, dim=-1)
    return value * F.gelu(gate)


class _GEGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, bias: Tensor) -> Tensor:
        hidden = dense(hidden)
        ctx.save_for_backward(hidden, bias)
        return geglu_forward(hidden, bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
        hidden, bias = ctx.saved_tensors
        dhidden, sums = geglu_backward(hidden, bias, dense(dy))
        return dhidden, sums.sum(0).to(bias.dtype)


@triton.jit
def _geglu_forward(hidden, bias, y, rows, width, ROWS: tl.constexpr, COLS: tl.constexpr):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    c = tl.program_id(1) * COLS + tl.arange(0, COLS)
    known = c < width
    inside = (row < rows)[:, None] & known[None, :]
    row = row[:, None].to(tl.int64)
    at = row * 2 * width + c[None, :]
    value = tl.load(hidden + at, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(hidden + at + width, mask=inside, other=0.0).to(tl.float32)
    value += tl.load(bias + c, mask=known, other=0.0).to(tl.float32)[None, :]
    gate += tl.load(bias + width + c, mask=known, other=0.0).to(tl.float32)[None, :]
    below = 0.5 * (1.0 + tl.erf(gate * 0.7071067811865476))
    tl.store(y + row * width + c[None, :], (value * gate * below).to(y.dtype.element_ty), mask=inside)


@triton.jit
def _geglu_backward(
    hidden, bias, dy, dhidden, sums, rows, width, rows_per_slice, ROWS: tl.constexpr, COLS: tl.constexpr
):
    s = tl.program_id(0)
    c = tl.program_id(1) * COLS + tl.arange(0, COLS)
    known = c < width
    value_bias = tl.load(bias + c, mask=known, other=0.0).to(tl.float32)[None, :]
    gate_bias = tl.load(bias + width + c, mask=known, other=0.0).to(tl.float32)[None, :]
    value_sum = tl.zeros([ROWS, COLS], tl.float32)
    gate_sum = tl.zeros([ROWS, COLS], tl.float32)
    for start in range(0, rows_per_slice, ROWS):
        row = s * rows_per_slice + start + tl.arange(0, ROWS)
        inside = (row < rows)[:, None] & known[None, :]
        row = row[:, None].to(tl.int64)
        at = row * 2 * width + c[None, :]
        value = tl.load(hidden + at, mask=inside, other=0.0).to(tl.float32) + value_bias
        gate = tl.load(hidden + at + width, mask=inside, other=0.0).to(tl.float32) + gate_bias
        gradient = tl.load(dy + row * width + c[None, :], mask=inside, other=0.0).to(tl.float32)
        below = 0.5 * (1.0 + tl.erf(gate * 0.7071067811865476))
        density = 0.3989422804014327 * tl.exp(-0.5 * gate * gate)
        dvalue = gradient * gate * below
        dgate = gradient * value * (below + gate * density)
        tl.store(dhidden + at, dvalue.to(dhidden.dtype.element_ty), mask=inside)
        tl.store(dhidden + at + width, dgate.to(dhidden.dtype.element_ty), mask=inside)
        value_sum += dvalue
        gate_sum += dgate
    target = sums + s * 2 * width + c
    tl.store(target, tl.sum(value_sum, 0), mask=known)
    tl.store(target + width, tl.sum(gate_sum, 0), mask=known)


def _launch_forward(hidden: Tensor, bias: Tensor) -> Tensor:
    rows, double = rows_and_channels(hidden)
    width = double // 2
    cols = channel_block(width)
    y = _forward_result(hidden, bias)
    _geglu_forward[(cdiv(rows, TILE // cols), cdiv(width, cols))](
        hidden, bias, y, rows, width, ROWS=TILE // cols, COLS=cols, num_warps=8
    )
    return y


def _forward_result(hidden: Tensor, bias: Tensor) -> Tensor:
    return hidden.new_empty((*hidden.shape[:-1], hidden.shape[-1] // 2))


def _launch_backward(hidden: Tensor, bias: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    rows, double = rows_and_channels(hidden)
    width = double // 2
    cols = channel_block(width)
    tile = BACKWARD_TILE // cols
    slices, per_slice = sum_slices(rows, tile, SLICES)
    dhidden, sums = _backward_results(hidden, bias, dy)
    _geglu_backward[(slices, cdiv(width, cols))](
        hidden, bias, dy, dhidden, sums, rows, width, per_slice, ROWS=tile, COLS=cols
    )
    return dhidden, sums


def _backward_results(hidden: Tensor, bias: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    rows, double = rows_and_channels(hidden)
    slices, _ = sum_slices(rows, BACKWARD_TILE // channel_block(double // 2), SLICES)
    return torch.empty_like(hidden), hidden.new_empty((slices, double), dtype=torch.float32)


geglu_forward = register("geglu(Tensor hidden, Tensor bias) -> Tensor", _launch_forward, _forward_result)
geglu_backward = register(
    "geglu_backward(Tensor hidden, Tensor bias, Tensor dy) -> (Tensor, Tensor)",
    _launch_backward,
    _backward_results,
)
