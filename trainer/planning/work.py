"""What one micro-batch of a configuration asks of a GPU, counted on the meta device: nothing is computed.

The trained network runs forward and backward on tensors without data, with our fused operators told to take
them, so that what is counted is what a GPU is given:

    FLOPs         two per multiply-add, of convolutions, products and attention
    activations   bytes of the tensors that autograd keeps for backward, each storage once
    launches      dispatched operations that are no views

All of it is proportional to the samples, but for the launches.
"""

from __future__ import annotations

import functools
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from trainer.conditioning.build import Conditioner
from trainer.config.models import ConditioningConfig
from trainer.config.run import Config, ConfigError
from trainer.first_stage.build import build_first_stage, frozen_dtype
from trainer.kernels.language import counted_on_meta, plain
from trainer.model import ConditionedUNet, build_trainable

_TEXT_TOKENS = 77
_VIEWS = (
    *("view", "reshape", "permute", "transpose", "t.", "expand", "slice", "split", "unsqueeze", "detach"),
    *("prim", "alias", "as_strided", "select", "squeeze", "unbind", "empty", "chunk", "_unsafe_view"),
)


@dataclass(frozen=True)
class Work:
    """Of one sample, in training."""

    network_flops: float
    """Forward and backward of the trained network; what activation checkpointing computes again included."""
    forward_flops: float
    """Of it, the forward."""
    encoder_flops: float
    """Forward of the first stage's encoder."""
    tower_flops: float
    """Forward of frozen towers."""
    activation_bytes: float
    """Kept for the backward of the trained network."""
    launches: int
    """Of a forward and backward, whatever the micro-batch."""

    @property
    def frozen_flops(self) -> float:
        """Forward of all that is not trained."""
        return self.encoder_flops + self.tower_flops


@functools.cache
def count_work(config: Config) -> Work:
    """Count a second stage at data.image_size, square.

    Raises:
        ConfigError: it is a first stage.
    """
    if config.stage != "diffusion":
        raise ConfigError("a plan is made of the diffusion stage; stage=autoencoder cannot be planned.")
    dtype = frozen_dtype(config.distributed)  # which the trained network computes in, too
    with torch.device("meta"), counted_on_meta() if config.distributed.fuses else plain():
        network, conditioner = build_trainable(config)
        network.to(dtype)
        forward, total, kept, launches = _train(config, network, conditioner)
        encoder, towers = _encode(config, dtype), _towers(config, conditioner)
    trained = _trained_conditions(config, conditioner)
    return Work(total + 3 * trained, forward + trained, encoder, towers, kept, launches)


def context_tokens(config: ConditioningConfig) -> int:
    """Tokens that the UNet attends to."""
    return sum(_tokens(config, name) for name in ("openclip", "text_transformer", "layout", "class_label"))


def _tokens(config: ConditioningConfig, name: str) -> int:
    section = getattr(config, name)
    if section is None:
        return 0
    if name == "layout":
        return 3 * int(section.max_boxes)
    if name == "text_transformer":
        return int(section.max_tokens)
    if name == "class_label":
        return int(section.inject == "context")
    return int(section.context_length or _TEXT_TOKENS)


def _train(
    config: Config, network: ConditionedUNet, conditioner: Conditioner, batch: int = 2
) -> tuple[float, float, float, int]:
    """(forward FLOPs, all FLOPs, bytes kept) of a sample, and launches."""
    unet = network.unet
    x, timesteps, named = network_inputs(config, network, conditioner, batch)
    kept = _Kept(unet)
    attention, launches, flops = AttentionCounter(), _Launches(), FlopCounterMode(display=False)
    with ExitStack() as modes:
        for mode in (flops, launches, attention):
            modes.enter_context(mode)
        with torch.autograd.graph.saved_tensors_hooks(kept.keep, lambda value: value):
            loss = unet(x, timesteps, **named).float().square().mean()
        forward = flops.get_total_flops() + attention.flops
        bytes_kept = kept.total
        loss.backward()
    total = flops.get_total_flops() + attention.flops
    return forward / batch, total / batch, bytes_kept / batch, launches.count


