"""Attention of heads too wide for flash kernels (the first stage's one head of 512), without gradients.

Scores are fp32 products, one kernel turns them into bf16 probabilities, and a second product applies them:
tensor cores do the rest at full speed, where the kernels for any width reach a third of it. Scores take
64 MiB per picture of 4096 cells, so samples go through in groups.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from trainer.kernels.language import fused, power_of_two, tl, triton

FLASH_WIDTH = 256
"""Widest head that cuDNN's and flash attention's kernels take."""
SCORE_BYTES = 1 << 29
"""Scores in memory at a time."""
ROW = 1 << 15
"""Longest row that one program holds."""
WARP = 1 << 10
"""Elements of a row that one warp holds."""


def wide_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """softmax(query key^T / sqrt(C)) value of one head, [B, N, C] each."""
    cells, width = query.shape[1:]
    slow = torch.is_grad_enabled() or width <= FLASH_WIDTH or key.shape[1] > ROW
    if not query.is_cuda or not fused(query) or slow or query.dtype != torch.bfloat16:
        query, key, value = query.unsqueeze(1), key.unsqueeze(1), value.unsqueeze(1)  # [B, 1, N, C]
        return F.scaled_dot_product_attention(query, key, value).squeeze(1)
    at_once = max(1, SCORE_BYTES // (4 * cells * key.shape[1]))
    groups = zip(query.split(at_once), key.split(at_once), value.split(at_once), strict=True)
    return torch.cat([_attend(*group) for group in groups])


def _attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    scores = torch.bmm(query, key.transpose(1, 2), out_dtype=torch.float32)
    return torch.bmm(softmax(scores, 1 / math.sqrt(query.shape[-1]), query.dtype), value)


def softmax(scores: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """softmax(scale * scores) over the last axis of contiguous fp32 scores, in `dtype`."""
    result = torch.empty(scores.shape, dtype=dtype, device=scores.device)
    length = scores.shape[-1]
    columns = power_of_two(length)
    warps = min(32, max(4, columns // WARP))
    _softmax[(scores.numel() // length,)](scores, result, scale, length, COLS=columns, num_warps=warps)
    return result


@triton.jit
def _softmax(scores, result, scale, length, COLS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * length
    c = tl.arange(0, COLS)
    value = tl.load(scores + row + c, mask=c < length, other=-float("inf")) * scale
    value = tl.exp(value - tl.max(value, 0))
    value = value / tl.sum(value, 0)
    tl.store(result + row + c, value.to(result.dtype.element_ty), mask=c < length)
