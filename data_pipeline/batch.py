"""The one type that crosses from the data pipeline to the trainer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """One rank's share of one optimizer step. B is global_batch_size / world_size.

    Rank r holds the r-th contiguous block of the global batch, so concatenating the ranks gives the
    same global batch at any world size.
    """

    pixels: Tensor
    """uint8 [B, 3, H, W]"""
    captions: tuple[str, ...]
    """B captions"""
    conditions: dict[str, Tensor]
    """Task fields by name, first axis B (docs/data.md lists them)."""
    keys: tuple[str, ...]
    """B sample keys, `shard/key`"""
    ordinals: Tensor
    """int64 [B]: identity of each sample's visit in the stream, the same at any world size.
    Every random draw about the sample is keyed by it."""
    slots: Tensor
    """int64 [B]: index of each sample in the global batch."""
    position: dict[str, Any]
    """JSON-able loader position of this rank's lanes once this batch has been consumed."""

    def __len__(self) -> int:
        return self.pixels.shape[0]

    def micro_batches(self, size: int) -> list[Batch]:
        """Split along the first axis into equal parts of `size` samples."""
        assert len(self) % size == 0, (len(self), size)
        return [
            Batch(
                pixels=self.pixels[i : i + size],
                captions=self.captions[i : i + size],
                conditions={name: value[i : i + size] for name, value in self.conditions.items()},
                keys=self.keys[i : i + size],
                ordinals=self.ordinals[i : i + size],
                slots=self.slots[i : i + size],
                position=self.position,
            )
            for i in range(0, len(self), size)
        ]

    def to(self, device: torch.device) -> Batch:
        """Move the tensors, without blocking where the memory is pinned."""
        return Batch(
            pixels=self.pixels.to(device, non_blocking=True),
            captions=self.captions,
            conditions={n: v.to(device, non_blocking=True) for n, v in self.conditions.items()},
            keys=self.keys,
            ordinals=self.ordinals.to(device, non_blocking=True),
            slots=self.slots.to(device, non_blocking=True),
            position=self.position,
        )