def network_inputs(
    config: Config, network: ConditionedUNet, conditioner: Conditioner, batch: int
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Noisy latents, timesteps and conditions as the network is given them, on torch's default device."""
    unet = network.unet
    dtype, size = unet.conv_in.weight.dtype, config.data.image_size // config.first_stage.downsampling
    x = torch.empty(batch, unet.in_channels, size, size, dtype=dtype)
    if config.distributed.channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    named: dict[str, Tensor] = {}
    if conditioner.context_dim:
        named["context"] = torch.empty(
            batch, max(1, context_tokens(config.conditioning)), conditioner.context_dim, dtype=dtype
        )
    if conditioner.vector_dim:
        named["vector"] = torch.empty(batch, conditioner.vector_dim, dtype=dtype)
    if conditioner.num_classes:
        named["class_labels"] = torch.empty(batch, dtype=torch.int64)
    return x, torch.empty(batch, dtype=torch.int64), named


def _encode(config: Config, dtype: torch.dtype) -> float:
    """FLOPs of the first stage's encoder for one sample; twice where a condition is encoded, too."""
    stage = build_first_stage(config.first_stage).to(dtype).eval().requires_grad_(False)
    size = config.data.image_size
    pixels = torch.empty(1, 3, size, size, dtype=dtype)
    attention, flops = AttentionCounter(), FlopCounterMode(display=False)
    with torch.no_grad(), flops, attention:
        stage.encode(pixels)
    times = 2 if config.conditioning.masked_image is not None else 1
    return times * float(flops.get_total_flops() + attention.flops)


def _towers(config: Config, conditioner: Conditioner) -> float:
    """Two FLOPs per weight and token of the frozen towers."""
    total = 0.0
    for name, module in conditioner.frozen.modules().items():
        section = getattr(config.conditioning, name, None)
        tokens = getattr(section, "context_length", None) or _TEXT_TOKENS
        total += 2.0 * tokens * _product_weights(module)
    return total


def _trained_conditions(config: Config, conditioner: Conditioner) -> float:
    """Forward FLOPs of transformers that are trained with the network."""
    return sum(
        2.0 * _tokens(config.conditioning, name) * _product_weights(part)
        for name, part in conditioner.trained.parts.items()
        if name in ("text_transformer", "layout")
    )


def _product_weights(module: nn.Module) -> int:
    """Elements of the weights that tokens are multiplied with: not those that are looked up."""
    looked_up = {id(m.weight) for m in module.modules() if isinstance(m, nn.Embedding)}
    weights = [p for name, p in module.named_parameters() if p.dim() == 2 and "position" not in name]
    return sum(p.numel() for p in weights if id(p) not in looked_up)


class _Kept:
    """Adds up what autograd keeps, but for the network's own weights."""

    def __init__(self, network: nn.Module) -> None:
        self._weights = {parameter.untyped_storage()._cdata for parameter in network.parameters()}
        self._seen: dict[int, Any] = {}  # holds the storages, or an address would be used again

    def keep(self, value: Tensor) -> Tensor:
        storage = value.untyped_storage()
        if storage._cdata not in self._weights:
            self._seen[storage._cdata] = storage
        return value

    @property
    def total(self) -> int:
        return sum(storage.nbytes() for storage in self._seen.values())


class _Launches(TorchDispatchMode):
    """Counts dispatched operations that are no views."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if not any(str(func).removeprefix("aten.").startswith(view) for view in _VIEWS):
            self.count += 1
        return func(*args, **(kwargs or {}))


class AttentionCounter:
    """Attention as a GPU does it, which keeps no matrix of weights; on the meta device torch would keep one.

    In the place of torch's own while used as a context manager: a mode would not be in force in what
    activation checkpointing computes again.
    """

    def __init__(self) -> None:
        self.flops = 0.0
        self._own = F.scaled_dot_product_attention

    def __enter__(self) -> None:
        F.scaled_dot_product_attention = lambda *qkv: _FlashAttention.apply(*qkv, self)

    def __exit__(self, *ended: object) -> None:
        F.scaled_dot_product_attention = self._own


class _FlashAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, counter: AttentionCounter) -> Tensor:
        out = torch.empty_like(query)  # [B, heads, N, D]
        line = torch.empty(query.shape[:-1], dtype=torch.float32, device=query.device)
        ctx.save_for_backward(query, key, value, out, line)
        ctx.counter, ctx.flops = counter, 4.0 * query.numel() * key.shape[-2]
        counter.flops += ctx.flops
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        ctx.counter.flops += 2 * ctx.flops  # the model's own; kernels compute the weights once more
        query, key, value = ctx.saved_tensors[:3]
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value), None
