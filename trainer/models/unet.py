"""The denoiser of latent diffusion: a time-conditional UNet with self- and cross-attention.

Rombach et al. 2022 (appendix E.2.1), after Dhariwal and Nichol 2021 (ADM). Knows no distribution and no run.
Shapes: B batch, C channels, H and W latent size, L context tokens, D context width, V vector width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from trainer.config.models import UNetConfig
from trainer.config.network_plan import UNetLevel, middle_level, plan_levels
from trainer.kernels.group_norm import GroupNorm
from trainer.kernels.residual import concatenate
from trainer.models.attention import PlainAttention, SpatialTransformer
from trainer.models.layers import (
    DownResBlock,
    Downsample,
    EmbeddingMLP,
    ResBlock,
    UpResBlock,
    Upsample,
    sinusoidal_embedding,
    zero_module,
)

R = TypeVar("R", bound=ResBlock)


def _transformer(config: UNetConfig, level: UNetLevel, context_dim: int | None) -> nn.Module:
    return SpatialTransformer(
        level.channels,
        level.heads,
        context_dim,
        depth=level.depth,
        groups=config.num_groups,
        cross_attention_only=level.cross_attention_only,
        dropout=config.dropout,
    )


def _plain(config: UNetConfig, level: UNetLevel, context_dim: int | None) -> nn.Module:
    return PlainAttention(level.channels, level.heads, groups=config.num_groups)


ATTENTIONS: dict[str, Callable[[UNetConfig, UNetLevel, int | None], nn.Module]] = {
    "transformer": _transformer,
    "plain": _plain,
}
"""UNetConfig.attention -> the block that follows every residual block of a level with attention, and the
first of the middle, from (configuration, level, context width); called as (x, context)."""


class UNet(nn.Module):
    """Predicts noise, velocity or clean latents from noisy latents, timesteps and conditions.

    Works at any resolution, odd sizes included. Compute follows the dtype of the weights (or autocast), and
    activations keep the memory format of `x`: pass channels-last latents for channels-last convolutions.
    """

    def __init__(
        self,
        config: UNetConfig,
        *,
        in_channels: int,
        out_channels: int,
        context_dim: int | None = None,
        vector_dim: int | None = None,
        num_classes: int | None = None,
    ) -> None:
        super().__init__()
        levels = plan_levels(config)
        blocks = _BlockFactory(config, context_dim)
        self.config = config
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.time_embedding = EmbeddingMLP(config.model_channels, blocks.embedding_dim)
        self.class_embedding = nn.Embedding(num_classes, blocks.embedding_dim) if num_classes else None
        self.vector_embedding = EmbeddingMLP(vector_dim, blocks.embedding_dim) if vector_dim else None

        channels = levels[0].channels
        self.conv_in = nn.Conv2d(in_channels, channels, 3, padding=1)
        skips = [channels]
        self.down_blocks = nn.ModuleList()
        for index, level in enumerate(levels):
            down = index < len(levels) - 1
            self.down_blocks.append(DownBlock(blocks, level, channels, downsample=down))
            channels = level.channels
            skips += [channels] * (config.num_res_blocks + down)
        self.mid_block = MidBlock(blocks, middle_level(config))
        self.up_blocks = nn.ModuleList()
        for index, level in reversed(list(enumerate(levels))):
            level_skips = [skips.pop() for _ in range(config.num_res_blocks + 1)]
            self.up_blocks.append(UpBlock(blocks, level, channels, level_skips, upsample=index > 0))
            channels = level.channels
        self.conv_norm_out = GroupNorm(config.num_groups, channels, eps=1e-5)
        self.conv_out = zero_module(nn.Conv2d(channels, out_channels, 3, padding=1))

    def forward(
        self,
        x: Tensor,
        timesteps: Tensor,
        context: Tensor | None = None,
        vector: Tensor | None = None,
        class_labels: Tensor | None = None,
    ) -> Tensor:
        """Prediction for noisy latents.

        Args:
            x: [B, C, H, W] noisy latents, with concatenated conditions if there are any.
            timesteps: [B], integer or floating point.
            context: [B, L, D] tokens for cross-attention.
            vector: [B, V] pooled condition added to the timestep embedding (SDXL).
            class_labels: int64 [B] class or noise level added to the timestep embedding.

        Returns:
            [B, out_channels, H, W] in the dtype of the weights.
        """
        dtype = self.conv_in.weight.dtype
        context = None if context is None else context.to(dtype)
        embedding = F.silu(self._embed(timesteps, vector, class_labels, dtype))
        hidden = self.conv_in(x.to(dtype))
        # Blocks take and return skip connections: under ZeRO-3 a module gets copies of the lists it is
        # given, so that a list filled or emptied inside of one would not change here.
        skips = [hidden]
        for down_block in self.down_blocks:
            hidden, made = down_block(hidden, embedding, context)
            skips += made
        hidden = self.mid_block(hidden, embedding, context)
        for up_block in self.up_blocks:
            start = len(skips) - (self.config.num_res_blocks + 1)
            size = skips[start - 1].shape[-2:] if start else None
            hidden = up_block(hidden, embedding, context, skips[start:], size)
            del skips[start:]
        return self.conv_out(self.conv_norm_out(hidden, silu=True))

    def _embed(
        self, timesteps: Tensor, vector: Tensor | None, class_labels: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        """Timestep, class and vector condition as one embedding [B, E]."""
        embedding = self.time_embedding(sinusoidal_embedding(timesteps, self.config.model_channels).to(dtype))
        if self.class_embedding is not None:
            if class_labels is None:
                raise ValueError("this UNet was built with num_classes; class_labels is missing.")
            embedding = embedding + self.class_embedding(class_labels)
        if self.vector_embedding is not None:
            if vector is None:
                raise ValueError("this UNet was built with vector_dim; vector is missing.")
            embedding = embedding + self.vector_embedding(vector.to(dtype))
        return embedding


class _BlockFactory:
    """Residual and attention blocks as the configuration wants them."""

    def __init__(self, config: UNetConfig, context_dim: int | None) -> None:
        self.config = config
        self.context_dim = context_dim
        self.embedding_dim = 4 * config.model_channels
        self.recompute = config.activation_checkpointing

    def residual(self, kind: type[R], in_channels: int, out_channels: int) -> R:
        return kind(
            in_channels,
            out_channels,
            self.embedding_dim,
            groups=self.config.res_block_groups or self.config.num_groups,
            dropout=self.config.dropout,
            scale_shift_norm=self.config.scale_shift_norm,
        )

    def attention(self, level: UNetLevel) -> nn.Module:
        return ATTENTIONS[self.config.attention](self.config, level, self.context_dim)

    def attentions(self, level: UNetLevel, count: int) -> nn.ModuleList:
        return nn.ModuleList(self.attention(level) for _ in range(count if level.attention else 0))


class DownBlock(nn.Module):
    """One level on the way down; also returns every feature map that the way up will need."""

    def __init__(
        self, blocks: _BlockFactory, level: UNetLevel, in_channels: int, *, downsample: bool
    ) -> None:
        super().__init__()
        count = blocks.config.num_res_blocks
        self.recompute = blocks.recompute
        self.resnets = nn.ModuleList(
            blocks.residual(ResBlock, level.channels if i else in_channels, level.channels)
            for i in range(count)
        )
        self.attentions = blocks.attentions(level, count)
        self.downsampler: Downsample | DownResBlock | None = None
        if downsample and blocks.config.resblock_updown:
            self.downsampler = blocks.residual(DownResBlock, level.channels, level.channels)
        elif downsample:
            self.downsampler = Downsample(level.channels)

    def forward(
        self, x: Tensor, embedding: Tensor, context: Tensor | None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        skips = []
        for index, resnet in enumerate(self.resnets):
            x = _run(resnet, self.recompute, x, embedding)
            if self.attentions:
                x = _run(self.attentions[index], self.recompute, x, context)
            skips.append(x)
        if isinstance(self.downsampler, DownResBlock):
            x = _run(self.downsampler, self.recompute, x, embedding)
            skips.append(x)
        elif self.downsampler is not None:
            x = self.downsampler(x)
            skips.append(x)
        return x, tuple(skips)


class MidBlock(nn.Module):
    """Residual block, attention, residual block at the lowest resolution."""

    def __init__(self, blocks: _BlockFactory, level: UNetLevel) -> None:
        super().__init__()
        self.recompute = blocks.recompute
        self.resnets = nn.ModuleList(
            blocks.residual(ResBlock, level.channels, level.channels) for _ in range(2)
        )
        self.attentions = nn.ModuleList([blocks.attention(level)])

    def forward(self, x: Tensor, embedding: Tensor, context: Tensor | None) -> Tensor:
        x = _run(self.resnets[0], self.recompute, x, embedding)
        x = _run(self.attentions[0], self.recompute, x, context)
        return _run(self.resnets[1], self.recompute, x, embedding)


class UpBlock(nn.Module):
    """One level on the way up; uses its skip connections from last to first."""

    def __init__(
        self,
        blocks: _BlockFactory,
        level: UNetLevel,
        in_channels: int,
        skip_channels: list[int],
        *,
        upsample: bool,
    ) -> None:
        super().__init__()
        self.recompute = blocks.recompute
        self.resnets = nn.ModuleList(
            blocks.residual(ResBlock, (level.channels if i else in_channels) + skip, level.channels)
            for i, skip in enumerate(skip_channels)
        )
        self.attentions = blocks.attentions(level, len(skip_channels))
        self.upsampler: Upsample | UpResBlock | None = None
        if upsample and blocks.config.resblock_updown:
            self.upsampler = blocks.residual(UpResBlock, level.channels, level.channels)
        elif upsample:
            self.upsampler = Upsample(level.channels)

    def forward(
        self,
        x: Tensor,
        embedding: Tensor,
        context: Tensor | None,
        skips: list[Tensor],
        size: tuple[int, int] | None,
    ) -> Tensor:
        """`size` is that of the next level, which is not always twice ours; None at the last."""
        for index, (resnet, skip) in enumerate(zip(self.resnets, reversed(skips), strict=True)):
            x = concatenate(x, skip)
            x = _run(resnet, self.recompute, x, embedding)
            if self.attentions:
                x = _run(self.attentions[index], self.recompute, x, context)
        if self.upsampler is None:
            return x
        assert size is not None
        if isinstance(self.upsampler, UpResBlock):
            return _run(self.upsampler, self.recompute, x, embedding, size)
        return self.upsampler(x, size)


def _run(block: Callable[..., Tensor], recompute: bool, *inputs: Tensor | tuple[int, int] | None) -> Tensor:
    """Apply a block; with `recompute`, keep only its inputs for backward."""
    if recompute and torch.is_grad_enabled():
        return checkpoint(block, *inputs, use_reentrant=False)
    return block(*inputs)
