"""The part of a network that is not trained: which parameters, and this rank's share of them for checkpoints.

Engines know trained parameters alone: gradients, optimizer state and averages exist for nothing else. So that
a checkpoint is a whole network nevertheless, it also holds the frozen weights, a share from each rank; a run
that goes on takes them from where it took them at first, and compares. A layer inside of an adapter (lora.py)
is stored under the names that it had before.
"""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Mapping, Sequence
from types import MappingProxyType

import torch
from torch import nn

from trainer.config.run import ConfigError
from trainer.distributed.engine import Fragment
from trainer.distributed.replicas import replicated_fragments

WRAPPED = ".base_layer."
"""What peft puts into the names of a layer's parameters when it wraps an adapter around it."""


def freeze(network: nn.Module, trainable: Sequence[str]) -> None:
    """Let only the parameters that a pattern names be trained; without patterns, all of them.

    Args:
        trainable: shell patterns over parameter names ("unet.*.attn2.*"), or the name of a module
            ("conditions") for everything in it.

    Raises:
        ConfigError: a pattern names nothing.
    """
    if not trainable:
        return
    names = [name for name, _ in network.named_parameters()]
    for pattern in trainable:
        if not any(is_named(pattern, name) for name in names):
            raise ConfigError(
                f"trainable names {pattern!r}, which is no parameter of the network; {hint(pattern, names)}"
            )
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(any(is_named(pattern, name) for pattern in trainable))


class FrozenWeights:
    """This rank's share of the frozen parameters, fp32, on the CPU; taken before an engine casts them."""

    optimizer_steps = 0
    """None is ever made."""
    moments: tuple[str, ...] = ()
    whole_state: Mapping[str, torch.Tensor] = MappingProxyType({})

    def __init__(self, network: nn.Module, rank: int, world_size: int) -> None:
        parameters = network.named_parameters()
        frozen = {name.replace(WRAPPED, "."): p for name, p in parameters if not p.requires_grad}
        self.parameter_shapes = {name: tuple(p.shape) for name, p in frozen.items()}
        shares = replicated_fragments(
            list(frozen),
            [p.detach().float().contiguous() for p in frozen.values()],
            [{} for _ in frozen],
            rank=rank,
            world_size=world_size,
        )
        self._fragments = [
            Fragment(share.name, share.shape, share.start, share.master.to("cpu", copy=True), {})
            for share in shares
        ]

    def fragments(self) -> list[Fragment]:
        """As of an engine, without moments; the same views at every call."""
        return self._fragments

    @torch.no_grad()
    def differing(self, stored: Sequence[torch.Tensor]) -> list[str]:
        """Names of fragments whose values are not `stored`, which lie as `fragments` do."""
        return [
            fragment.name
            for fragment, values in zip(self._fragments, stored, strict=True)
            if not torch.equal(fragment.master, values)
        ]


def is_named(pattern: str, name: str) -> bool:
    """Whether a pattern means the thing of this name: by itself, or as a part of a module."""
    return fnmatch.fnmatchcase(name, pattern) or name.startswith(f"{pattern}.")


def hint(pattern: str, names: list[str]) -> str:
    """What may have been meant by a pattern that means nothing."""
    modules = {".".join(name.split(".")[:i]) for name in names for i in range(1, name.count(".") + 2)}
    near = difflib.get_close_matches(pattern.strip("*."), sorted(modules), n=1, cutoff=0.5)
    if near:
        return f"did you mean {near[0]}?"
    tops = sorted({name.split(".")[0] for name in names})
    return f"name a module such as {tops[0]}, or a pattern such as {tops[-1]}.*."
