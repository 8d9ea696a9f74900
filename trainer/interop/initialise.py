"""Start a network from other weights: the same structure, or one with added conditions and input channels."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from trainer.config.run import ConfigError
from trainer.interop.links import ANOTHER, TransferReport
from trainer.weights import check_fit

INPUT = "conv_in.weight"
"""The tensor whose input channels may grow."""
OPTIONAL = (
    "conditions.",
    "uncertainty.",
    "unet.class_embedding.",
    "unet.vector_embedding.",
    "class_embedding.",
    "vector_embedding.",
    "latent_shift",
    "latent_scale",
    "logvar",
    "first_stage.",
    "text_encoder",
)
"""Beginnings of names that one side may have alone: they come and go with a condition."""
STARTS_AT_ZERO = (
    "class_embedding.weight",
    "vector_embedding.linear_2.weight",
    "vector_embedding.linear_2.bias",
)
"""Tensors that, when new, are set to zero, so that an added condition changes nothing at first."""


@torch.no_grad()
def initialise(module: nn.Module, source: Mapping[str, Tensor], origin: str = "the source") -> TransferReport:
    """Copy `source` into `module`, all or nothing.

    Input channels of the UNet that the source lacks start at zero, as SD2's inpainting and depth models
    were made: the network starts out ignoring them. The same holds for an added class or vector condition.

    Args:
        module: a network of ours, whole (not sharded), with initial values.
        source: tensors under our names; the prefix "unet." may be absent throughout.
        origin: where they come from, named in errors.

    Raises:
        ConfigError: the structures differ otherwise; every name and shape is listed, nothing is copied.
    """
    own = module.state_dict()
    source = _matching_prefix(source, own)
    widened = [n for n in own if n in source and _is_widened(n, own[n].shape, source[n].shape)]
    wanted = {n: tuple(t.shape) for n, t in own.items() if n in source or not n.startswith(OPTIONAL)}
    found = {n: tuple(t.shape) for n, t in source.items() if n in own or not n.startswith(OPTIONAL)}
    found |= {n: wanted[n] for n in widened}
    check_fit(wanted, found, origin, ANOTHER)
    taken = [n for n in own if n in source and n not in widened]
    if not taken:
        raise ConfigError(f"{origin} has no tensor of this network; name weights of the same structure.")
    for name in taken:
        own[name].copy_(source[name])
    for name in widened:
        own[name].zero_()
        own[name][:, : source[name].shape[1]].copy_(source[name])
    new = [n for n in own if n not in source]
    for name in new:
        if name.endswith(STARTS_AT_ZERO):
            own[name].zero_()
    left = [n for n in source if n not in own]
    return TransferReport(taken=tuple(taken), widened=tuple(widened), new=tuple(new), left=tuple(left))


def _is_widened(name: str, ours: torch.Size, theirs: torch.Size) -> bool:
    grown = len(ours) == len(theirs) == 4 and ours[1] > theirs[1]
    is_input = name in (INPUT, f"unet.{INPUT}")
    return is_input and grown and (ours[0], *ours[2:]) == (theirs[0], *theirs[2:])


def _matching_prefix(source: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A bare UNet for a network that holds one, and the other way round."""
    nested = f"unet.{INPUT}"
    if nested in own and INPUT in source:
        return {f"unet.{name}": tensor for name, tensor in source.items()}
    if INPUT in own and nested in source:
        return {name.removeprefix("unet."): tensor for name, tensor in source.items()}
    return dict(source)
