"""Optimizers with their state made at once, so that checkpoints load before the first step."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import AdamW, Optimizer

from trainer.config.training import OptimizerConfig
from trainer.distributed import collectives
from trainer.distributed.adafactor import Adafactor
from trainer.distributed.engine import Fragment
from trainer.distributed.muon import Muon

_FACTOR = "rate_factor"
CONDITIONERS = "conditions."
"""Beginning of the names of parameters that `conditioner_learning_rate` is for."""

RateGroup: TypeAlias = tuple[float, list[torch.nn.Parameter]]
"""What the rate is multiplied by, and for which parameters."""


def by_rate(parameters: Mapping[str, torch.nn.Parameter], config: OptimizerConfig) -> list[RateGroup]:
    """The named parameters in their order, each group as long as the rate stays the same."""
    peak = config.conditioner_learning_rate
    groups: list[RateGroup] = []
    for name, parameter in parameters.items():
        other = peak is not None and name.startswith(CONDITIONERS)
        factor = peak / config.learning_rate if peak is not None and other else 1.0
        if not groups or groups[-1][0] != factor:
            groups.append((factor, []))
        groups[-1][1].append(parameter)
    return groups


def build_optimizer(groups: Iterable[RateGroup], config: OptimizerConfig, device: torch.device) -> Optimizer:
    """The one that the configuration names; `attach` is still to be called."""
    if config.name == "muon":
        return Muon([group for _, group in groups], config)
    if config.name == "adafactor":
        return Adafactor([group for _, group in groups], config)
    return build_adamw(groups, config, device)


def attach(
    optimizer: Optimizer,
    fragments: Sequence[Fragment],
    shapes: Mapping[str, tuple[int, ...]],
    masters: Sequence[Tensor],
    *,
    copies: int,
    group: dist.ProcessGroup | None = None,
) -> None:
    """Tell an optimizer that knows parameters, as Muon and Adafactor do, what this rank updates. Collective.

    Args:
        fragments: all that it updates, of these masters. shapes: of all parameters, in order.
        copies: how many ranks update the same. group: ranks that have everything once; unset: all.
    """
    if isinstance(optimizer, Muon):
        optimizer.attach(fragments, cut=copies < collectives.world_size(), group=group)
    elif isinstance(optimizer, Adafactor):
        optimizer.attach(fragments, shapes, masters, copies=copies)


def whole_state(optimizer: Optimizer) -> dict[str, Tensor]:
    """See `Engine.whole_state`."""
    return optimizer.means if isinstance(optimizer, Adafactor) else {}


def build_adamw(groups: Iterable[RateGroup], config: OptimizerConfig, device: torch.device) -> AdamW:
    """Parameter groups that differ in their rates at most; fused kernels on a GPU, foreach elsewhere."""
    on_gpu = device.type == "cuda"
    return AdamW(
        [{"params": group, _FACTOR: factor} for factor, group in groups],
        lr=config.learning_rate,
        betas=config.betas,
        eps=config.eps,
        weight_decay=config.weight_decay,
        fused=on_gpu or None,
        foreach=None if on_gpu else True,
    )


@torch.no_grad()
def clip_and_step(optimizer: Optimizer, norm: Tensor, max_norm: float) -> bool:
    """One update with gradients clipped by their global `norm`; none where that is not finite.

    A fused optimizer does both inside its kernel, which divides gradients by `grad_scale` and leaves
    everything alone at `found_inf`: reading the norm on the host would leave a GPU without work.

    Returns:
        Whether an update was made; True where only the device knows.
    """
    if optimizer.defaults["fused"]:
        optimizer.found_inf = (~torch.isfinite(norm)).float()  # type: ignore[attr-defined]
        if max_norm > 0:
            scale = ((norm + 1e-6) / max_norm).clamp(min=1.0)
            optimizer.grad_scale = scale  # type: ignore[attr-defined]
    elif not torch.isfinite(norm):
        return False
    elif max_norm > 0:
        masters = [master for group in optimizer.param_groups for master in group["params"]]
        torch._foreach_mul_([m.grad for m in masters], (max_norm / (norm + 1e-6)).clamp(max=1.0))
    optimizer.step()
    return True


def initialise_state(optimizer: Optimizer, masters: Iterable[Tensor], moments: Iterable[str]) -> None:
    """Give every master tensor a counter of steps and these moments, as AdamW would at its first step.

    Replaces existing state: DeepSpeed's bf16 stage 0 makes a step with zero gradients at birth.
    """
    fused = bool(optimizer.defaults["fused"])
    for master in masters:
        state = optimizer.state[master]
        # A fused AdamW keeps its step counter on the device, the others on the CPU.
        state["step"] = torch.zeros((), device=master.device if fused else "cpu")
        for key in moments:
            state[key] = torch.zeros_like(master, requires_grad=False)


def steps_made(optimizer: Optimizer) -> int:
    """Optimizer steps made, as AdamW counts them for its bias correction."""
    for state in optimizer.state.values():
        return int(state["step"].item())
    return 0


def set_steps_made(optimizer: Optimizer, steps: int) -> None:
    """The inverse of `steps_made`."""
    for state in optimizer.state.values():
        state["step"].fill_(steps)


def set_learning_rate(optimizer: Optimizer, learning_rate: float) -> None:
    """The rate of the next step, of which groups may have a multiple."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group.get(_FACTOR, 1.0)
