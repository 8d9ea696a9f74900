"""UNet parameter names in the diffusers and the CompVis dialect, derived from the level plan."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from trainer.config.models import UNetConfig
from trainer.config.network_plan import plan_levels
from trainer.config.run import ConfigError
from trainer.interop.links import Link
from trainer.models.unet import UNet

Dialect = Literal["diffusers", "compvis"]

COMPVIS_RESIDUAL = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
COMPVIS_ENDS = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "vector_embedding.linear_1": "label_emb.0.0",
    "vector_embedding.linear_2": "label_emb.0.2",
    "class_embedding": "label_emb",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
KNOWN = re.compile(
    r"""(time|vector)_embedding\.linear_[12] | class_embedding | conv_in | conv_norm_out | conv_out
    | (down_blocks\.\d+ | up_blocks\.\d+ | mid_block) \.
      ( ( resnets\.\d+ | downsampler | upsampler ) \. (norm[12] | conv[12] | time_emb_proj | conv_shortcut)
      | (downsampler | upsampler) \.conv
      | attentions\.\d+ \. ( norm | attn\.to_(qkv|out) | proj_(in|out)
        | transformer_blocks\.\d+ \. (norm[123] | attn[12]\.to_(q|kv|qkv|out) | ff\.proj_(in|out)) ) )""",
    re.VERBOSE,
)
"""The layers whose names both dialects have a word for."""


@dataclass(frozen=True)
class UNetSizes:
    """What a UNet needs besides its configuration."""

    in_channels: int
    out_channels: int
    context_dim: int | None = None
    vector_dim: int | None = None
    num_classes: int | None = None

    def build(self, config: UNetConfig) -> UNet:
        """The UNet on the meta device: names and shapes without memory."""
        with torch.device("meta"):
            return UNet(
                config,
                in_channels=self.in_channels,
                out_channels=self.out_channels,
                context_dim=self.context_dim,
                vector_dim=self.vector_dim,
                num_classes=self.num_classes,
            )

    @staticmethod
    def of_ours(tensors: Mapping[str, Tensor]) -> UNetSizes:
        """Read off our own tensors (names without a prefix)."""
        return _sizes_by_name(
            tensors,
            first="conv_in.weight",
            last="conv_out.weight",
            key=".attn2.to_kv.weight",
            vector="vector_embedding.linear_1.weight",
            classes="class_embedding.weight",
        )

    @staticmethod
    def of(dialect: Dialect, tensors: Mapping[str, Tensor]) -> UNetSizes:
        """Read off a dialect's tensors (names without a prefix)."""
        compvis = dialect == "compvis"
        return _sizes_by_name(
            tensors,
            first="input_blocks.0.0.weight" if compvis else "conv_in.weight",
            last="out.2.weight" if compvis else "conv_out.weight",
            key=".attn2.to_k.weight",
            vector="label_emb.0.0.weight" if compvis else "add_embedding.linear_1.weight",
            classes="label_emb.weight" if compvis else "class_embedding.weight",
        )


def unet_links(config: UNetConfig, names: Iterable[str], dialect: Dialect) -> list[Link]:
    """One link per parameter name of our UNet.

    Raises:
        ConfigError: a block that the tables below have no word for; the sentence names it.
    """
    names = list(names)
    for name in names:
        if KNOWN.fullmatch(name.rpartition(".")[0]) is None:
            raise ConfigError(
                f"trainer/interop/unet_names.py has no {dialect} name for {name}; teach it the block, or "
                "keep to --layout native."
            )
    blocks = compvis_blocks(config) if dialect == "compvis" else {}
    return [_link(config, name, dialect, blocks) for name in names]


def compvis_blocks(config: UNetConfig) -> dict[str, str]:
    """Our block names -> CompVis block names, which number all blocks of the UNet in order."""
    levels = plan_levels(config)
    conv = "" if config.resblock_updown else ".conv"
    table = {
        "mid_block.resnets.0": "middle_block.0",
        "mid_block.attentions.0": "middle_block.1",
        "mid_block.resnets.1": "middle_block.2",
    }
    number = 1
    for i, level in enumerate(levels):
        for j in range(config.num_res_blocks):
            table[f"down_blocks.{i}.resnets.{j}"] = f"input_blocks.{number}.0"
            if level.attention:
                table[f"down_blocks.{i}.attentions.{j}"] = f"input_blocks.{number}.1"
            number += 1
        if i < len(levels) - 1:
            op = "" if config.resblock_updown else ".op"
            table[f"down_blocks.{i}.downsampler{conv}"] = f"input_blocks.{number}.0{op}"
            number += 1
    number = 0
    for i, level in enumerate(reversed(levels)):
        for j in range(config.num_res_blocks + 1):
            table[f"up_blocks.{i}.resnets.{j}"] = f"output_blocks.{number}.0"
            if level.attention:
                table[f"up_blocks.{i}.attentions.{j}"] = f"output_blocks.{number}.1"
            number += 1
        if i < len(levels) - 1:
            place = 2 if level.attention else 1
            table[f"up_blocks.{i}.upsampler{conv}"] = f"output_blocks.{number - 1}.{place}{conv}"
    return table


