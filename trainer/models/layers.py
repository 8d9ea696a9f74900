"""Building blocks of the UNet: timestep embedding, residual block, resampling.

Shapes: B batch, C channels, H and W feature-map size, E embedding width. Every block keeps the memory
format (channels-first or channels-last) of the feature map it is given.
"""

from __future__ import annotations

import math
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.kernels.group_norm import GroupNorm
from trainer.kernels.residual import add_residual, product_and_bias

M = TypeVar("M", bound=nn.Module)


def zero_module(module: M) -> M:
    """Zero the parameters, so that a residual branch starts as the identity."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


def sinusoidal_embedding(values: Tensor, dim: int, max_period: float = 10_000.0) -> Tensor:
    """Cosines, then sines, of `values` at geometrically spaced frequencies (Vaswani et al. 2017).

    Args:
        values: [B], integer or floating point (fractional timesteps are meaningful).
        dim: even output width.

    Returns:
        float32 [B, dim].
    """
    assert dim % 2 == 0
    half = dim // 2
    exponents = torch.arange(half, dtype=torch.float32, device=values.device) / half
    angles = values.float()[:, None] * torch.exp(-math.log(max_period) * exponents)[None]
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class EmbeddingMLP(nn.Module):
    """Two linear layers with a SiLU between: timestep features or a vector condition to [B, E]."""

    def __init__(self, in_dim: int, out_dim: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(in_dim, out_dim)
        self.linear_2 = nn.Linear(out_dim, out_dim)

    def forward(self, features: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(features)))


class Downsample(nn.Module):
    """Halve the feature map with a strided 3x3 convolution; odd sizes round up."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class Upsample(nn.Module):
    """Enlarge the feature map to `size` by nearest neighbour, then a 3x3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        return self.conv(F.interpolate(x, size=size, mode="nearest"))


class ResBlock(nn.Module):
    """Residual block of ADM and LDM: norm, SiLU, 3x3 convolution, twice, with the timestep in between.

    The embedding given to `forward` has already passed its SiLU: it is the same for every block.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        embedding_dim: int,
        *,
        groups: int,
        dropout: float = 0.0,
        scale_shift_norm: bool = False,
    ) -> None:
        super().__init__()
        self.scale_shift_norm = scale_shift_norm
        self.norm1 = GroupNorm(groups, in_channels, eps=1e-5)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.time_emb_proj = nn.Linear(embedding_dim, out_channels * (2 if scale_shift_norm else 1))
        self.norm2 = GroupNorm(groups, out_channels, eps=1e-5)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = zero_module(nn.Conv2d(out_channels, out_channels, 3, padding=1))
        self.conv_shortcut: nn.Module = nn.Identity()
        if in_channels != out_channels:
            self.conv_shortcut = nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """x [B, C, H, W], activated embedding [B, E] -> [B, C', H, W]."""
        x, hidden = self.norm1(x, silu=True, fork=True)
        return self._merge(x, hidden, embedding)

    def _merge(self, x: Tensor, hidden: Tensor, embedding: Tensor) -> Tensor:
        """Everything after the first activation: `hidden` becomes the residual that is added to x."""
        hidden, bias = product_and_bias(self.conv1, hidden)
        condition = self.time_emb_proj(embedding)
        if self.scale_shift_norm:
            scale, shift = condition[:, :, None, None].chunk(2, dim=1)
            pending = None if bias is None else bias.expand(len(x), -1)
            hidden = F.silu(self.norm2(hidden, pending) * (1 + scale) + shift)
        else:
            hidden = self.norm2(hidden, condition if bias is None else condition + bias, silu=True)
        hidden, bias = product_and_bias(self.conv2, self.dropout(hidden))
        if isinstance(self.conv_shortcut, nn.Conv2d):
            x, shortcut_bias = product_and_bias(self.conv_shortcut, x)
            if bias is not None and shortcut_bias is not None:
                bias = bias + shortcut_bias
        return add_residual(x, hidden, bias)


class DownResBlock(ResBlock):
    """Residual block that halves its feature map by average pooling (BigGAN, ADM); odd sizes round up."""

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        x, hidden = self.norm1(x, silu=True, fork=True)
        hidden = F.avg_pool2d(hidden, 2, ceil_mode=True)
        return self._merge(F.avg_pool2d(x, 2, ceil_mode=True), hidden, embedding)


class UpResBlock(ResBlock):
    """Residual block that enlarges its feature map by nearest neighbour (BigGAN, ADM)."""

    def forward(self, x: Tensor, embedding: Tensor, size: tuple[int, int]) -> Tensor:  # type: ignore[override]
        x, hidden = self.norm1(x, silu=True, fork=True)
        hidden = F.interpolate(hidden, size=size, mode="nearest")
        return self._merge(F.interpolate(x, size=size, mode="nearest"), hidden, embedding)
