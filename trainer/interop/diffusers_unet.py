"""UNetConfig and the config.json of diffusers' UNets, in both directions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from trainer.config.models import UNetConfig
from trainer.config.network_plan import middle_depth, plan_levels
from trainer.config.run import ConfigError
from trainer.interop.unet_names import UNetSizes

Json = dict[str, Any]

CONDITIONAL_FIXED: Json = {
    "act_fn": "silu",
    "addition_embed_type": ("text_time", None),
    "attention_type": "default",
    "center_input_sample": False,
    "class_embed_type": None,
    "class_embeddings_concat": False,
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "cross_attention_norm": None,
    "downsample_padding": 1,
    "dual_cross_attention": False,
    "encoder_hid_dim": None,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "mid_block_only_cross_attention": (None, False),
    "mid_block_scale_factor": 1,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "norm_eps": 1e-5,
    "num_attention_heads": None,
    "resnet_out_scale_factor": 1.0,
    "resnet_skip_time_act": False,
    "reverse_transformer_layers_per_block": None,
    "time_cond_proj_dim": None,
    "time_embedding_act_fn": None,
    "time_embedding_dim": None,
    "time_embedding_type": "positional",
    "timestep_post_act": None,
}
"""Settings of UNet2DConditionModel that our UNet cannot vary; a tuple lists the values it can have."""


@dataclass(frozen=True)
class UNetDescription:
    """A UNet as our configuration and sizes say it."""

    config: UNetConfig
    sizes: UNetSizes


def unet_to_diffusers(config: UNetConfig, sizes: UNetSizes, sample_size: int) -> Json:
    """config.json of the equal UNet2DConditionModel, or UNet2DModel where attention is plain.

    Raises:
        ConfigError: diffusers has no such UNet.
    """
    if config.res_block_groups not in (None, config.num_groups):
        raise ConfigError("diffusers has one number of groups; unet.res_block_groups cannot be exported.")
    if config.attention not in ("transformer", "plain"):
        raise ConfigError(
            f"diffusers has no block like unet.attention={config.attention}; use layout=native."
        )
    if config.attention == "plain":
        return _plain_to_diffusers(config, sizes, sample_size)
    if config.resblock_updown:
        raise ConfigError(
            "diffusers has no cross-attention UNet with unet.resblock_updown; use layout=compvis."
        )
    if sizes.context_dim is None:
        raise ConfigError("diffusers' conditional UNet needs a context; use layout=native.")
    levels = plan_levels(config)
    depths = [level.depth for level in levels]
    if not levels[-1].attention:
        depths[-1] = middle_depth(config)
    if depths[-1] != middle_depth(config):
        raise ConfigError(
            "diffusers takes unet.middle_transformer_depth from the last level; here it differs."
        )
    down = ["CrossAttnDownBlock2D" if level.attention else "DownBlock2D" for level in levels]
    heads = [level.heads for level in levels]
    json: Json = {
        "_class_name": "UNet2DConditionModel",
        "sample_size": sample_size,
        "in_channels": sizes.in_channels,
        "out_channels": sizes.out_channels,
        "down_block_types": down,
        "up_block_types": [name.replace("Down", "Up") for name in reversed(down)],
        "block_out_channels": [level.channels for level in levels],
        "layers_per_block": config.num_res_blocks,
        "dropout": config.dropout,
        "norm_num_groups": config.num_groups,
        "cross_attention_dim": sizes.context_dim,
        "transformer_layers_per_block": depths,
        # Despite its name this is the number of heads (diffusers keeps it for old files).
        "attention_head_dim": heads[0] if len(set(heads)) == 1 else heads,
        "use_linear_projection": config.projection == "linear",
        "only_cross_attention": [level.cross_attention_only for level in levels],
        "num_class_embeds": sizes.num_classes,
        "resnet_time_scale_shift": "scale_shift" if config.scale_shift_norm else "default",
    }
    if sizes.vector_dim is not None:
        json["addition_embed_type"] = "text_time"
        json["addition_time_embed_dim"] = 256
        json["projection_class_embeddings_input_dim"] = sizes.vector_dim
    return json


def unet_from_diffusers(json: Mapping[str, Any]) -> UNetDescription:
    """The inverse of `unet_to_diffusers`, for the classes UNet2DConditionModel and UNet2DModel.

    Raises:
        ConfigError: a setting that our UNet does not have; it is named.
    """
    name = json.get("_class_name", "UNet2DConditionModel")
    if name == "UNet2DModel":
        return _plain_from_diffusers(json)
    if name != "UNet2DConditionModel":
        raise ConfigError(f"{name} cannot be imported; UNet2DConditionModel and UNet2DModel can.")
    require_kinds(json, UNET_KINDS)
    require_fixed(json, CONDITIONAL_FIXED)
    channels = json["block_out_channels"]
    types = json["down_block_types"]
    require_known(types, {"CrossAttnDownBlock2D", "DownBlock2D"})
    heads = _per_level(json.get("attention_head_dim", 8), len(channels))
    widths = {c // h for c, h in zip(channels, heads, strict=True)}
    depths = _per_level(json.get("transformer_layers_per_block", 1), len(channels))
    cross_only = _per_level(json.get("only_cross_attention", False), len(channels))
    config = UNetConfig(
        model_channels=channels[0],
        channel_multipliers=tuple(c // channels[0] for c in channels),
        num_res_blocks=json.get("layers_per_block", 2),
        attention_factors=factors_of(types, "CrossAttn"),
        num_heads=heads[0] if len(widths) > 1 else None,
        head_dim=None if len(widths) > 1 else widths.pop(),
        transformer_depth=tuple(depths),
        projection="linear" if json.get("use_linear_projection", False) else "conv",
        cross_attention_only=tuple(cross_only) if any(cross_only) else (),
        scale_shift_norm=json.get("resnet_time_scale_shift", "default") == "scale_shift",
        num_groups=json.get("norm_num_groups", 32),
        dropout=json.get("dropout", 0.0),
    )
    vector = json.get("projection_class_embeddings_input_dim") if json.get("addition_embed_type") else None
    sizes = UNetSizes(
        in_channels=json["in_channels"],
        out_channels=json["out_channels"],
        context_dim=json.get("cross_attention_dim", 1280),
        vector_dim=vector,
        num_classes=json.get("num_class_embeds"),
    )
    return UNetDescription(config, sizes)


def _plain_to_diffusers(config: UNetConfig, sizes: UNetSizes, sample_size: int) -> Json:
    levels = plan_levels(config)
    attending = [level for level in levels if level.attention] + [levels[-1]]
    widths = {level.channels // level.heads for level in attending}
    single_head = all(level.heads == 1 for level in attending)
    if len(widths) > 1 and not single_head:
        raise ConfigError(
            "UNet2DModel has one head width; plain attention with unet.num_heads > 1 has several."
        )
    if sizes.vector_dim is not None:
        raise ConfigError("UNet2DModel has no vector condition; use layout=native.")
    last = len(levels) - 1
    plain = "ResnetDownsampleBlock2D" if config.resblock_updown else "DownBlock2D"
    down = ["AttnDownBlock2D" if lv.attention else plain for lv in levels[:last]]
    down.append("AttnDownBlock2D" if levels[last].attention else "DownBlock2D")
    up = [name.replace("Downsample", "Upsample").replace("Down", "Up") for name in reversed(down)]
    resample = "resnet" if config.resblock_updown else "conv"
    return {
        "_class_name": "UNet2DModel",
        "sample_size": sample_size,
        "in_channels": sizes.in_channels,
        "out_channels": sizes.out_channels,
        "down_block_types": down,
        "up_block_types": up,
        "block_out_channels": [level.channels for level in levels],
        "layers_per_block": config.num_res_blocks,
        "downsample_type": resample,
        "upsample_type": resample,
        "dropout": config.dropout,
        "attention_head_dim": None if single_head else widths.pop(),
        "norm_num_groups": config.num_groups,
        # Without it, scale-shift UNets of diffusers leave out the norm before the middle attention.
        "attn_norm_num_groups": config.num_groups,
        "norm_eps": 1e-5,
        "resnet_time_scale_shift": "scale_shift" if config.scale_shift_norm else "default",
        "num_class_embeds": sizes.num_classes,
    }


def _plain_from_diffusers(json: Mapping[str, Any]) -> UNetDescription:
    keep = ("act_fn", "center_input_sample", "downsample_padding", "flip_sin_to_cos", "freq_shift")
    fixed: Json = {name: CONDITIONAL_FIXED[name] for name in (*keep, "norm_eps", "time_embedding_type")}
    groups = json.get("norm_num_groups", 32)
    scale_shift = json.get("resnet_time_scale_shift", "default") == "scale_shift"
    fixed["attn_norm_num_groups"] = groups if scale_shift else (None, groups)
    require_fixed(
        {"attn_norm_num_groups": None, **json}, {**fixed, "class_embed_type": None, "add_attention": True}
    )
    require_kinds(
        json, UNET_KINDS | {"attention_head_dim": (_is_whole, "a number of channels or null", None)}
    )
    channels = json["block_out_channels"]
    types = json["down_block_types"]
    require_known(types, {"AttnDownBlock2D", "DownBlock2D", "ResnetDownsampleBlock2D"})
    head_dim = json.get("attention_head_dim", 8)
    config = UNetConfig(
        model_channels=channels[0],
        channel_multipliers=tuple(c // channels[0] for c in channels),
        num_res_blocks=json.get("layers_per_block", 2),
        attention_factors=factors_of(types, "Attn"),
        attention="plain",
        num_heads=1 if head_dim is None else None,
        head_dim=head_dim,
        scale_shift_norm=scale_shift,
        resblock_updown=json.get("downsample_type", "conv") == "resnet",
        num_groups=groups,
        dropout=json.get("dropout", 0.0),
    )
    sizes = UNetSizes(json["in_channels"], json["out_channels"], num_classes=json.get("num_class_embeds"))
    return UNetDescription(config, sizes)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_per_level(each: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda v: all(each(item) for item in v) if isinstance(v, list | tuple) and v else each(v)


def _is_list(each: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda v: isinstance(v, list | tuple) and bool(v) and all(each(item) for item in v)


Kinds = dict[str, tuple[Callable[[Any], bool], str, Any]]
"""By setting: whether a value is of its kind, the kind in words, what an absent one means; `...`: refused."""

BLOCK_KINDS: Kinds = {
    "block_out_channels": (_is_list(_is_whole), "a list of numbers of channels", ...),
    "down_block_types": (_is_list(lambda v: isinstance(v, str)), "a list of kinds of blocks", ...),
    "layers_per_block": (_is_whole, "a number of layers", 2),
    "norm_num_groups": (_is_whole, "a number of groups", 32),
}
UNET_KINDS: Kinds = {
    **BLOCK_KINDS,
    "in_channels": (_is_whole, "a number of channels", ...),
    "out_channels": (_is_whole, "a number of channels", ...),
    "attention_head_dim": (_is_per_level(_is_whole), "a number of heads, or one for each level", 8),
    "cross_attention_dim": (_is_whole, "a width", 1280),
    "transformer_layers_per_block": (_is_per_level(_is_whole), "a number, or one for each level", 1),
    "only_cross_attention": (_is_per_level(lambda v: isinstance(v, bool)), "true or false, or a list", False),
    "dropout": (lambda v: isinstance(v, int | float), "a number", 0.0),
    "num_class_embeds": (lambda v: v is None or _is_whole(v), "a number or null", None),
    "projection_class_embeddings_input_dim": (lambda v: v is None or _is_whole(v), "a width or null", None),
}


def require_kinds(json: Mapping[str, Any], kinds: Kinds) -> None:
    """Refuse a configuration that lacks a setting, has one of another kind, or lists for other levels.

    Raises:
        ConfigError: names the setting and says what it must be.
    """
    levels = json.get("block_out_channels")
    for key, (is_kind, words, default) in kinds.items():
        if key not in json and default is ...:
            raise ConfigError(
                f"the diffusers configuration lacks {key}, {words}; copy its config.json again."
            )
        value = json.get(key, default)
        if value is not default and not is_kind(value):
            raise ConfigError(f"the diffusers setting {key}={value!r} is not supported; it must be {words}.")
        if isinstance(value, list | tuple) and len(value) != len(levels or value):
            raise ConfigError(
                f"the diffusers setting {key} has {len(value)} values for {len(levels or ())} levels; copy "
                "its config.json again."
            )


def require_fixed(json: Mapping[str, Any], fixed: Json) -> None:
    """Refuse settings that our networks cannot vary."""
    for key, allowed in fixed.items():
        options = allowed if isinstance(allowed, tuple) else (allowed,)
        if json.get(key, options[0]) not in options:
            raise ConfigError(
                f"the diffusers setting {key}={json[key]!r} is not supported; it must be {allowed!r}."
            )


def require_known(types: list[str], known: set[str]) -> None:
    """Refuse kinds of blocks that our networks do not have."""
    strange = sorted(set(types) - known)
    if strange:
        raise ConfigError(f"blocks of type {', '.join(strange)} have no counterpart here.")


def factors_of(types: list[str], marker: str) -> tuple[int, ...]:
    """Downsampling factors of the levels whose block type starts with `marker`."""
    return tuple(2**i for i, name in enumerate(types) if name.startswith(marker))


def _per_level(value: Any, count: int) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value] * count
