"""Text-tower parameter names: ours are open_clip's, the other dialect is the CLIP of transformers. And
those of the text transformer that is trained jointly, which LDM has from x-transformers."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from torch import Tensor

from trainer.interop.links import Link

LAYER = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
    "attn.out_proj": "self_attn.out_proj",
}
ENDS = {
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
}
TRANSFORMER = {
    "embedding.weight": "token_emb.weight",
    "transformer.positions": "pos_emb.emb.weight",
    "transformer.norm.weight": "norm.weight",
    "transformer.norm.bias": "norm.bias",
}
BLOCK = {
    "attention_norm": (0, "0"),
    "attention.to_q": (0, "1.to_q"),
    "attention.to_k": (0, "1.to_k"),
    "attention.to_v": (0, "1.to_v"),
    "attention.to_out": (0, "1.to_out"),
    "feed_forward_norm": (1, "0"),
    "feed_forward.0": (1, "1.net.0.0"),
    "feed_forward.3": (1, "1.net.2"),
}
"""Part of a block -> which of the two layers it is in x-transformers, and its name there."""
OUTPUT_HEAD = ("to_logits.weight", "to_logits.bias")
"""Of x-transformers, which LDM never uses."""
NO_WEIGHTS = ("attn_mask", "logit_scale", "logit_bias", "text_model.embeddings.position_ids")
"""Names in such files that belong to no text tower of ours."""


def text_tower_links(names: Iterable[str]) -> list[Link]:
    """One link per tensor of open_clip's text tower to the names of transformers' CLIPTextModel."""
    return [_link(name) for name in names if name not in NO_WEIGHTS]


def with_text_model(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A CLIPTextModel's tensors, whose names some versions of transformers write without `text_model.`."""
    inner = ("embeddings.", "encoder.", "final_layer_norm.")
    return {f"text_model.{n}" if n.startswith(inner) else n: tensor for n, tensor in tensors.items()}


def open_clip_names(theirs: Mapping[str, Tensor]) -> list[str]:
    """The names that a CLIPTextModel's tensors have in open_clip, by which links can be made."""
    layers = [int(m[1]) for name in theirs if (m := re.match(r"text_model\.encoder\.layers\.(\d+)\.", name))]
    names = list(ENDS)
    for i in range(max(layers, default=-1) + 1):
        block = f"transformer.resblocks.{i}"
        names += [f"{block}.attn.in_proj_weight", f"{block}.attn.in_proj_bias"]
        names += [f"{block}.{layer}.{kind}" for layer in LAYER for kind in ("weight", "bias")]
    return [*names, "text_projection"] if "text_projection.weight" in theirs else names


def text_transformer_links(names: Iterable[str]) -> list[Link]:
    """One link per tensor of our text transformer (no prefix) to the names of x-transformers in LDM."""
    return [Link(name, (TRANSFORMER.get(name) or _block_name(name),)) for name in names]


def _block_name(name: str) -> str:
    match = re.fullmatch(r"transformer\.blocks\.(\d+)\.(.+)\.(weight|bias)", name)
    assert match is not None, name
    layer, inner = BLOCK[match[2]]
    return f"attn_layers.layers.{2 * int(match[1]) + layer}.{inner}.{match[3]}"


def _link(name: str) -> Link:
    if name in ENDS:
        return Link(name, (ENDS[name],))
    if name == "text_projection":
        return Link(name, ("text_projection.weight",), transposed=True)
    match = re.fullmatch(r"transformer\.resblocks\.(\d+)\.(.+)", name)
    assert match is not None, name
    layer = f"text_model.encoder.layers.{match[1]}"
    if match[2].startswith("attn.in_proj_"):
        kind = match[2].removeprefix("attn.in_proj_")
        return Link(name, tuple(f"{layer}.self_attn.{part}_proj.{kind}" for part in "qkv"))
    inner, _, kind = match[2].rpartition(".")
    return Link(name, (f"{layer}.{LAYER[inner]}.{kind}",))
