"""Convolutional encoder and decoder that the KL and VQ autoencoders share (LDM paper, appendix G).

Parameter names follow diffusers. On a GPU a bias is not added by its convolution, but by the next kernel that
reads the feature map anyway; until then it travels beside the map as `pending` [C] (None: there is none).
Legend: B batch, C channels, H W height and width in pixels, h w height and width of the latent, z latent
channels, f downsampling factor.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from trainer.config.models import FirstStageConfig
from trainer.config.network_plan import norm_groups
from trainer.kernels.group_norm import GroupNorm
from trainer.kernels.residual import add_residual, leaves_bias, product_and_bias
from trainer.kernels.softmax import wide_attention

NORM_EPS = 1e-6


class ResidualBlock(nn.Module):
    """Two normalised 3x3 convolutions beside a shortcut: [B, in, H, W] -> [B, out, H, W]."""

    def __init__(self, in_channels: int, out_channels: int, *, groups: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm1 = GroupNorm(groups, in_channels, eps=NORM_EPS)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = GroupNorm(groups, out_channels, eps=NORM_EPS)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else None

    def forward(self, x: Tensor, pending: Tensor | None = None) -> Tensor:
        """Features after the block."""
        x, hidden = self.norm1(x, _per_sample(pending, x), silu=True, fork=True)
        hidden, bias = product_and_bias(self.conv1, hidden)
        hidden = self.norm2(hidden, _per_sample(bias, x), silu=True)
        hidden, bias = product_and_bias(self.conv2, self.dropout(hidden))
        if self.conv_shortcut is not None:
            x, shortcut_bias = product_and_bias(self.conv_shortcut, x)
            if pending is not None:
                pending = self.conv_shortcut.weight.flatten(1) @ pending
            pending = _sum(pending, shortcut_bias)
        return add_residual(x, hidden, _sum(bias, pending))


def _per_sample(bias: Tensor | None, x: Tensor) -> Tensor | None:
    """[C] -> [B, C]"""
    return None if bias is None else bias.expand(len(x), -1)


def _sum(first: Tensor | None, second: Tensor | None) -> Tensor | None:
    """Of two pending biases."""
    if first is None or second is None:
        return second if first is None else first
    return first + second


class SpatialAttention(nn.Module):
    """Single-head self-attention over all positions, with a shortcut."""

    def __init__(self, channels: int, *, groups: int) -> None:
        super().__init__()
        self.group_norm = GroupNorm(groups, channels, eps=NORM_EPS)
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C, H, W]"""
        x, normed = self.group_norm(x, fork=True)
        tokens = normed.permute(0, 2, 3, 1).flatten(1, 2)  # [B, HW, C]; a view where x is channels-last
        mixed = wide_attention(self.to_q(tokens), self.to_k(tokens), self.to_v(tokens))
        to_out = self.to_out[0]
        assert isinstance(to_out, nn.Linear)
        mixed, bias = product_and_bias(to_out, mixed)
        return add_residual(x, mixed.unflatten(1, x.shape[-2:]).permute(0, 3, 1, 2), bias)


