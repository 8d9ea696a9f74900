"""First-stage parameter names: ours are those of diffusers, CompVis numbers and orders them otherwise."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from torch import Tensor

from trainer.config.models import FirstStageConfig
from trainer.interop.links import Link
from trainer.interop.unet_names import Dialect

STATISTICS = ("latent_shift", "latent_scale")
"""Our buffers that no dialect stores as tensors of the network."""
COMPVIS_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
OLD_DIFFUSERS_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def first_stage_links(config: FirstStageConfig, names: Iterable[str], dialect: Dialect) -> list[Link]:
    """One link per network tensor of our first stage; latent statistics are not among them."""
    network = [name for name in names if name not in STATISTICS and name != "logvar"]
    if dialect == "diffusers":
        return [Link(name, (name,)) for name in network]
    return [_compvis_link(config, name) for name in network]


def modern_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Diffusers' VAE tensors with attention names of before 2023 replaced by today's."""

    def rename(name: str) -> str:
        if ".attentions." not in name:
            return name
        stem, layer, kind = name.rsplit(".", 2)
        return f"{stem}.{OLD_DIFFUSERS_ATTENTION.get(layer, layer)}.{kind}"

    return {rename(name): tensor for name, tensor in tensors.items()}


def _compvis_link(config: FirstStageConfig, name: str) -> Link:
    last = len(config.channel_multipliers) - 1
    layer, _, kind = name.rpartition(".")
    theirs = re.sub(r"^encoder\.down_blocks\.(\d+)", r"encoder.down.\1", layer)
    theirs = re.sub(r"^decoder\.up_blocks\.(\d+)", lambda m: f"decoder.up.{last - int(m[1])}", theirs)
    theirs = re.sub(r"\.mid_block\.resnets\.(\d)", lambda m: f".mid.block_{int(m[1]) + 1}", theirs)
    theirs = theirs.replace(".mid_block.attentions.0", ".mid.attn_1")
    theirs = theirs.replace(".resnets.", ".block.").replace(".attentions.", ".attn.")
    theirs = theirs.replace(".downsamplers.0.", ".downsample.").replace(".upsamplers.0.", ".upsample.")
    theirs = theirs.replace(".conv_shortcut", ".nin_shortcut").replace(".conv_norm_out", ".norm_out")
    ones = 0
    if ".attentions." in layer:
        inner = re.sub(r"^.*\.attentions\.\d+\.", "", layer)
        theirs = theirs.removesuffix(inner) + COMPVIS_ATTENTION[inner]
        ones = 2 if kind == "weight" and inner != "group_norm" else 0  # 1x1 convolutions there
    return Link(name, (f"{theirs}.{kind}",), ones=ones)
