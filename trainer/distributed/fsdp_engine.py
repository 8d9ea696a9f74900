"""FSDP2 (`fully_shard`) behind the engine protocol: state cut over a node, the same on every node.

    w [10, 3], two nodes of four ranks, shard_ranks=4
    node 0   rank 0  w[0:3]   rank 1  w[3:6]   rank 2  w[6:9]   rank 3  w[9:10]
    node 1   rank 4  w[0:3]   rank 5  w[3:6]   rank 6  w[6:9]   rank 7  w[9:10]

A rank's rows are fp32: the master weight, which the optimizer updates. Of rows that several ranks hold, each
owns an equal share in the sense of `Engine.fragments`, so that averages and checkpoints exist once.

One step, k micro-batches long, for each block of the network (and what is in none, together):

    forward    the first gathers the block's weights in the compute precision from its node; they stay whole
    backward   k - 1 times: gradients are added up whole on each rank, in the precision in which they are sent
    the last   reduce-scatter in the node, all-reduce of the rows across nodes, while backward goes on
    step       norm, clip, update of the rows; the whole weights are let go, and gathered when needed

Weights are not let go between forward and backward: at the sizes of these networks they fit, and would be
gathered twice. FSDP2 decides at its first forward which module is the root; `_lazy_init`, a private name,
decides it at once, because previews and validation may call parts of the network before.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from datetime import timedelta
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from trainer.config.run import Config
from trainer.distributed import adamw
from trainer.distributed.acceleration import REGIONS
from trainer.distributed.engine import Fragment
from trainer.distributed.env import DistributedEnv
from trainer.distributed.replicas import replicated_fragments, synchronise


class FSDPEngine:
    """A network whose weights, gradients and optimizer state are cut over the ranks of a node."""

    def __init__(self, module: nn.Module, config: Config, env: DistributedEnv) -> None:
        """Raises ConfigError where `distributed.shard_ranks` does not divide the ranks."""
        self.module = module
        self.device = env.device
        self.compute_dtype = torch.bfloat16 if config.distributed.precision == "bf16" else torch.float32
        self._ranks = env.world_size
        self._accumulation = config.accumulation(env.world_size)
        self._max_grad_norm = config.optimizer.max_grad_norm
        self._micro_step = 0
        cut = config.shard_size(env.world_size, env.ranks_per_node)
        self._replicas = env.world_size // cut
        timeout = timedelta(seconds=config.distributed.timeout_s)
        self._mesh = _mesh(dist.group.WORLD, env.device.type, self._replicas, cut, timeout)
        module.to(env.device)
        self.parameter_shapes = {n: tuple(p.shape) for n, p in module.named_parameters() if p.requires_grad}
        for parameter in module.parameters():
            parameter.data = parameter.data.contiguous()
            if parameter.requires_grad and env.world_size > 1:
                dist.broadcast(parameter.data, src=0)
        sent = torch.bfloat16 if config.distributed.reduce_precision == "bf16" else torch.float32
        self._sharded = self._cut(sent)
        self._sharded_parameters = [p for p in module.parameters() if p.requires_grad]
        self._masters = [nn.Parameter(cast(Any, p).to_local().detach()) for p in self._sharded_parameters]
        named = dict(zip(self.parameter_shapes, self._masters, strict=True))
        groups = adamw.by_rate(named, config.optimizer)
        self._optimizer = adamw.build_optimizer(groups, config.optimizer, env.device)
        self.moments = config.optimizer.moments
        adamw.initialise_state(self._optimizer, self._masters, self.moments)
        place = env.rank % cut
        self._fragments = self._make_fragments(place, cut, replica=env.rank // cut, replicas=self._replicas)
        adamw.attach(
            self._optimizer,
            self._make_fragments(place, cut, replica=0, replicas=1),
            self.parameter_shapes,
            self._masters,
            copies=self._replicas,
            group=self._mesh.get_group(self._mesh.ndim - 1),
        )

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Training forward."""
        return self.module(*args, **kwargs)

    def backward(self, loss: Tensor) -> None:
        """See `Engine.backward`.

        Outside of it nothing is exchanged: a loss may be differentiated through this network by its inputs.
        """
        last = (self._micro_step + 1) % self._accumulation == 0
        self._exchange(last)
        (loss / self._accumulation).backward()
        if last:
            self._exchange(False)

    def step(self, learning_rate: float) -> Tensor | None:
        """See `Engine.step`."""
        self._micro_step += 1
        if self._micro_step % self._accumulation:
            return None
        for master, sharded in zip(self._masters, self._sharded_parameters, strict=True):
            # Where the loss did not reach, the weight still decays, as under ZeRO.
            gradient: Any = sharded.grad
            master.grad = torch.zeros_like(master) if gradient is None else gradient.to_local()
            sharded.grad = None
        norm = self._norm()
        adamw.set_learning_rate(self._optimizer, learning_rate)
        adamw.clip_and_step(self._optimizer, norm, self._max_grad_norm)
        self._optimizer.zero_grad(set_to_none=True)
        self._let_go()
        return norm.detach()

    def fragments(self) -> list[Fragment]:
        """See `Engine.fragments`."""
        return self._fragments

    def refresh(self, *, moments: bool = False) -> None:
        """See `Engine.refresh`."""
        self._synchronise(list(self._masters))
        if moments:
            for key in self.moments:
                self._synchronise([self._optimizer.state[master][key] for master in self._masters])
        self._let_go()

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
        return self._gathered()

    @contextmanager
    def _gathered(self) -> Iterator[nn.Module]:
        for module in self._sharded:
            module.unshard()
        try:
            yield self.module  # the next step computes with the same weights: nothing to let go of
        except BaseException:
            # A preview that did not fit into memory ended in the middle of a forward; training goes on.
            reset = getattr(self._sharded[-1], "reset_iter_state", None)  # torch 2.14
            if reset is not None:
                reset()
            raise

    def _cut(self, sent: torch.dtype) -> list[FSDPModule]:
        """Hand the network to FSDP, block by block; the root is last."""
        frozen = {p for p in self.module.parameters() if not p.requires_grad}
        for parameter in frozen:  # whole on every rank
            parameter.data = parameter.data.to(self.compute_dtype)
        mixed = self.compute_dtype != torch.float32
        policy = MixedPrecisionPolicy(
            param_dtype=self.compute_dtype if mixed else None,
            reduce_dtype=sent if mixed else None,
            cast_forward_inputs=False,
        )
        blocks = [m for m in self.module.modules() if isinstance(m, REGIONS) and m is not self.module]
        trained = [block for block in blocks if any(p.requires_grad for p in block.parameters())]
        made = [
            fully_shard(
                module,
                mesh=self._mesh,
                reshard_after_forward=False,
                mp_policy=policy,
                ignored_params=frozen,
            )
            for module in (*trained, self.module)
        ]
        root = cast(Any, made[-1])
        root._get_fsdp_state()._lazy_init()
        if hasattr(root, "set_reduce_scatter_unused_params"):  # torch 2.13; ranks whose graphs differ
            for module in made:
                cast(Any, module).set_reduce_scatter_unused_params(True)
        root.set_requires_gradient_sync(False)
        root.set_reshard_after_backward(False)
        return made

    def _exchange(self, now: bool) -> None:
        """Whether backward sends gradients and lets go of weights."""
        root = self._sharded[-1]
        root.set_requires_gradient_sync(now)
        root.set_reshard_after_backward(now)

    def _let_go(self) -> None:
        """Of whole weights, which no longer are those of the masters."""
        for module in self._sharded:
            module.reshard()

    def _norm(self) -> Tensor:
        """0-d fp32: norm of the whole gradient, the same bits on every rank, or else replicas drift apart."""
        own = nn.utils.get_total_norm([m.grad for m in self._masters if m.grad is not None])
        if self._ranks == 1:
            return own
        square = own.square()
        dist.all_reduce(square)  # counts each row once per replica
        return (square / self._replicas).sqrt()

    def _make_fragments(self, place: int, cut: int, *, replica: int, replicas: int) -> list[Fragment]:
        """Of the rows of this rank, the share of one of several replicas."""
        first = {}
        for name, shape in self.parameter_shapes.items():
            rows = -(-shape[0] // cut)  # as torch.chunk
            first[name] = min(place * rows, shape[0]) * (torch.Size(shape).numel() // max(shape[0], 1))
        of_rows = replicated_fragments(
            list(first),
            list(self._masters),
            [{key: self._optimizer.state[master][key] for key in self.moments} for master in self._masters],
            rank=replica,
            world_size=replicas,
        )
        return [
            replace(f, shape=self.parameter_shapes[f.name], start=first[f.name] + f.start) for f in of_rows
        ]

    def _synchronise(self, tensors: list[Tensor]) -> None:
        """Among the ranks that hold the same rows."""
        if self._replicas > 1:
            group = self._mesh.get_group(0)
            synchronise(tensors, dist.get_rank(group), self._replicas, group=group)


@functools.lru_cache(maxsize=4)
def _mesh(world: Any, device_type: str, replicas: int, cut: int, timeout: timedelta) -> DeviceMesh:
    """Of all ranks; the engines of a process share its groups. Collective when it is made."""
    if replicas == 1:
        return DeviceMesh.from_group(world, device_type)
    mesh = init_device_mesh(device_type, (replicas, cut), mesh_dim_names=("replica", "shard"))
    # Its groups have torch's patience, not that of `world`. Before torch 2.14 the function was a private one.
    set_timeout = getattr(dist, "set_timeout", None) or dist.distributed_c10d._set_pg_timeout
    for group in mesh.get_all_groups():
        set_timeout(timeout, group)
    return mesh
