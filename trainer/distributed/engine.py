"""What the training loop needs from whatever holds the weights and the optimizer."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Fragment:
    """A run of consecutive elements of one parameter that this rank owns, as views, not copies.

    Over all ranks the fragments of one engine cover every trained parameter exactly once, at any
    world size, engine and ZeRO stage. Where several ranks hold the same elements (stage 0, the torch
    engine, nodes under fsdp), each owns an equal share of them. Writing into the views changes the
    engine's state; call `Engine.refresh` afterwards so that the compute weights and the other ranks'
    replicas follow.
    """

    name: str
    """Parameter name in the module's state dict."""
    shape: tuple[int, ...]
    """Shape of the whole parameter."""
    start: int
    """First element, in the flattened parameter."""
    master: Tensor
    """fp32 [n]: master weights."""
    moments: dict[str, Tensor]
    """fp32 [n] each, by the names of `Engine.moments` (zeros before the first step)."""


class Engine(Protocol):
    """One trained network with its optimizer, on this rank. All methods are collective."""

    module: nn.Module
    """The network; call the engine, not the module, in a training forward."""
    device: torch.device
    compute_dtype: torch.dtype
    """dtype of the compute weights (float32 or bfloat16). The engine casts no inputs."""
    parameter_shapes: dict[str, tuple[int, ...]]
    """Shapes of all trained parameters, in the same order on every rank."""
    moments: tuple[str, ...]
    """What fragments have beside the master weights: exp_avg and exp_avg_sq, or nothing."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Training forward."""
        ...

    def backward(self, loss: Tensor) -> None:
        """Backward of one micro-batch's mean loss; the engine averages micro-batches and ranks, as if all had
        equally many samples (`Sharing.gain` makes up for those that have not)."""
        ...

    def step(self, learning_rate: float) -> Tensor | None:
        """After each backward: at the accumulation boundary clip, update, and return the global
        gradient norm before clipping (a 0-d fp32 tensor); otherwise None. With a gradient
        that is not finite, the norm is not finite either and nothing is updated."""
        ...

    def fragments(self) -> list[Fragment]:
        """The fp32 state that this rank owns; the same views at every call."""
        ...

    def refresh(self, *, moments: bool = False) -> None:
        """Carry the owners' master weights into the compute weights (and replicas) of every rank.

        Args:
            moments: carry the owners' moments into replicas, too: after loading a checkpoint.
        """
        ...

    @property
    def whole_state(self) -> dict[str, Tensor]:
        """Small optimizer state that is the same on every rank, fp32, as views: Adafactor's means."""
        ...

    @property
    def optimizer_steps(self) -> int:
        """Optimizer steps made (Adam's bias correction depends on it)."""
        ...

    @optimizer_steps.setter
    def optimizer_steps(self, value: int) -> None: ...

    def close(self) -> None:
        """Make nothing outside hold on to the engine, which is not used again: its memory goes with it."""
        ...

    def gathered(self) -> AbstractContextManager[nn.Module]:
        """The module with whole compute weights on every rank, for sampling (ZeRO-3 and fsdp gather)."""
        ...
