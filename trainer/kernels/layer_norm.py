"""Layer norm of a residual stream: the branch and its bias are added and the sum normalised in one pass.

    x' = x + branch + bias;  y = norm(x') * weight + offset        reads x and branch, writes x' and y
    dx = dskip + norm's gradient of dy                             reads x', dy and dskip, writes dx

dx is the gradient of x and of the branch alike; the gradients of bias, weight and offset are sums over rows,
taken in the same pass. Tokens [..., C] are rows of C channels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from trainer.kernels.language import cdiv, fused, power_of_two, register, tl, triton
from trainer.kernels.residual import add_residual, dense, rows_and_channels

TILE = 4096
"""Elements that one program holds at a time."""
PROGRAMS = 264
"""Programs of the backward pass, each with its own partial sums: two per multiprocessor of an H100."""


class LayerNorm(nn.LayerNorm):
    """`nn.LayerNorm` at the start of a residual branch."""

    def forward(  # type: ignore[override]
        self, x: Tensor, branch: Tensor | None = None, bias: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """x and the branch before it, [..., C], and the branch's pending bias [C] -> (sum, its norm)."""
        if fused(x):
            return _AddLayerNorm.apply(x, branch, bias, self.weight, self.bias, self.eps)
        if branch is not None:
            x = add_residual(x, branch, bias)
        return x, super().forward(x)


class _AddLayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        branch: Tensor | None,
        bias: Tensor | None,
        weight: Tensor,
        offset: Tensor,
        eps: float,
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.has_branch, ctx.has_bias = branch is not None, bias is not None
        if branch is None:
            stream = dense(x)
            y, moments = layer_norm_forward(stream, weight, offset, eps)
            ctx.save_for_backward(stream, weight, moments)
            return x, y
        stream, y, moments = add_layer_norm_forward(dense(x), dense(branch), bias, weight, offset, eps)
        ctx.save_for_backward(stream, weight, moments)
        return stream, y

    @staticmethod
    def backward(ctx: Any, dskip: Tensor | None, dy: Tensor | None) -> tuple[Tensor | None, ...]:
        stream, weight, moments = ctx.saved_tensors
        assert dy is not None, "a norm that nobody reads"
        dskip = None if dskip is None else dense(dskip)
        dx, sums = layer_norm_backward(stream, dense(dy), dskip, weight, moments)
        dweight, doffset, dbias = sums.sum(0).to(weight.dtype)
        return dx, dx if ctx.has_branch else None, dbias if ctx.has_bias else None, dweight, doffset, None


