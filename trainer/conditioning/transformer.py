"""Bidirectional pre-norm transformer over tokens: the paper's tau, shared by text and layout."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Attention(nn.Module):
    """Multi-head self-attention whose inner width, heads * head_dim, may differ from the token width."""

    def __init__(self, width: int, heads: int, head_dim: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.dropout = dropout
        inner = heads * head_dim
        self.to_q = nn.Linear(width, inner, bias=False)
        self.to_k = nn.Linear(width, inner, bias=False)
        self.to_v = nn.Linear(width, inner, bias=False)
        self.to_out = nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        """[B, L, D] -> [B, L, D]."""
        query, key, value = (
            project(x).unflatten(2, (self.heads, -1)).transpose(1, 2)  # [B, heads, L, head_dim]
            for project in (self.to_q, self.to_k, self.to_v)
        )
        dropout = self.dropout if self.training else 0.0
        attended = F.scaled_dot_product_attention(query, key, value, dropout_p=dropout)
        out: Tensor = self.to_out(attended.transpose(1, 2).flatten(2))
        return out


class Block(nn.Module):
    """Self-attention, then a feed-forward part four times as wide, each on normalised input."""

    def __init__(self, width: int, heads: int, head_dim: int, dropout: float) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width)
        self.attention = Attention(width, heads, head_dim, dropout)
        self.feed_forward_norm = nn.LayerNorm(width)
        self.feed_forward = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Dropout(dropout), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        """[B, L, D] -> [B, L, D]."""
        x = x + self.attention(self.attention_norm(x))
        return x + self.feed_forward(self.feed_forward_norm(x))


class TokenTransformer(nn.Module):
    """Embedded tokens plus learned absolute positions -> context.

    Every position attends to every other one, padding included, as in the paper's text model: the
    padding is the same in all captions, so it carries no information but position.
    """

    def __init__(
        self,
        max_tokens: int,
        width: int,
        layers: int,
        heads: int,
        head_dim: int,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.positions = nn.Parameter(torch.empty(max_tokens, width))
        self.blocks = nn.ModuleList([Block(width, heads, head_dim, dropout) for _ in range(layers)])
        self.norm = nn.LayerNorm(width)
        nn.init.normal_(self.positions, std=0.02)

    def forward(self, embedded: Tensor) -> Tensor:
        """Token embeddings [B, L, D], L <= max_tokens -> [B, L, D]."""
        x = embedded + self.positions[: embedded.shape[1]]
        for block in self.blocks:
            x = block(x)
        normalised: Tensor = self.norm(x)
        return normalised


def token_embedding(size: int, width: int) -> nn.Embedding:
    """An embedding table as small at the start as the positions that are added to it."""
    embedding = nn.Embedding(size, width)
    nn.init.normal_(embedding.weight, std=0.02)
    return embedding
