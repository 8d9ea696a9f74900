"""Between stored bytes and the range that networks see: the one owner of this conversion."""

from __future__ import annotations

import torch
from torch import Tensor


def to_unit_range(pixels: Tensor) -> Tensor:
    """uint8 -> float32 in -1 .. 1."""
    return pixels.float().div(127.5).sub(1.0)


def to_bytes(pixels: Tensor) -> Tensor:
    """-1 .. 1 -> uint8, rounded and clipped."""
    return pixels.float().add(1.0).mul(127.5).round().clamp(0, 255).to(torch.uint8)
