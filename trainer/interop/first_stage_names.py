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
_ATTENTION_WORDS = (
    COMPVIS_ATTENTION,
    {"group_norm": "group_norm", "to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"},
)
_OURS = {word: ours for words in _ATTENTION_WORDS for ours, word in words.items()}
"""Any layout's word for a layer of an attention -> ours; diffusers had those of the second row until 2023."""
_ATTENTION = re.compile(r"((?:.*\.)?(?:attentions\.\d+|attn_\d+|attn\.\d+))\.(\w+|to_out\.0)\.(weight|bias)")


def first_stage_links(config: FirstStageConfig, names: Iterable[str], dialect: Dialect) -> list[Link]:
    """One link per network tensor of our first stage; latent statistics are not among them."""
    network = [name for name in names if name not in STATISTICS and name != "logvar"]
    if dialect == "diffusers":
        return [Link(name, (name,)) for name in network]
    return [_compvis_link(config, name) for name in network]


def usual_attention(tensors: Mapping[str, Tensor], dialect: Dialect) -> dict[str, Tensor]:
    """A network's tensors with its plain attentions as the dialect has them today, whoever wrote the file.

    Layers go by the words of either layout or by those of old versions, and their weights are [C, C] or,
    as 1x1 convolutions, [C, C, 1, 1]: the same numbers.
    """
    usual: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        match = _ATTENTION.fullmatch(name)
        layer = match[2] if match else ""
        layer = _OURS.get(layer, layer)
        if match is None or layer not in COMPVIS_ATTENTION:
            usual[name] = tensor
            continue
        if match[3] == "weight" and layer != "group_norm":
            if dialect == "diffusers" and tensor.dim() == 4 and tensor.shape[2:] == (1, 1):
                tensor = tensor[:, :, 0, 0]
            elif dialect == "compvis" and tensor.dim() == 2:
                tensor = tensor[:, :, None, None]
        word = layer if dialect == "diffusers" else COMPVIS_ATTENTION[layer]
        usual[f"{match[1]}.{word}.{match[3]}"] = tensor
    return usual if len(usual) == len(tensors) else dict(tensors)


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
