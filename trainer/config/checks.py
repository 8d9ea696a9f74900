"""Combinations of settings that cannot work, refused before any process starts or model is built."""

from __future__ import annotations

import math

from trainer.config.bounds import check_bounds
from trainer.config.checks_diffusion import check_diffusion, check_sampling
from trainer.config.run import Config, ConfigError


def check(config: Config) -> None:
    """Raise ConfigError, with the remedy, for the first impossible combination found."""
    check_bounds(config)
    _check_sizes(config)
    _check_unet(config)
    _check_stage(config)
    _check_conditioning(config)
    if config.stage == "diffusion":
        check_diffusion(config.diffusion)
        check_sampling(config.diffusion, config.sampling)


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


def _check_sizes(config: Config) -> None:
    if config.distributed.ranks:
        config.accumulation(config.distributed.ranks)
    else:
        _require(
            config.global_batch_size % config.micro_batch_size == 0,
            f"global_batch_size={config.global_batch_size} must be a multiple of "
            f"micro_batch_size={config.micro_batch_size}.",
        )
    factor = config.first_stage.downsampling
    _require(
        config.data.image_size % factor == 0,
        f"data.image_size={config.data.image_size} must be a multiple of the first stage's downsampling "
        f"factor {factor}.",
    )
    optimizer = config.optimizer
    _require(optimizer.learning_rate > 0, "optimizer.learning_rate must be positive.")
    _require(all(0 <= beta < 1 for beta in optimizer.betas), "optimizer.betas must lie in [0, 1).")
    _require(
        not (config.data.shards and config.data.sources),
        "give either data.shards or data.sources, not both.",
    )


def _check_unet(config: Config) -> None:
    unet = config.unet
    levels = len(unet.channel_multipliers)
    _require(
        (unet.num_heads is None) != (unet.head_dim is None),
        "set exactly one of unet.num_heads and unet.head_dim (set the other one to null).",
    )
    _require(
        len(unet.transformer_depth) in (1, levels),
        f"unet.transformer_depth needs 1 or {levels} entries, one per level of unet.channel_multipliers.",
    )
    for i, multiplier in enumerate(unet.channel_multipliers):
        channels = unet.model_channels * multiplier
        groups = math.lcm(unet.num_groups, unet.res_block_groups or unet.num_groups)
        _require(
            channels % groups == 0,
            f"unet level {i} has {channels} channels, not a multiple of num_groups {groups}; change "
            "unet.model_channels or unet.num_groups.",
        )
        if 2**i in unet.attention_factors:
            divisor, key = (unet.num_heads, "num_heads") if unet.num_heads else (unet.head_dim, "head_dim")
            _require(
                channels % (divisor or 1) == 0,
                f"unet level {i} has {channels} channels, not a multiple of unet.{key} {divisor}.",
            )


def _check_stage(config: Config) -> None:
    if config.stage == "diffusion":
        return
    _require(
        config.first_stage.name != "identity",
        "first_stage.name=identity has nothing to train; choose kl or vq for stage=autoencoder.",
    )
    layers = config.autoencoder_loss.discriminator_layers
    _require(
        not config.autoencoder_loss.discriminator_weight or config.data.image_size >= 3 * 2**layers,
        f"a discriminator of {layers} strided layers needs at least {3 * 2**layers} pixels; lower "
        "autoencoder_loss.discriminator_layers or raise data.image_size.",
    )


def _check_conditioning(config: Config) -> None:
    conditioning = config.conditioning
    needed = {
        name
        for name in ("class_label", "layout", "semantic_map", "depth")
        if getattr(conditioning, name) is not None
    }
    if config.stage == "diffusion":
        missing = sorted(needed - set(config.data.conditions))
        _require(
            not missing,
            f"conditioning.{missing[0] if missing else ''} needs its field in the batch; add it to "
            f"data.conditions, e.g. data.conditions=[{', '.join(sorted(needed))}].",
        )
    tau = conditioning.text_transformer
    _require(
        tau is None or tau.tokenizer != "wordpiece" or tau.vocabulary is not None,
        "conditioning.text_transformer.tokenizer=wordpiece needs its vocabulary file; set "
        "conditioning.text_transformer.vocabulary, or tokenizer=clip.",
    )
    low = conditioning.low_resolution
    if low is not None:
        _require(
            config.first_stage.downsampling == low.factor,
            f"conditioning.low_resolution.factor={low.factor} must equal the first stage's downsampling "
            f"factor {config.first_stage.downsampling}, since the image is concatenated to the latents.",
        )
    for name in ("openclip", "openclip_second"):
        tower = getattr(conditioning, name)
        shrunk = tower is not None and any(
            value is not None for value in (tower.width, tower.layers, tower.heads, tower.context_length)
        )
        _require(
            not (shrunk and tower.pretrained),
            f"conditioning.{name}: width, layers, heads and context_length shrink the tower, so pretrained "
            "weights cannot fit; remove one or the other.",
        )
