"""Plain data parallel training in torch alone: the reference against which ZeRO is tested."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from trainer.config.run import Config
from trainer.distributed import adamw
from trainer.distributed.acceleration import (
    ChannelsLastKernels,
    GraphedForward,
    compile_regions,
    keeps_kernels,
)
from trainer.distributed.engine import Fragment
from trainer.distributed.env import DistributedEnv
from trainer.distributed.replicas import replicated_fragments, synchronise


class TorchEngine:
    """Every rank holds everything; gradients are averaged once, at the accumulation boundary.

    With bf16 the compute weights are bf16 and the master weights, the accumulated gradients and
    the reduction are fp32.
    """

    def __init__(self, module: nn.Module, config: Config, env: DistributedEnv) -> None:
        self.module = module
        self.device = env.device
        self.compute_dtype = torch.bfloat16 if config.distributed.precision == "bf16" else torch.float32
        self._env = env
        self._accumulation = config.accumulation(env.world_size)
        self._max_grad_norm = config.optimizer.max_grad_norm
        self._bucket_elements = config.distributed.reduce_bucket_elements
        self._micro_step = 0
        module.to(env.device)
        self.parameter_shapes = {
            name: tuple(p.shape) for name, p in module.named_parameters() if p.requires_grad
        }
        self._parameters = [p for p in module.parameters() if p.requires_grad]
        for parameter in self._parameters:
            parameter.data = parameter.data.contiguous()
            if env.world_size > 1:
                dist.broadcast(parameter.data, src=0)
        self._masters = self._parameters
        if self.compute_dtype != torch.float32:
            self._masters = [nn.Parameter(p.detach().clone()) for p in self._parameters]
            for parameter in module.parameters():
                parameter.data = parameter.data.to(self.compute_dtype)
            if keeps_kernels(config.distributed):  # for good: the masters are what is flat
                ChannelsLastKernels(module.parameters())
        self._optimizer = adamw.build_optimizer(
            adamw.by_rate(dict(zip(self.parameter_shapes, self._masters, strict=True)), config.optimizer),
            config.optimizer,
            env.device,
        )
        self.moments = config.optimizer.moments
        adamw.initialise_state(self._optimizer, self._masters, self.moments)
        self._fragments = self._replicas(env.rank, env.world_size)
        adamw.attach(
            self._optimizer,
            self._replicas(0, 1),
            self.parameter_shapes,
            self._masters,
            copies=env.world_size,
        )
        if config.distributed.compile:
            compile_regions(module)
        self._forward = GraphedForward(module) if config.distributed.cuda_graphs else module

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Training forward."""
        return self._forward(*args, **kwargs)

    def backward(self, loss: Tensor) -> None:
        """Backward of one micro-batch's mean loss, accumulated in fp32."""
        (loss / self._accumulation).backward()
        if self._masters is self._parameters:
            return
        for parameter, master in zip(self._parameters, self._masters, strict=True):
            if parameter.grad is None:
                continue
            if master.grad is None:
                master.grad = torch.empty_like(master).copy_(parameter.grad)  # in the master's layout
            else:
                master.grad += parameter.grad
            parameter.grad = None

    def step(self, learning_rate: float) -> Tensor | None:
        """See `Engine.step`."""
        self._micro_step += 1
        if self._micro_step % self._accumulation:
            return None
        for master in self._masters:
            if master.grad is None:  # ZeRO's flat partitions count a missing gradient as zero, too
                master.grad = torch.zeros_like(master)
        self._average_gradients()
        grad_norm = nn.utils.get_total_norm([m.grad for m in self._masters if m.grad is not None])
        if torch.isfinite(grad_norm):
            if self._max_grad_norm > 0:
                nn.utils.clip_grads_with_norm_(self._masters, self._max_grad_norm, grad_norm)
            adamw.set_learning_rate(self._optimizer, learning_rate)
            self._optimizer.step()
            self._copy_to_compute_weights()
        self._optimizer.zero_grad(set_to_none=True)
        return grad_norm.detach()

    def fragments(self) -> list[Fragment]:
        """See `Engine.fragments`."""
        return self._fragments

    def refresh(self, *, moments: bool = False) -> None:
        """See `Engine.refresh`."""
        place = self._env.rank, self._env.world_size
        synchronise(list(self._masters), *place)
        if moments:
            for key in self.moments:
                synchronise([self._optimizer.state[m][key] for m in self._masters], *place)
        self._copy_to_compute_weights()

    @property
    def whole_state(self) -> dict[str, Tensor]:
        """See `Engine.whole_state`."""
        return adamw.whole_state(self._optimizer)

    @property
    def optimizer_steps(self) -> int:
        """See `Engine.optimizer_steps`."""
        return adamw.steps_made(self._optimizer)

    @optimizer_steps.setter
    def optimizer_steps(self, value: int) -> None:
        adamw.set_steps_made(self._optimizer, value)
        self._micro_step = 0

    def close(self) -> None:
        """See `Engine.close`: nothing does."""

    def gathered(self) -> AbstractContextManager[nn.Module]:
        """See `Engine.gathered`."""
        return nullcontext(self.module)

    def _replicas(self, rank: int, world_size: int) -> list[Fragment]:
        """One rank's share of what all hold."""
        return replicated_fragments(
            list(self.parameter_shapes),
            list(self._masters),
            [{key: self._optimizer.state[master][key] for key in self.moments} for master in self._masters],
            rank=rank,
            world_size=world_size,
        )

    @torch.no_grad()
    def _copy_to_compute_weights(self) -> None:
        if self._masters is not self._parameters:
            torch._foreach_copy_(list[Tensor](self._parameters), list[Tensor](self._masters))

    @torch.no_grad()
    def _average_gradients(self) -> None:
        if self._env.world_size == 1:
            return
        bucket: list[Tensor] = []
        for gradient in [m.grad for m in self._masters if m.grad is not None]:
            bucket.append(gradient)
            if sum(g.numel() for g in bucket) >= self._bucket_elements:
                self._average_bucket(bucket)
                bucket = []
        if bucket:
            self._average_bucket(bucket)

    def _average_bucket(self, bucket: list[Tensor]) -> None:
        packed = torch.cat([gradient.view(-1) for gradient in bucket])
        dist.all_reduce(packed)
        packed /= self._env.world_size
        parts = packed.split([gradient.numel() for gradient in bucket])
        torch._foreach_copy_([gradient.view(-1) for gradient in bucket], list(parts))
