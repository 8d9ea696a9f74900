"""Norms of weights and of their mean gradients, layer by layer: where a network grows, or stands still.

    layers/unet.down_blocks.0/weight      Euclidean norm of all its fp32 weights
    layers/unet.down_blocks.0/gradient    of Adam's first moment, the gradient averaged over about ten steps

The first moment is what ZeRO keeps after a step, when the gradients themselves are gone; Muon's momentum
stands in the same place. Each rank reads the elements that it owns (8 bytes a parameter, over all ranks
together) and the ranks add up two numbers a layer, so the cost does not grow with their number; on other
steps there is none.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from trainer.distributed import collectives
from trainer.distributed.engine import Engine


def layer_of(name: str) -> str:
    """The layer of a parameter: its modules down to the first that is numbered, two where none is.

    >>> layer_of("unet.down_blocks.0.resnets.1.conv1.weight")
    'unet.down_blocks.0'
    >>> layer_of("unet.conv_in.weight")
    'unet.conv_in'
    """
    modules = name.split(".")[:-1]
    numbered = next((place for place, module in enumerate(modules) if module.isdigit()), None)
    return ".".join(modules[: numbered + 1] if numbered is not None else modules[:2])


@torch.no_grad()
def layer_norms(engines: Mapping[str, Engine]) -> dict[str, float]:
    """The norms of all networks, the same on every rank. Collective; waits for the device."""
    norms: dict[str, float] = {}
    for name, engine in engines.items():
        layers = list(dict.fromkeys(map(layer_of, engine.parameter_shapes)))
        prefix = "layers" if len(engines) == 1 else f"layers/{name}"
        sums = collectives.reduce_sum(_squares(engine, layers)).sqrt().tolist()
        for layer, (weight, gradient) in zip(layers, sums, strict=True):
            norms[f"{prefix}/{layer}/weight"] = weight
            norms[f"{prefix}/{layer}/gradient"] = gradient
    return norms


def _squares(engine: Engine, layers: list[str]) -> Tensor:
    """Sums of squares of what this rank owns, float64 [layers, 2]."""
    row = {layer: place for place, layer in enumerate(layers)}
    sums = torch.zeros(len(layers), 2, dtype=torch.float64, device=engine.device)
    for fragment in engine.fragments():
        of_layer = sums[row[layer_of(fragment.name)]]
        of_layer[0] += torch.linalg.vector_norm(fragment.master, dtype=torch.float64).square()
        of_layer[1] += torch.linalg.vector_norm(fragment.moments["exp_avg"], dtype=torch.float64).square()
    return sums