class AsymmetricDownsample(nn.Module):
    """Strided 3x3 convolution, padded at the right and bottom edge only: halves H and W."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """[B, C, H, W] -> [B, C, H/2, W/2] and its pending bias."""
        if not leaves_bias(self.conv, x):
            return self.conv(F.pad(x, (0, 1, 0, 1))), None
        # The same sums without a padded copy of the map: a leading row and column of zero weights and one
        # cell of padding on every side leave the window where it was.
        return F.conv2d(x, F.pad(self.conv.weight, (1, 0, 1, 0)), stride=2, padding=1), self.conv.bias


class DoublingUpsample(nn.Module):
    """Nearest-neighbour doubling and a 3x3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """[B, C, H, W] -> [B, C, 2H, 2W] and its pending bias."""
        return product_and_bias(self.conv, F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """Residual blocks of one resolution, each followed by attention where asked, then resampling."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        num_blocks: int,
        attention: bool,
        groups: int,
        dropout: float,
    ) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(
            ResidualBlock(
                in_channels if j == 0 else out_channels, out_channels, groups=groups, dropout=dropout
            )
            for j in range(num_blocks)
        )
        if attention:
            self.attentions = nn.ModuleList(
                SpatialAttention(out_channels, groups=groups) for _ in range(num_blocks)
            )
        self.attends = attention

    def forward(self, x: Tensor, pending: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Features after the blocks and, where there is one, the resampling layer with its pending bias."""
        for j, resnet in enumerate(self.resnets):
            x = resnet(x, pending)
            pending = None
            if self.attends:
                x = self.attentions[j](x)
        for name in ("downsamplers", "upsamplers"):
            for layer in getattr(self, name, ()):
                x, pending = layer(x)
        return x, pending


class Middle(nn.Module):
    """Residual block, attention (unless switched off), residual block, at the lowest resolution."""

    def __init__(self, channels: int, *, attention: bool, groups: int, dropout: float) -> None:
        super().__init__()
        if attention:
            self.attentions = nn.ModuleList([SpatialAttention(channels, groups=groups)])
        self.attends = attention
        self.resnets = nn.ModuleList(
            ResidualBlock(channels, channels, groups=groups, dropout=dropout) for _ in range(2)
        )

    def forward(self, x: Tensor, pending: Tensor | None = None) -> Tensor:
        """[B, C, h, w] -> [B, C, h, w]"""
        x = self.resnets[0](x, pending)
        if self.attends:
            x = self.attentions[0](x)
        return self.resnets[1](x)


class Encoder(nn.Module):
    """Pixels to features of the latent grid: [B, 3, H, W] -> [B, out_channels, H/f, W/f]."""

    def __init__(self, config: FirstStageConfig, *, out_channels: int) -> None:
        super().__init__()
        groups = norm_groups(config)
        widths = [config.base_channels * m for m in config.channel_multipliers]
        self.conv_in = nn.Conv2d(3, widths[0], 3, padding=1)
        self.down_blocks = nn.ModuleList()
        for i, width in enumerate(widths):
            level = Level(
                widths[max(i - 1, 0)],
                width,
                num_blocks=config.num_res_blocks,
                attention=2**i in config.attention_factors,
                groups=groups,
                dropout=config.dropout,
            )
            if i < len(widths) - 1:
                level.downsamplers = nn.ModuleList([AsymmetricDownsample(width)])
            self.down_blocks.append(level)
        self.mid_block = Middle(
            widths[-1], attention=config.middle_attention, groups=groups, dropout=config.dropout
        )
        self.conv_norm_out = GroupNorm(groups, widths[-1], eps=NORM_EPS)
        self.conv_out = nn.Conv2d(widths[-1], out_channels, 3, padding=1)

    def forward(self, pixels: Tensor) -> Tensor:
        """Features for the quantisation convolution."""
        x, pending = product_and_bias(self.conv_in, pixels)
        for level in self.down_blocks:
            x, pending = level(x, pending)
        return self.conv_out(self.conv_norm_out(self.mid_block(x, pending), silu=True))


class Decoder(nn.Module):
    """Latents to pixels: [B, z, h, w] -> [B, 3, h*f, w*f]; not clipped."""

    def __init__(self, config: FirstStageConfig) -> None:
        super().__init__()
        groups = norm_groups(config)
        widths = [config.base_channels * m for m in reversed(config.channel_multipliers)]
        self.conv_in = nn.Conv2d(config.latent_channels, widths[0], 3, padding=1)
        self.mid_block = Middle(
            widths[0], attention=config.middle_attention, groups=groups, dropout=config.dropout
        )
        self.up_blocks = nn.ModuleList()
        for i, width in enumerate(widths):
            level = Level(
                widths[max(i - 1, 0)],
                width,
                num_blocks=config.num_res_blocks + 1,
                attention=2 ** (len(widths) - 1 - i) in config.attention_factors,
                groups=groups,
                dropout=config.dropout,
            )
            if i < len(widths) - 1:
                level.upsamplers = nn.ModuleList([DoublingUpsample(width)])
            self.up_blocks.append(level)
        self.conv_norm_out = GroupNorm(groups, widths[-1], eps=NORM_EPS)
        self.conv_out = nn.Conv2d(widths[-1], 3, 3, padding=1)

    def features(self, latents: Tensor) -> Tensor:
        """What the last layer sees, [B, base_channels, H, W]; the adaptive weight is made from it."""
        x, pending = self.mid_block(*product_and_bias(self.conv_in, latents)), None
        for level in self.up_blocks:
            x, pending = level(x, pending)
        return self.conv_norm_out(x, silu=True)

    def forward(self, latents: Tensor) -> Tensor:
        """Pixels, about -1 .. 1."""
        return self.conv_out(self.features(latents))


def initialise_convolutions(network: nn.Module) -> None:
    """Xavier-uniform weights and zero biases for every convolution (Glorot & Bengio 2010).

    PyTorch's default keeps only a third of the variance per layer. The shortcuts of an untrained
    autoencoder then hardly carry the colour of a region, and hundreds of steps go into getting it back.
    """
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.xavier_uniform_(module.weight)
            assert module.bias is not None
            nn.init.zeros_(module.bias)


def match_parameters(x: Tensor, module: nn.Module) -> Tensor:
    """`x` in the dtype of the module's parameters (bf16 engines hold bf16 weights)."""
    return x.to(next(module.parameters()).dtype)
