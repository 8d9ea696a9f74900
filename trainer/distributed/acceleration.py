"""What makes a network cheap to run: compiled regions, CUDA graphs, kernels laid out as cuDNN reads them.

None changes what is computed, and gradients still arrive through the parameters' own hooks, so engines
hardly notice. Compilation takes the blocks that repeat, one by one: a UNet has a few kinds of them, each
compiled once per shape and found again on disk by the next start, where the whole network would take minutes.
Ranks of a node compile side by side: seven that waited for one would begin no sooner. Graphs replay all
kernels of forward and of backward with one call each: for micro-batches so small that the processor cannot
launch kernels as fast as the GPU ends them.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch.func import functional_call

from trainer.config.training import DistributedConfig
from trainer.first_stage.networks import ResidualBlock, SpatialAttention
from trainer.models.attention import PlainAttention, SpatialTransformer
from trainer.models.layers import ResBlock

REGIONS = (ResBlock, SpatialTransformer, PlainAttention, ResidualBlock, SpatialAttention)
"""Blocks that repeat."""
FORMS = 1024
"""Most compiled forms of one kind of block. SD2's residual blocks have 14 per shape of a batch, by widths,
skips and levels; with gradients and, for previews, without: 140 for the five shapes of its buckets."""


class ChannelsLastKernels:
    """Kernels of convolutions in the layout of the maps they meet, beside where an engine lays weights out.

        flat     o i y x   slices of ZeRO's partition: masters, moments, checkpoints, what ranks exchange
        weight   o y x i   what the network computes with, made from the flat one once per optimizer step

    cuDNN would otherwise convert each kernel in forward and again in backward; only its gradient is still
    converted, once per micro-batch (`FlatGradients`). Takes another copy of trained kernels in memory.
    Logical shapes stay as they were; a kernel of 1 x 1 lies the same way in both and is left alone.
    """

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        kernels = [p for p in parameters if p.dim() == 4 and not is_channels_last(p)]
        self._weights = [p for p in kernels if p.requires_grad]  # frozen ones never change
        self._flat = [p.data for p in self._weights]
        for kernel in kernels:
            kernel.data = kernel.data.contiguous(memory_format=torch.channels_last)

    @torch.no_grad()
    def follow(self) -> None:
        """The flat weights have changed."""
        if self._weights:
            torch._foreach_copy_([weight.data for weight in self._weights], self._flat)


def keeps_kernels(config: DistributedConfig) -> bool:
    """Whether an engine that computes in bf16 beside flat masters keeps kernels channels-last.

    Other stages of ZeRO read gradients as flat vectors, or gather weights for every layer; so does fsdp.
    """
    able = config.engine == "torch" or (config.engine == "deepspeed" and config.zero_stage == 1)
    return able and config.precision == "bf16" and config.channels_last and config.channels_last_kernels


def is_channels_last(x: Tensor) -> bool:
    """Whether a feature map or kernel lies with its channels innermost; both ways where there is one cell."""
    return x.is_contiguous(memory_format=torch.channels_last)


def compile_regions(network: nn.Module) -> int:
    """Compile every repeating block in place, for fixed shapes; returns how many there are."""
    # Every width is a form of the same code; beyond its limits torch would go on uncompiled, with a warning.
    for limit in ("recompile_limit", "accumulated_recompile_limit"):
        setattr(torch._dynamo.config, limit, max(FORMS, getattr(torch._dynamo.config, limit)))
    regions = [module for module in network.modules() if isinstance(module, REGIONS)]
    for region in regions:
        region.compile(dynamic=False)
    return len(regions)


class GraphedForward:
    """A network's forward, and its backward in training, as CUDA graphs, captured once per set of shapes.

    Inputs are tensors in tuples and dictionaries, none of which needs a gradient; the result is one tensor.
    It and the gradients that backward hands over lie in memory that the next call overwrites: engines take
    gradients away after each micro-batch. All captures share that memory: no two are ever under way.
    """

    def __init__(self, network: nn.Module) -> None:
        self._network = network
        self._parameters = {name: p for name, p in network.named_parameters() if p.requires_grad}
        self._captured: dict[Any, _Captured] = {}
        self._pool: Any = None

    def __call__(self, *args: Any) -> Tensor:
        """As the network's own."""
        tensors, structure = pytree.tree_flatten(args)
        key = (str(structure), tuple((t.shape, t.dtype) for t in tensors))
        captured = self._captured.get(key)
        if captured is None:
            self._pool = self._pool or torch.cuda.graph_pool_handle()
            captured = _Captured(self._network, self._parameters, tensors, structure, self._pool)
            self._captured[key] = captured
        for static, tensor in zip(captured.inputs, tensors, strict=True):
            static.copy_(tensor)
        result: Tensor = _Replay.apply(captured, *self._parameters.values())
        return result


class GraphedNetwork(nn.Module):
    """A network that draws, whose parameters need no gradient, through `GraphedForward`."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self._graphed = GraphedForward(network)

    def forward(self, *args: Any) -> Tensor:
        """As the network's own."""
        return self._graphed(*args).clone()  # samplers keep it, and the next call writes there


class _Captured:
    """Forward of one set of shapes, and backward where a parameter needs a gradient.

    Differentiates with respect to aliases of the parameters, made on the stream that captures: the nodes
    that accumulate a parameter's own gradient were made on the default stream where an engine holds on to
    them for its hooks, as DeepSpeed does, and waiting for that stream would end the capture.
    """

    def __init__(
        self,
        network: nn.Module,
        parameters: dict[str, nn.Parameter],
        tensors: list[Tensor],
        structure: pytree.TreeSpec,
        pool: Any,
    ) -> None:
        self.inputs = [t.detach().clone(memory_format=torch.contiguous_format) for t in tensors]
        self.forward, self.backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()

        def run() -> tuple[Tensor, list[Tensor]]:
            aliases = {name: p.detach().requires_grad_() for name, p in parameters.items()}
            args = pytree.tree_unflatten(self.inputs, structure)
            return functional_call(network, aliases, args), list(aliases.values())

        # Once before: kernels are compiled and libraries choose their algorithms, neither of which may happen
        # while a stream is captured. Then the memory that this took goes back, or there would not be enough.
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            output, aliases = run()
            if aliases:
                torch.autograd.grad(output, aliases, torch.zeros_like(output), allow_unused=True)
        del output, aliases
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        # Other threads (pinned memory for checkpoints and batches) may go on calling CUDA.
        options: Any = {"pool": pool, "capture_error_mode": "thread_local"}
        with torch.cuda.graph(self.forward, **options):
            self.output, aliases = run()
        if not aliases:
            return
        self.doutput = torch.empty_like(self.output)
        with torch.cuda.graph(self.backward, **options):
            self.gradients = torch.autograd.grad(self.output, aliases, self.doutput, allow_unused=True)


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, captured: _Captured, *parameters: Tensor) -> Tensor:
        ctx.captured = captured
        captured.forward.replay()
        return captured.output.detach()

    @staticmethod
    def backward(ctx: Any, doutput: Tensor) -> tuple[Tensor | None, ...]:
        captured: _Captured = ctx.captured
        captured.doutput.copy_(doutput)
        captured.backward.replay()
        return None, *(None if g is None else g.detach() for g in captured.gradients)
