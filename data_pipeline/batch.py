"""The one type that crosses from the data pipeline to the trainer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from data_pipeline.moments.entry import Label


@dataclass(frozen=True)
class Cached:
    """What of a batch's pictures was encoded before. C and h x w are those of the first stage's moments."""

    values: Tensor
    """bfloat16 or float32 [B, C, h, w]: posterior moments; zeros in rows that are not found."""
    found: Tensor
    """bool [B], always on the CPU: rows whose moments are there, and whose pixels are not."""
    labels: tuple[Label | None, ...]
    """B labels: under what a row that is not found may be stored, None if it may not."""

    def rows(self, start: int, stop: int) -> Cached:
        """Rows [start, stop)."""
        return Cached(self.values[start:stop], self.found[start:stop], self.labels[start:stop])


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
    cached: Cached | None = None
    """None: there is no cache of moments, and all rows have pixels."""

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
                cached=None if self.cached is None else self.cached.rows(i, i + size),
            )
            for i in range(0, len(self), size)
        ]

    def to(self, device: torch.device) -> Batch:
        """Move the tensors, without blocking where the memory is pinned; pixels only where there are any."""
        cached = self.cached
        if cached is not None:
            cached = Cached(cached.values.to(device, non_blocking=True), cached.found, cached.labels)
        if cached is not None and bool(cached.found.all()):
            pixels = no_pixels(self.pixels.shape, device)
        else:
            pixels = self.pixels.to(device, non_blocking=True)
        return Batch(
            pixels=pixels,
            captions=self.captions,
            conditions={n: v.to(device, non_blocking=True) for n, v in self.conditions.items()},
            keys=self.keys,
            ordinals=self.ordinals.to(device, non_blocking=True),
            slots=self.slots.to(device, non_blocking=True),
            position=self.position,
            cached=cached,
        )


def no_pixels(shape: tuple[int, ...], device: torch.device | str = "cpu") -> Tensor:
    """Zeros of this shape that take one byte of memory: all rows are cached."""
    return torch.zeros((), dtype=torch.uint8, device=device).expand(shape)