@triton.jit
def _layer_norm_forward(
    x, branch, bias, weight, offset, stream, y, moments, rows, channels, eps,
    HAS_BRANCH: tl.constexpr, HAS_BIAS: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    c = tl.arange(0, COLS)
    known = c < channels
    inside = (row < rows)[:, None] & known[None, :]
    at = row[:, None].to(tl.int64) * channels + c[None, :]
    value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    if HAS_BRANCH:
        value += tl.load(branch + at, mask=inside, other=0.0).to(tl.float32)
        if HAS_BIAS:
            value += tl.load(bias + c, mask=known, other=0.0).to(tl.float32)[None, :]
        rounded = value.to(stream.dtype.element_ty)
        tl.store(stream + at, rounded, mask=inside)
        value = rounded.to(tl.float32)  # what backward will read
    mean = tl.sum(value, 1) / channels
    away = tl.where(inside, value - mean[:, None], 0.0)
    rdev = 1.0 / tl.sqrt(tl.sum(away * away, 1) / channels + eps)
    result = away * rdev[:, None] * tl.load(weight + c, mask=known, other=0.0).to(tl.float32)[None, :]
    result += tl.load(offset + c, mask=known, other=0.0).to(tl.float32)[None, :]
    tl.store(y + at, result.to(y.dtype.element_ty), mask=inside)
    tl.store(moments + row * 2, mean, mask=row < rows)
    tl.store(moments + row * 2 + 1, rdev, mask=row < rows)


@triton.jit
def _layer_norm_backward(
    stream, dy, dskip, weight, moments, dx, sums, rows, channels, rows_per_program,
    HAS_SKIP: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """dx, and this program's sums over its rows of dy * xhat, dy and dx."""
    p = tl.program_id(0)
    c = tl.arange(0, COLS)
    known = c < channels
    w = tl.load(weight + c, mask=known, other=0.0).to(tl.float32)[None, :]
    dweight = tl.zeros([ROWS, COLS], tl.float32)
    doffset = tl.zeros([ROWS, COLS], tl.float32)
    dbias = tl.zeros([ROWS, COLS], tl.float32)
    for start in range(0, rows_per_program, ROWS):
        row = p * rows_per_program + start + tl.arange(0, ROWS)
        inside = (row < rows)[:, None] & known[None, :]
        at = row[:, None].to(tl.int64) * channels + c[None, :]
        mean = tl.load(moments + row * 2, mask=row < rows, other=0.0)
        rdev = tl.load(moments + row * 2 + 1, mask=row < rows, other=0.0)
        value = tl.load(stream + at, mask=inside, other=0.0).to(tl.float32)
        gradient = tl.load(dy + at, mask=inside, other=0.0).to(tl.float32)
        xhat = tl.where(inside, (value - mean[:, None]) * rdev[:, None], 0.0)
        weighted = gradient * w
        level = tl.sum(weighted, 1) / channels
        slope = tl.sum(weighted * xhat, 1) / channels
        result = (weighted - level[:, None] - xhat * slope[:, None]) * rdev[:, None]
        if HAS_SKIP:
            result += tl.load(dskip + at, mask=inside, other=0.0).to(tl.float32)
        result = tl.where(inside, result, 0.0)
        tl.store(dx + at, result.to(dx.dtype.element_ty), mask=inside)
        dweight += gradient * xhat
        doffset += gradient
        dbias += result
    target = sums + p * 3 * channels + c
    tl.store(target, tl.sum(dweight, 0), mask=known)
    tl.store(target + channels, tl.sum(doffset, 0), mask=known)
    tl.store(target + 2 * channels, tl.sum(dbias, 0), mask=known)


def _launch_forward(
    x: Tensor,
    branch: Tensor | None,
    bias: Tensor | None,
    stream: Tensor | None,
    weight: Tensor,
    offset: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor]:
    rows, channels = rows_and_channels(x)
    y = torch.empty_like(x)
    moments = x.new_empty((rows, 2), dtype=torch.float32)
    cols = power_of_two(channels)
    tile = max(1, TILE // cols)
    _layer_norm_forward[(cdiv(rows, tile),)](
        x, branch, bias, weight, offset, stream, y, moments, rows, channels, eps,
        HAS_BRANCH=branch is not None, HAS_BIAS=bias is not None, ROWS=tile, COLS=cols, num_warps=8,
    )  # fmt: skip
    return y, moments


def _launch_norm(x: Tensor, weight: Tensor, offset: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return _launch_forward(x, None, None, None, weight, offset, eps)


def _norm_results(x: Tensor, weight: Tensor, offset: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty((rows_and_channels(x)[0], 2), dtype=torch.float32)


def _launch_add_norm(
    x: Tensor, branch: Tensor, bias: Tensor | None, weight: Tensor, offset: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    stream = torch.empty_like(x)
    return stream, *_launch_forward(x, branch, bias, stream, weight, offset, eps)


def _add_norm_results(
    x: Tensor, branch: Tensor, bias: Tensor | None, weight: Tensor, offset: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(x), *_norm_results(x, weight, offset, eps)


def _backward_split(rows: int, channels: int) -> tuple[int, int, int]:
    """(rows per tile, rows per program, programs)"""
    tile = max(1, TILE // power_of_two(channels))
    per_program = cdiv(cdiv(rows, PROGRAMS), tile) * tile
    return tile, per_program, cdiv(rows, per_program)


def _launch_backward(
    stream: Tensor, dy: Tensor, dskip: Tensor | None, weight: Tensor, moments: Tensor
) -> tuple[Tensor, Tensor]:
    rows, channels = rows_and_channels(stream)
    tile, per_program, programs = _backward_split(rows, channels)
    dx, sums = _backward_results(stream, dy, dskip, weight, moments)
    _layer_norm_backward[(programs,)](
        stream, dy, dskip, weight, moments, dx, sums, rows, channels, per_program,
        HAS_SKIP=dskip is not None, ROWS=tile, COLS=power_of_two(channels), num_warps=8,
    )  # fmt: skip
    return dx, sums


def _backward_results(
    stream: Tensor, dy: Tensor, dskip: Tensor | None, weight: Tensor, moments: Tensor
) -> tuple[Tensor, Tensor]:
    rows, channels = rows_and_channels(stream)
    programs = _backward_split(rows, channels)[2]
    return torch.empty_like(stream), stream.new_empty((programs, 3, channels), dtype=torch.float32)


layer_norm_forward = register(
    "layer_norm(Tensor x, Tensor weight, Tensor offset, float eps) -> (Tensor, Tensor)",
    _launch_norm,
    _norm_results,
)
add_layer_norm_forward = register(
    "add_layer_norm(Tensor x, Tensor branch, Tensor? bias, Tensor weight, Tensor offset, float eps)"
    " -> (Tensor, Tensor, Tensor)",
    _launch_add_norm,
    _add_norm_results,
)
layer_norm_backward = register(
    "layer_norm_backward(Tensor stream, Tensor dy, Tensor? dskip, Tensor weight, Tensor moments)"
    " -> (Tensor, Tensor)",
    _launch_backward,
    _backward_results,
)
