"""ZeRO through DeepSpeed, behind the engine protocol: the only file that imports deepspeed.

What DeepSpeed makes of the network's parameters (w0, w1, w2 of 6, 4 and 5 elements, two ranks), and where
`Engine.fragments` finds the fp32 state that this rank owns:

    stage 0    every rank:  w0 w1 w2 whole, fp32 beside them in bf16      owned: an equal share (replicas.py)
    stage 1/2  laid end to end, padded, cut in equal parts:
                   rank 0  |w0 w0 w0 w0 w0 w0 w1 w1|     one flat fp32 master, which AdamW updates;
                   rank 1  |w1 w1 w2 w2 w2 w2 w2 --|     `_hp_mapping` of a parameter says which piece
                                                         of it lies where in it, if any (here w1 on both)
               In bf16, stage 1 cuts them into buckets first, each of which lies so (scatter.py).
    stage 3    each parameter cut by itself, so that it can be gathered when its layer runs:
                   rank 0  |w0 w0 w0|w1 w1|w2 w2 w2|     `ds_tensor.ds_numel` elements of each on every
                   rank 1  |w0 w0 w0|w1 w1|w2 w2 --|     rank; `--` is padding, which nobody owns

One step, k micro-batches long:

    engine(x) -> loss -> backward(loss) ... k times; the last one is the accumulation boundary
    step(rate): clip by the global norm -> AdamW on the fp32 masters -> bf16 weights from them

Where this file goes around DeepSpeed, a comment says why. It reaches for private names in three places only:
fragments (`_hp_mapping`, `_get_fp32_opt_state_partition`), `refresh` (compute weights from masters that we
wrote) and `backward` (its hooks on outputs would count a second autograd.grad as a backward pass).
Stage 1 in bf16 is DeepSpeed's BF16_Optimizer, whose own way is one all-reduce of the whole fp32 gradient
after backward; we sum, send and clip gradients ourselves, and it keeps masters and compute weights.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
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
from trainer.distributed.deepspeed_config import deepspeed_config
from trainer.distributed.engine import Fragment
from trainer.distributed.env import DistributedEnv
from trainer.distributed.replicas import replicated_fragments, synchronise
from trainer.distributed.scatter import ScatteredGradients, in_buckets

logger = logging.getLogger(__name__)


def _import_deepspeed(device: torch.device) -> Any:
    """Import it for our device, without its remarks and without compiling anything."""
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    with _quiet():
        import deepspeed

        _import_its_muon()
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # It calls two collectives by names that torch has renamed.
    warnings.filterwarnings("ignore", r"`torch.distributed.\w+_tensor` is deprecated")
    if device.type == "cpu":
        # Its shared-memory collectives would take a compiler and most of a minute at the first run, and add
        # in another order than gloo. The whole table is replaced: to ask for it calls a compiler as well.
        deepspeed.ops.__compatible_ops__ = {}
    return deepspeed


def _import_its_muon() -> None:
    """Import the optimizer of that name before DeepSpeed does, which asks every optimizer whether it is one.

    It would have three functions compiled to say no, for which torch imports its whole compiler: 3 seconds of
    processing on every rank at every start. Ours is another Muon.
    """
    from deepspeed.runtime import compiler

    compile_it = compiler.compile
    compiler.compile = lambda *args, **kwargs: lambda function: function
    try:
        with contextlib.suppress(ImportError):  # it moves between versions
            importlib.import_module("deepspeed.runtime.zero.muon.muon_optimizer")
    finally:
        compiler.compile = compile_it


@contextmanager
def _quiet() -> Iterator[None]:
    """Send what DeepSpeed prints to the debug log."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        yield
    for line in printed.getvalue().splitlines():
        logger.debug("deepspeed: %s", line)


