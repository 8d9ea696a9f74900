"""What configurations mean for networks: the levels of a UNet, the groups of a first stage; torch-free."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TypeVar

from trainer.config.models import FirstStageConfig, UNetConfig
from trainer.config.run import ConfigError

T = TypeVar("T")


@dataclass(frozen=True)
class UNetLevel:
    """One resolution of the UNet."""

    channels: int
    """Channels of the level's feature maps."""
    factor: int
    """Downsampling factor with respect to the input."""
    attention: bool
    """Whether attention follows every residual block."""
    heads: int
    """Attention heads (also those of the middle, for the last level)."""
    depth: int
    """Transformer blocks per attention layer."""
    cross_attention_only: bool
    """Whether self-attention is replaced by a second cross-attention."""


def plan_levels(config: UNetConfig) -> tuple[UNetLevel, ...]:
    """The levels from the finest to the coarsest.

    Raises:
        ConfigError: the configuration contradicts itself; the sentence names the key.
    """
    count = len(config.channel_multipliers)
    if count == 0:
        raise ConfigError("unet.channel_multipliers is empty; give one multiplier per level.")
    if (config.num_heads is None) == (config.head_dim is None):
        raise ConfigError("set exactly one of unet.num_heads and unet.head_dim; unset the other with null.")
    depths = _per_level(config.transformer_depth, count, "transformer_depth")
    if not config.cross_attention_only:
        cross_only: tuple[bool, ...] = (False,) * count
    else:
        cross_only = _per_level(config.cross_attention_only, count, "cross_attention_only")
    levels = []
    for index, multiplier in enumerate(config.channel_multipliers):
        channels = config.model_channels * multiplier
        for key, groups in (("num_groups", config.num_groups), ("res_block_groups", config.res_block_groups)):
            if groups is not None and channels % groups:
                raise ConfigError(
                    f"unet.{key}={groups} does not divide the {channels} channels of level {index}; "
                    "change unet.model_channels or the number of groups."
                )
        attends = 2**index in config.attention_factors
        levels.append(
            UNetLevel(
                channels=channels,
                factor=2**index,
                attention=attends,
                heads=_heads(config, channels, needed=attends or index == count - 1),
                depth=depths[index],
                cross_attention_only=cross_only[index],
            )
        )
    return tuple(levels)


def middle_level(config: UNetConfig) -> UNetLevel:
    """The last level as the middle of the UNet has it: always with self-attention, and a depth of its own."""
    last = plan_levels(config)[-1]
    return replace(last, attention=True, depth=middle_depth(config), cross_attention_only=False)


def middle_depth(config: UNetConfig) -> int:
    """Transformer blocks in the middle."""
    if config.middle_transformer_depth is not None:
        return config.middle_transformer_depth
    return config.transformer_depth[-1]


def norm_groups(config: FirstStageConfig) -> int:
    """Groups of every group normalisation in a first stage.

    Small networks keep at least four channels per group: with one channel per group the
    normalisation would erase the mean of every feature map, and flat colours with it.

    Raises:
        ConfigError: `num_groups` does not divide the channels of some level.
    """
    groups = config.num_groups or min(32, max(1, config.base_channels // 4))
    for multiplier in config.channel_multipliers:
        if (config.base_channels * multiplier) % groups:
            raise ConfigError(
                f"first_stage.base_channels={config.base_channels} times multiplier {multiplier} is not "
                f"a multiple of {groups} groups; set first_stage.num_groups to a divisor."
            )
    return groups


def _heads(config: UNetConfig, channels: int, *, needed: bool) -> int:
    key = "num_heads" if config.num_heads is not None else "head_dim"
    divisor = config.num_heads if config.num_heads is not None else config.head_dim
    assert divisor is not None
    if channels % divisor:
        if not needed:
            return 1
        raise ConfigError(
            f"unet.{key}={divisor} does not divide the {channels} channels of a level with attention."
        )
    return config.num_heads if config.num_heads is not None else channels // divisor


def _per_level(values: tuple[T, ...], count: int, key: str) -> tuple[T, ...]:
    if len(values) == 1:
        return values * count
    if len(values) != count:
        raise ConfigError(
            f"unet.{key} has {len(values)} entries for {count} levels; give one, or one per level."
        )
    return values
