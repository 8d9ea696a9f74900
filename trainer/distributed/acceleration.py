"""What makes a network's Python cheap: regions compiled by torch.compile, or the whole of it as CUDA graphs.

Neither changes what is computed, and gradients still arrive through the parameters' own hooks, so engines
do not notice. Compilation takes the blocks that repeat, one by one: a UNet has a few kinds of them, each
compiled once and found again on disk by the next start and by the other ranks of a node, where the whole
network would take minutes. Graphs replay all kernels of forward and of backward with one call each: for
micro-batches so small that the processor cannot launch kernels as fast as the GPU ends them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from trainer.config.training import DistributedConfig
from trainer.first_stage.networks import ResidualBlock, SpatialAttention
from trainer.kernels.language import use_kernels
from trainer.models.attention import PlainAttention, SpatialTransformer
from trainer.models.layers import ResBlock

REGIONS = (ResBlock, SpatialTransformer, PlainAttention, ResidualBlock, SpatialAttention)
"""Blocks that repeat."""
VARIANTS = 64
"""Compiled forms of one block: its widths and skip connections, times the shapes of a run's buckets."""


def configure_process(config: DistributedConfig) -> None:
    """The switches of this process that decide speed, not results: kernels, and cuDNN's algorithms."""
    use_kernels(config.fused_kernels and config.channels_last)
    torch.backends.cudnn.benchmark = config.cudnn_benchmark


def compile_regions(network: nn.Module) -> int:
    """Compile every repeating block in place, for fixed shapes; returns how many there are."""
    # Every width is a variant of the same code; beyond the default of 8 torch would go on uncompiled.
    torch._dynamo.config.recompile_limit = max(VARIANTS, torch._dynamo.config.recompile_limit)
    regions = [module for module in network.modules() if isinstance(module, REGIONS)]
    for region in regions:
        region.compile(dynamic=False)
    return len(regions)


class GraphedForward:
    """A network's training forward as CUDA graphs, captured once per set of input shapes.

    Inputs are tensors in tuples and dictionaries, none of which needs a gradient. What is returned, and the
    gradients that backward hands over, lie in memory that the next call overwrites: engines take gradients
    away after each micro-batch.
    """

    def __init__(self, network: nn.Module) -> None:
        self._network = network
        self._captured: dict[Any, Callable[..., Any]] = {}

    def __call__(self, *args: Any) -> Any:
        """As the network's own."""
        tensors, structure = pytree.tree_flatten(args)
        key = (str(structure), tuple((t.shape, t.dtype) for t in tensors), torch.is_grad_enabled())
        if key not in self._captured:
            self._captured[key] = self._capture(tensors, structure)
        return self._captured[key](*tensors)

    def _capture(self, tensors: list[Tensor], structure: pytree.TreeSpec) -> Callable[..., Any]:
        examples = tuple(t.detach().clone(memory_format=torch.contiguous_format) for t in tensors)
        flat = _FlatForward(self._network, structure)
        return torch.cuda.make_graphed_callables(flat, examples, allow_unused_input=True)


class _FlatForward(nn.Module):
    """The network as a function of a flat list of tensors."""

    def __init__(self, network: nn.Module, structure: pytree.TreeSpec) -> None:
        super().__init__()
        self.network = network
        self._structure = structure

    def forward(self, *tensors: Tensor) -> Any:
        return self.network(*pytree.tree_unflatten(tensors, self._structure))
