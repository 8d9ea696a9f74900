"""What the loop needs from whatever computes one step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from data_pipeline.batch import Batch
from trainer.distributed.engine import Engine
from trainer.evaluation.held_out import Measure


@dataclass(frozen=True)
class Preview:
    """A grid of pictures for people."""

    pixels: Tensor
    """uint8 [N, 3, H, W]"""
    captions: tuple[str, ...]
    """N captions"""
    columns: int
    """Pictures per row of the grid."""


class Stage(Protocol):
    """One trainable stage: its engines and the computation of one optimizer step."""

    engines: dict[str, Engine]
    """By name: {"unet": ...} or {"autoencoder": ..., "discriminator": ...}."""
    averaged: str
    """Name of the engine whose weights are averaged (EMA), sampled and exported."""

    def train_step(self, batch: Batch, step: int, learning_rate: float) -> dict[str, Tensor]:
        """Forward, backward and update over this rank's micro-batches of optimizer step `step`.

        Returns 0-d tensors on the device, unsynchronised, whose means over the ranks are those over the
        samples of the global batch ("loss" is always there), and "grad_norm", which is global.
        """
        ...

    def preview(self, batch: Batch) -> Preview:
        """Pictures with the weights as they are now, of this rank's samples or of the configured prompts.

        Collective, because sharded weights are gathered for it; rank 0's pictures are the ones that are kept.
        """
        ...

    def measuring(self) -> AbstractContextManager[Measure]:
        """Inside, what measures held-out samples with the weights as they are now; training goes on
        afterwards as if nothing had been. Collective."""
        ...

    def finish(self, batches: Iterator[Batch]) -> None:
        """Called once, after the last step and before the last checkpoint, with the averaged weights
        swapped in: measure on data what exported weights must carry (latent statistics). Collective."""
        ...

    def state(self) -> dict[str, Tensor]:
        """Small tensors beside the trained weights that belong into checkpoints and exports."""
        ...

    def load_state(self, state: dict[str, Tensor]) -> None:
        """The inverse of `state`."""
        ...


def share_of_mean(values: Tensor, padding: int, gain: float) -> Tensor:
    """0-d: a micro-batch's part in the mean over a global batch, from values [B] of which the last `padding`
    are no samples. With a gain of 1 there are none, and it is the micro-batch's mean."""
    if padding:
        row = torch.arange(len(values), device=values.device)
        values = torch.where(row < len(values) - padding, values, 0.0)
    return values.mean() if gain == 1.0 else values.mean() * gain
