"""Optimizers with their state made at once, AdamW's, so that checkpoints load before the first step."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.optim import AdamW, Optimizer

from trainer.config.training import OptimizerConfig
from trainer.distributed.muon import Muon

MOMENTS = ("exp_avg", "exp_avg_sq")


def build_optimizer(
    groups: Iterable[list[torch.nn.Parameter]], config: OptimizerConfig, device: torch.device
) -> Optimizer:
    """The one that the configuration names; a Muon is still to be told where its masters lie."""
    return Muon(groups, config) if config.name == "muon" else build_adamw(groups, config, device)


def build_adamw(
    groups: Iterable[list[torch.nn.Parameter]], config: OptimizerConfig, device: torch.device
) -> AdamW:
    """Parameter groups that differ in nothing; fused kernels on a GPU, foreach elsewhere."""
    on_gpu = device.type == "cuda"
    return AdamW(
        [{"params": group} for group in groups],
        lr=config.learning_rate,
        betas=config.betas,
        eps=config.eps,
        weight_decay=config.weight_decay,
        fused=on_gpu or None,
        foreach=None if on_gpu else True,
    )


def initialise_state(optimizer: Optimizer, masters: Iterable[Tensor]) -> None:
    """Give every master tensor the state that AdamW would make at its first step.

    Replaces existing state: DeepSpeed's bf16 stage 0 makes a step with zero gradients at birth.
    """
    fused = bool(optimizer.defaults["fused"])
    for master in masters:
        state = optimizer.state[master]
        # A fused AdamW keeps its step counter on the device, the others on the CPU.
        state["step"] = torch.zeros((), device=master.device if fused else "cpu")
        for key in MOMENTS:
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
    """The rate of the next step."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
