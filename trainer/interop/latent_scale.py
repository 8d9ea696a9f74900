"""Latent statistics inside the weights of a KL autoencoder, for programs that know one scale factor or none.

    quant_conv, the encoder's last layer:       mean' = (mean - shift) * scale, logvar' = logvar + 2 ln scale
    post_quant_conv, the decoder's first layer:  z = z' / scale + shift

Both are 1x1 convolutions, so this is exact. A quantised stage is another matter: its nearest codebook entry
is not the nearest any more when channels are scaled differently.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

QUANT, POST_QUANT = "quant_conv", "post_quant_conv"


def folded(
    tensors: Mapping[str, Tensor], shift: Sequence[float], scale: Sequence[float]
) -> dict[str, Tensor]:
    """Weights whose plain latents are (z - shift) * scale of the given ones.

    Args:
        tensors: of a KL autoencoder, "quant_conv.weight" [2 z, 2 z, 1, 1] and "post_quant_conv.weight"
            [z, z, 1, 1] with their biases among them.
        shift: z numbers.
        scale: z numbers, above 0.
    """
    down, by = torch.tensor(shift, dtype=torch.float64), torch.tensor(scale, dtype=torch.float64)
    z = len(by)
    made = dict(tensors)
    weight, bias = (tensors[f"{QUANT}.{kind}"].double() for kind in ("weight", "bias"))
    made[f"{QUANT}.weight"] = torch.cat([weight[:z] * by.view(-1, 1, 1, 1), weight[z:]])
    made[f"{QUANT}.bias"] = torch.cat([(bias[:z] - down) * by, bias[z:] + 2 * by.log()])
    weight, bias = (tensors[f"{POST_QUANT}.{kind}"].double() for kind in ("weight", "bias"))
    made[f"{POST_QUANT}.weight"] = weight / by.view(1, -1, 1, 1)
    made[f"{POST_QUANT}.bias"] = bias + (weight.flatten(1) @ down)
    changed = [f"{layer}.{kind}" for layer in (QUANT, POST_QUANT) for kind in ("weight", "bias")]
    return made | {name: made[name].to(tensors[name].dtype) for name in changed}


def is_one_number(shift: Sequence[float], scale: Sequence[float]) -> bool:
    """Whether a single scale factor says the same."""
    return not any(shift) and len(set(scale)) == 1
