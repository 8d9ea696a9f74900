"""Attention of the UNet: self- and cross-attention, transformer blocks over feature maps, plain attention.

Shapes: B batch, C channels, H and W feature-map size, N = H * W tokens, L context tokens, D context width.
A 1x1 convolution before flattening equals a linear layer after it, so the projections are linear layers here
and only interop, following `UNetConfig.projection`, writes them as convolutions.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from trainer.kernels.geglu import geglu
from trainer.kernels.group_norm import GroupNorm
from trainer.kernels.layer_norm import LayerNorm
from trainer.kernels.residual import add_residual, product_and_bias
from trainer.models.layers import zero_module


class Attention(nn.Module):
    """Multi-head attention from tokens to themselves, or to a context; q, k and v share one product."""

    def __init__(self, dim: int, heads: int, context_dim: int | None = None, *, bias: bool = False) -> None:
        super().__init__()
        assert dim % heads == 0
        self.heads = heads
        if context_dim is None:
            self.to_qkv = nn.Linear(dim, 3 * dim, bias=bias)
        else:
            self.to_q = nn.Linear(dim, dim, bias=bias)
            self.to_kv = nn.Linear(context_dim, 2 * dim, bias=bias)
        self.attends_to_context = context_dim is not None
        self.to_out = nn.Linear(dim, dim)

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """x [B, N, C], context [B, L, D] -> [B, N, C], and the output's bias where it is yet to be added."""
        if self.attends_to_context:
            assert context is not None
            query = self.to_q(x)
            key, value = self.to_kv(context).chunk(2, dim=-1)
        else:
            query, key, value = self.to_qkv(x).chunk(3, dim=-1)
        query, key, value = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (query, key, value)
        )
        out = F.scaled_dot_product_attention(query, key, value)  # [B, heads, N, C / heads]
        return product_and_bias(self.to_out, out.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """Gated feed-forward part (GEGLU, Shazeer 2020) with an expansion of four."""

    def __init__(self, dim: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.proj_in = nn.Linear(dim, 8 * dim)
        self.dropout = nn.Dropout(dropout)
        self.proj_out = nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """x [B, N, C] -> [B, N, C], and the output's bias where it is still to be added."""
        return product_and_bias(self.proj_out, self.dropout(geglu(*product_and_bias(self.proj_in, x))))


class TransformerBlock(nn.Module):
    """Pre-norm self-attention, cross-attention (where there is a context) and feed-forward part."""

    def __init__(
        self,
        dim: int,
        heads: int,
        context_dim: int | None,
        *,
        cross_attention_only: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.norm1 = LayerNorm(dim)
        self.attn1 = Attention(dim, heads, context_dim if cross_attention_only else None)
        self.attends_to_context = context_dim is not None
        if context_dim is not None:
            self.norm2 = LayerNorm(dim)
            self.attn2 = Attention(dim, heads, context_dim)
        self.norm3 = LayerNorm(dim)
        self.ff = FeedForward(dim, dropout)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, context: Tensor | None) -> Tensor:
        """x [B, N, C], context [B, L, D] -> [B, N, C]."""
        x, hidden = self.norm1(x)
        branch, bias = self._dropped(*self.attn1(hidden, context))
        if self.attends_to_context:
            x, hidden = self.norm2(x, branch, bias)
            branch, bias = self._dropped(*self.attn2(hidden, context))
        x, hidden = self.norm3(x, branch, bias)
        return add_residual(x, *self.ff(hidden))

    def _dropped(self, branch: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Dropout of a branch, which must see the bias, too."""
        if self.dropout.p == 0 or not self.training:
            return branch, bias
        return self.dropout(branch if bias is None else branch + bias), None


class SpatialTransformer(nn.Module):
    """Transformer blocks over the cells of a feature map (LDM paper, appendix E.2.1)."""

    def __init__(
        self,
        channels: int,
        heads: int,
        context_dim: int | None,
        *,
        depth: int,
        groups: int,
        cross_attention_only: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.norm = GroupNorm(groups, channels, eps=1e-6)
        self.proj_in = nn.Linear(channels, channels)
        self.transformer_blocks = nn.ModuleList(
            TransformerBlock(
                channels, heads, context_dim, cross_attention_only=cross_attention_only, dropout=dropout
            )
            for _ in range(depth)
        )
        self.proj_out = zero_module(nn.Linear(channels, channels))

    def forward(self, x: Tensor, context: Tensor | None) -> Tensor:
        """x [B, C, H, W], context [B, L, D] -> [B, C, H, W]."""
        x, hidden = self.norm(x, fork=True)
        hidden = self.proj_in(to_tokens(hidden))
        for block in self.transformer_blocks:
            hidden = block(hidden, context)
        branch, bias = product_and_bias(self.proj_out, hidden)
        return add_residual(x, to_feature_map(branch, x), bias)


class PlainAttention(nn.Module):
    """One self-attention over the cells of a feature map (ADM); takes a context and ignores it."""

    def __init__(self, channels: int, heads: int, *, groups: int) -> None:
        super().__init__()
        self.norm = GroupNorm(groups, channels, eps=1e-5)
        self.attn = Attention(channels, heads, bias=True)
        zero_module(self.attn.to_out)

    def forward(self, x: Tensor, context: Tensor | None) -> Tensor:
        """x [B, C, H, W] -> [B, C, H, W]."""
        x, hidden = self.norm(x, fork=True)
        branch, bias = self.attn(to_tokens(hidden))
        return add_residual(x, to_feature_map(branch, x), bias)


def to_tokens(x: Tensor) -> Tensor:
    """[B, C, H, W] -> [B, H * W, C]; a view where x is channels-last."""
    return x.permute(0, 2, 3, 1).flatten(1, 2)


def to_feature_map(tokens: Tensor, like: Tensor) -> Tensor:
    """[B, H * W, C] -> [B, C, H, W] with the spatial size of `like`; a channels-last view."""
    return tokens.unflatten(1, like.shape[-2:]).permute(0, 3, 1, 2)