def _link(config: UNetConfig, name: str, dialect: Dialect, blocks: Mapping[str, str]) -> Link:
    layer, _, kind = name.rpartition(".")  # kind: weight or bias
    block, inner = _split_block(layer)
    if not block:
        return Link(name, (f"{_end_name(layer, dialect)}.{kind}",))
    if ".attentions." in f".{layer}":
        return _attention_link(config, name, dialect, blocks)
    if dialect == "compvis":
        if block in blocks and inner:  # a residual block, which may also resample
            return Link(name, (f"{blocks[block]}.{COMPVIS_RESIDUAL[inner]}.{kind}",))
        return Link(name, (f"{blocks[layer]}.{kind}",))
    theirs = name.replace(".downsampler.", ".downsamplers.0.").replace(".upsampler.", ".upsamplers.0.")
    return Link(name, (theirs,))


def _attention_link(config: UNetConfig, name: str, dialect: Dialect, blocks: Mapping[str, str]) -> Link:
    layer, _, kind = name.rpartition(".")
    block, inner = _split_block(layer)
    prefix = blocks[block] if dialect == "compvis" else block
    if config.attention == "plain":
        return _plain_attention_link(config, name, f"{prefix}.", inner, dialect)
    inner = inner.replace("ff.proj_in", "ff.net.0.proj").replace("ff.proj_out", "ff.net.2")
    inner = inner.replace(".to_out", ".to_out.0")
    for stacked, parts in (("to_qkv", ("to_q", "to_k", "to_v")), ("to_kv", ("to_k", "to_v"))):
        if inner.endswith(f".{stacked}"):
            stem = inner.removesuffix(stacked)
            return Link(name, tuple(f"{prefix}.{stem}{part}.{kind}" for part in parts))
    convolution = config.projection == "conv" and inner in ("proj_in", "proj_out") and kind == "weight"
    return Link(name, (f"{prefix}.{inner}.{kind}",), ones=2 if convolution else 0)


def _plain_attention_link(config: UNetConfig, name: str, prefix: str, inner: str, dialect: Dialect) -> Link:
    kind = name.rpartition(".")[2]
    if dialect == "diffusers":
        if inner == "attn.to_qkv":
            return Link(name, tuple(f"{prefix}{part}.{kind}" for part in ("to_q", "to_k", "to_v")))
        theirs = {"norm": "group_norm", "attn.to_out": "to_out.0"}[inner]
        return Link(name, (f"{prefix}{theirs}.{kind}",))
    ones = 1 if kind == "weight" and inner != "norm" else 0  # one-dimensional convolutions
    if inner == "attn.to_qkv":
        return Link(name, (f"{prefix}qkv.{kind}",), ones=ones, heads=_heads_of_block(config, name))
    theirs = {"norm": "norm", "attn.to_out": "proj_out"}[inner]
    return Link(name, (f"{prefix}{theirs}.{kind}",), ones=ones)


def _heads_of_block(config: UNetConfig, name: str) -> int:
    levels = plan_levels(config)
    part, index = name.split(".")[:2]
    if part == "mid_block":
        return levels[-1].heads
    return levels[int(index)].heads if part == "down_blocks" else levels[-1 - int(index)].heads


def _split_block(layer: str) -> tuple[str, str]:
    """ "down_blocks.0.resnets.1.conv1" -> ("down_blocks.0.resnets.1", "conv1"); no block: ("", layer)."""
    parts = layer.split(".")
    depth = {"down_blocks": 4, "up_blocks": 4, "mid_block": 3}.get(parts[0], 0)
    if depth and parts[2:3] in (["downsampler"], ["upsampler"]):
        depth = 3
    return ".".join(parts[:depth]), ".".join(parts[depth:])


def _end_name(layer: str, dialect: Dialect) -> str:
    if dialect == "compvis":
        return COMPVIS_ENDS[layer]
    return layer.replace("vector_embedding", "add_embedding")


def _sizes_by_name(
    tensors: Mapping[str, Tensor], *, first: str, last: str, key: str, vector: str, classes: str
) -> UNetSizes:
    absent = [name for name in (first, last) if name not in tensors or tensors[name].dim() < 2]
    if absent:
        raise ConfigError(
            f"the network is no UNet that we know: it lacks {' and '.join(absent)}; its tensors begin with "
            f"{', '.join(list(tensors)[:3])}."
        )
    contexts = [tensor.shape[1] for name, tensor in tensors.items() if name.endswith(key)]
    return UNetSizes(
        in_channels=tensors[first].shape[1],
        out_channels=tensors[last].shape[0],
        context_dim=contexts[0] if contexts else None,
        vector_dim=tensors[vector].shape[1] if vector in tensors else None,
        num_classes=tensors[classes].shape[0] if classes in tensors else None,
    )