class DeepSpeedEngine:
    """A network whose optimizer state (1), gradients (2) and weights (3) are spread over ranks."""

    def __init__(self, module: nn.Module, config: Config, env: DistributedEnv) -> None:
        deepspeed = _import_deepspeed(env.device)
        self._deepspeed = deepspeed
        self.module = module
        self.device = env.device
        self.compute_dtype = torch.bfloat16 if config.distributed.precision == "bf16" else torch.float32
        self._env = env
        self._stage = config.distributed.zero_stage
        module.to(env.device)
        trained = {n: p for n, p in module.named_parameters() if p.requires_grad}
        self.parameter_shapes = {name: tuple(p.shape) for name, p in trained.items()}
        for parameter in trained.values():
            parameter.data = parameter.data.contiguous()
        initial = self._initial_weights(trained)
        scatters = self._stage == 1 and self.compute_dtype == torch.bfloat16
        # DeepSpeed lays each parameter group out by itself, so that a group is a bucket; one rank sends none.
        whole = sum(parameter.numel() for parameter in trained.values())
        sends = scatters and env.world_size > 1
        most = config.distributed.reduce_bucket_elements if sends else whole
        groups = [
            (factor, bucket)
            for factor, alike in adamw.by_rate(trained, config.optimizer)
            for bucket in in_buckets(alike, most)
        ]
        buckets = [bucket for _, bucket in groups]
        self._optimizer = adamw.build_optimizer(groups, config.optimizer, env.device)
        with _quiet():
            self._engine, self._zero, _, _ = deepspeed.initialize(
                model=module,
                optimizer=self._optimizer,
                model_parameters=list(trained.values()),
                config=deepspeed_config(config, env.world_size),
                dist_init_required=False if deepspeed.comm.is_initialized() else None,
            )
        self.moments = config.optimizer.moments
        adamw.initialise_state(self._optimizer, self._masters(), self.moments)
        self._parameters = {n: p for n, p in module.named_parameters() if p.requires_grad}
        self._scattered = self._scatter_gradients(buckets, config) if scatters else None
        self._fragments = self._make_fragments()
        adamw.attach(
            self._optimizer,
            self._fragments if self._stage > 0 else self._replicas(0, 1),
            self.parameter_shapes,
            self._masters(),
            copies=1 if self._stage > 0 else env.world_size,
        )
        self._kernels = ChannelsLastKernels(module.parameters() if keeps_kernels(config.distributed) else ())
        self._load_initial_weights(initial)
        if config.distributed.compile:
            # Stage 3 gathers weights in hooks of every module, which DeepSpeed alone knows how to compile.
            self._engine.compile() if self._stage == 3 else compile_regions(module)
        self._forward = GraphedForward(module) if config.distributed.cuda_graphs else module

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Training forward.

        Calls the module, not DeepSpeed's forward: that one hooks the outputs, and a second
        torch.autograd.grad through them (adaptive weights, penalties) would count as a backward.
        """
        if self._stage > 0:
            self._zero.clear_backward_seen_flag()
        return self._forward(*args, **kwargs)

    def backward(self, loss: Tensor) -> None:
        """See `Engine.backward`."""
        # Runs first inside the backward pass, where DeepSpeed's own output hooks would run.
        handle = loss.register_hook(lambda _: self._engine._backward_prologue())
        if self._scattered is not None:
            self._scattered.begin(last=self._engine.is_gradient_accumulation_boundary())
        self._engine.backward(loss)
        if self._scattered is not None:
            self._scattered.finish()
        handle.remove()

    def step(self, learning_rate: float) -> Tensor | None:
        """See `Engine.step`."""
        boundary = self._engine.is_gradient_accumulation_boundary()
        adamw.set_learning_rate(self._optimizer, learning_rate)
        if boundary and self._zero is self._optimizer:
            return self._step_without_wrapper()
        self._engine.step()
        if not boundary:
            return None
        norm = torch.as_tensor(self._engine.get_global_grad_norm(), device=self.device)
        # DeepSpeed reports some overflows as -1.
        return torch.where(norm < 0, torch.inf, norm).to(torch.float32).detach()

    def _scatter_gradients(self, buckets: list[list[nn.Parameter]], config: Config) -> ScatteredGradients:
        """Take sums, reduction and step of stage 1 in bf16 out of DeepSpeed's hands."""
        zero = self._zero
        self._engine.enable_backward_allreduce = False
        zero.backward_prologue = lambda: None
        zero.update_hp_grads = lambda clear_lp_grads=False: None
        zero.step = self._step_scattered
        return ScatteredGradients(
            buckets,
            zero.fp32_groups_gradients_flat,
            sent_as=torch.bfloat16 if config.distributed.reduce_precision == "bf16" else torch.float32,
            overlap=config.distributed.overlap_communication,
        )

    @torch.no_grad()
    def _step_scattered(self) -> None:
        """In the place of BF16_Optimizer.step, which has whole gradients on every rank."""
        assert self._scattered is not None
        zero = self._zero
        norm = self._scattered.norm()
        for partition, gradient in zip(zero.fp32_groups_flat_partition, self._scattered.parts, strict=True):
            partition.grad = gradient
        zero._global_grad_norm = norm
        zero.overflow = not adamw.clip_and_step(self._optimizer, norm, zero.clip_grad)
        if zero.overflow:
            return
        zero._lazy_init_hp_params_optimizer_state()
        zero.update_lp_params()
        self._kernels.follow()

    def fragments(self) -> list[Fragment]:
        """See `Engine.fragments`."""
        return self._fragments

    @torch.no_grad()
    def refresh(self, *, moments: bool = False) -> None:
        """See `Engine.refresh`."""
        if self._stage in (1, 2):
            self._zero.update_lp_params()
            self._kernels.follow()
        elif self._stage == 3:
            # Small parameters stay whole between steps and would not be gathered again.
            self._zero._partition_all_parameters()
            for group in range(len(self._zero.fp16_groups)):
                self._zero._reassign_or_swap_out_partitioned_parameters(group)
            if self._zero.persistent_parameters:
                self._zero.persistent_parameters[0].all_gather(self._zero.persistent_parameters)
        else:
            place = self._env.rank, self._env.world_size
            masters = self._masters()
            synchronise(masters, *place)
            if moments:
                for key in self.moments:
                    synchronise([self._optimizer.state[m][key] for m in masters], *place)
            if self._zero is not self._optimizer:
                torch._foreach_copy_(list(self._parameters.values()), masters)

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
        self._engine.global_steps = value
        self._engine.micro_steps = value * self._engine.gradient_accumulation_steps()
        self._engine.global_samples = value * self._engine.train_batch_size()

    def close(self) -> None:
        """See `Engine.close`: DeepSpeed's hooks on parameters do."""
        self._engine.destroy()

    @contextmanager
    def _gathered(self) -> Iterator[nn.Module]:
        if self._stage < 3:
            yield self.module
            return
        with self._deepspeed.zero.GatheredParameters(list(self.module.parameters())):
            yield self.module

    def gathered(self) -> AbstractContextManager[nn.Module]:
        """See `Engine.gathered`."""
        return self._gathered()

    def _masters(self) -> list[Tensor]:
        """The fp32 tensors that AdamW updates: flat partitions, or parameters at stage 0."""
        if self._stage == 3:
            return list(self._zero.fp32_partitioned_groups_flat)
        return [master for group in self._optimizer.param_groups for master in group["params"]]

    def _make_fragments(self) -> list[Fragment]:
        if self._stage == 3:
            return [f for name in self.parameter_shapes for f in self._zero3_fragment(name)]
        if self._stage > 0:
            return [f for name in self.parameter_shapes for f in self._zero12_fragment(name)]
        return self._replicas(self._env.rank, self._env.world_size)

    def _replicas(self, rank: int, world_size: int) -> list[Fragment]:
        """Stage 0: one rank's share of what all hold."""
        masters = self._masters()
        return replicated_fragments(
            list(self.parameter_shapes),
            masters,
            [{key: self._optimizer.state[m][key] for key in self.moments} for m in masters],
            rank=rank,
            world_size=world_size,
        )

    def _zero12_fragment(self, name: str) -> Iterator[Fragment]:
        mapping = getattr(self._parameters[name], "_hp_mapping", None)
        if mapping is None:
            return
        flat = self._optimizer.param_groups[mapping.param_group_index]["params"][0]
        address = mapping.get_hp_fragment_address()
        yield Fragment(
            name=name,
            shape=self.parameter_shapes[name],
            start=mapping.lp_fragment_address.start,
            master=flat.detach().narrow(0, address.start, address.numel),
            moments={
                key: self._optimizer.state[flat][key].narrow(0, address.start, address.numel)
                for key in self.moments
            },
        )

    def _zero3_fragment(self, name: str) -> Iterator[Fragment]:
        parameter: Any = self._parameters[name]  # with DeepSpeed's ds_* attributes
        local, _ = self._zero._get_fp32_opt_state_partition(parameter, release_swap_buffers=True)
        # Every rank holds the same number of elements; the last ones hold padding, too.
        stride = parameter.ds_tensor.ds_numel
        start = self._env.rank * stride
        length = max(0, min(stride, parameter.ds_numel - start))
        if length == 0:
            return
        moments = {
            key: self._zero._get_fp32_opt_state_partition(
                parameter, release_swap_buffers=True, optim_state_key=key
            )[0]
            for key in self.moments
        }
        yield Fragment(
            name=name,
            shape=self.parameter_shapes[name],
            start=start,
            master=local.detach()[:length],
            moments={key: value[:length] for key, value in moments.items()},
        )

    def _step_without_wrapper(self) -> Tensor:
        """Boundary of stage 0 in fp32, where DeepSpeed neither reports the norm nor checks it."""
        parameters = list(self._parameters.values())
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        grad_norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        if torch.isfinite(grad_norm):
            self._engine.step()
        else:
            self._engine.zero_grad()
            self._engine.micro_steps += 1
        return grad_norm.detach()

    def _initial_weights(self, trained: dict[str, nn.Parameter]) -> dict[str, Tensor]:
        """Rank 0's fp32 weights by name, flat and where they lie.

        DeepSpeed makes its masters from the bf16 weights that it puts in their place, so that no copy is
        needed to keep these.
        """
        if self.compute_dtype == torch.float32:
            return {}
        for parameter in trained.values():
            dist.broadcast(parameter.data, src=0)
        return {name: p.detach().float().flatten() for name, p in trained.items()}

    @torch.no_grad()
    def _load_initial_weights(self, initial: dict[str, Tensor]) -> None:
        if not initial:
            return
        for fragment in self._fragments:
            stop = fragment.start + fragment.master.numel()
            fragment.master.copy_(initial[fragment.name][fragment.start : stop])
        self.refresh()
