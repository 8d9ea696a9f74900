"""The adapters of a run as the file that diffusers' training scripts write and its loaders read.

    pytorch_lora_weights.safetensors
        unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k.lora.down.weight   A [r, in]
        unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k.lora.up.weight     alpha / r B [out, r]

Readers that are told no alpha take alpha = r, so its scale is a part of B. An adapter of a product of several
projections becomes one for each of them, with the same A.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from data_pipeline.storage.urls import join
from trainer.config.models import UNetConfig
from trainer.config.run import ConfigError
from trainer.interop.links import Link
from trainer.interop.unet_names import unet_links
from trainer.weights import TORCH_ENDINGS, write_weights

LORA_FILE = "pytorch_lora_weights.safetensors"


def write_lora(
    adapters: Mapping[str, tuple[Tensor, Tensor]],
    destination: str,
    config: UNetConfig,
    dtype: torch.dtype = torch.float32,
) -> str:
    """Write the adapters and return the file's URL.

    Args:
        adapters: (A [r, in], B [out, r]) by our name of the weight that they adapt, "unet.*".
        destination: folder, or a .safetensors file; any URL.

    Raises:
        ConfigError: the destination is no such thing, or diffusers has no name for a layer.
    """
    if not destination.strip() or destination.endswith(TORCH_ENDINGS):
        raise ConfigError(
            f"the lora layout is a folder or a .safetensors file; name one in the place of {destination!r}."
        )
    url = destination if destination.endswith(".safetensors") else join(destination, LORA_FILE)
    inside = {name.removeprefix("unet."): both for name, both in adapters.items()}
    links = unet_links(config, inside, "diffusers")
    made = {name: value for link in links for name, value in _of_layer(link, *inside[link.ours]).items()}
    write_weights(url, {name: value.to(dtype) for name, value in made.items()}, {"format": "pt"})
    return url


def _of_layer(link: Link, down: Tensor, up: Tensor) -> dict[str, Tensor]:
    ones = (1,) * link.ones  # of a layer that is a 1x1 convolution there
    made = {}
    for theirs, rows in zip(link.theirs, up.chunk(len(link.theirs)), strict=True):
        layer = f"unet.{theirs.removesuffix('.weight')}.lora"
        made[f"{layer}.down.weight"] = down.reshape(down.shape + ones).clone()
        made[f"{layer}.up.weight"] = rows.reshape(rows.shape + ones).clone()
    return made
