"""What crosses from the data pipeline to the trainer: batches, and counts of what was served and rejected."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from data_pipeline.errors import DataError
from data_pipeline.moments.entry import Label

FIRST = 1000
"""Samples after which a share says something."""
_NOT_LOST = (
    "set_aside",
    "duplicate_member",
    "shard_unreadable",
    "shard_cut_short",
    "shard_other_count",
    "held_out",
)
"""Reasons that count something else: what is tried again later, members, shards, and samples of
data.validation, which are left out on purpose."""
_REASONS = 8


@dataclass(frozen=True)
class Cached:
    """What of a batch's pictures was encoded before. C and h x w are those of the first stage's moments."""

    values: Tensor
    """bfloat16 or float32 [B, C, h, w]: posterior moments; zeros in rows that are not found."""
    found: Tensor
    """bool [B], always on the CPU: rows whose moments are there, and whose pixels are not."""
    labels: tuple[Label | None, ...]
    """B labels: under what a row that is not found may be stored, None if it may not."""

    def rows(self, parts: list[slice]) -> Cached:
        """The rows of these slices, one after another."""
        labels = chain.from_iterable(self.labels[part] for part in parts)
        return Cached(_joined(self.values, parts), _joined(self.found, parts), tuple(labels))


@dataclass(frozen=True)
class Batch:
    """One rank's share of one optimizer step, B samples.

    Rank r holds the r-th contiguous block of the global batch, so concatenating the ranks gives the
    same global batch at any world size. Shares differ by a sample where the ranks do not divide it, and
    each rank's is cut into equally many micro-batches of one size, the missing rows filled up:

        8 samples, 3 ranks      0 1 2 | 3 4 5 | 6 7 +       + repeats a row, with weight 0
        at most 2 at once       0 1  2 + | 3 4  5 + | 6 7  + +
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
    padding: int = 0
    """The last rows that are no samples, but fill the micro-batch up."""

    def __len__(self) -> int:
        return self.pixels.shape[0]

    def micro_batches(self, size: int, count: int | None = None) -> list[Batch]:
        """Split along the first axis into equal parts of `size` samples.

        With `count` into so many, filled up with rows that repeat this rank's own: shapes stay, every rank
        makes as many passes, and what repeats a sample is as finite as it. A rank without samples has zeros.
        """
        assert len(self) % size == 0 or count is not None, (len(self), size)
        count = len(self) // size if count is None else count
        assert len(self) <= count * size, (len(self), count, size)
        if not len(self):
            return [self._zeros(size)] * count
        return [self._part(number * size, size) for number in range(count)]

    def _part(self, start: int, size: int) -> Batch:
        """`size` rows from `start` on, and from the first one again where they end."""
        parts = [slice(start, min(start + size, len(self)))] if start < len(self) else []
        missing = padding = size - sum(part.stop - part.start for part in parts)
        while missing:
            parts.append(slice(0, min(missing, len(self))))
            missing -= parts[-1].stop
        return Batch(
            pixels=_joined(self.pixels, parts),
            captions=tuple(chain.from_iterable(self.captions[part] for part in parts)),
            conditions={name: _joined(value, parts) for name, value in self.conditions.items()},
            keys=tuple(chain.from_iterable(self.keys[part] for part in parts)),
            ordinals=_joined(self.ordinals, parts),
            slots=_joined(self.slots, parts),
            position=self.position,
            cached=None if self.cached is None else self.cached.rows(parts),
            padding=padding,
        )

    def _zeros(self, size: int) -> Batch:
        """`size` rows of a rank without samples."""
        assert not len(self)

        def zeros(value: Tensor) -> Tensor:
            return value.new_zeros((size, *value.shape[1:]))

        cached = self.cached
        if cached is not None:
            cached = Cached(zeros(cached.values), zeros(cached.found) == 0, (None,) * size)
        return Batch(
            pixels=zeros(self.pixels),
            captions=("",) * size,
            conditions={name: zeros(value) for name, value in self.conditions.items()},
            keys=("",) * size,
            ordinals=zeros(self.ordinals),
            slots=zeros(self.slots),
            position=self.position,
            cached=cached,
            padding=size,
        )

    def to(self, device: torch.device) -> Batch:
        """Move the tensors, without blocking where the memory is pinned; pixels only where there are any."""
        cached = self.cached
        if cached is not None:
            cached = Cached(cached.values.to(device, non_blocking=True), cached.found, cached.labels)
        if cached is not None and bool(cached.found.all()):
            pixels = no_pixels(self.pixels.shape, device)
        else:
            pixels = self.pixels.to(device, non_blocking=True)
        return replace(
            self,
            pixels=pixels,
            conditions={n: v.to(device, non_blocking=True) for n, v in self.conditions.items()},
            ordinals=self.ordinals.to(device, non_blocking=True),
            slots=self.slots.to(device, non_blocking=True),
            cached=cached,
        )


def _joined(value: Tensor, parts: list[slice]) -> Tensor:
    """The rows of these slices: a view of one, a copy with the same layout in memory of several."""
    if len(parts) == 1:
        return value[parts[0]]
    if not any(value.stride()):  # `no_pixels`, which take no memory
        return value[:1].expand(sum(part.stop - part.start for part in parts), *value.shape[1:])
    return torch.cat([value[part] for part in parts])


def no_pixels(shape: tuple[int, ...], device: torch.device | str = "cpu") -> Tensor:
    """Zeros of this shape that take one byte of memory: all rows are cached."""
    return torch.zeros((), dtype=torch.uint8, device=device).expand(shape)


@dataclass
class Tally:
    """How many samples a loader has served since it was opened, and how many not, by reason.

    >>> tally = Tally(served=380, rejected=Counter({"no_caption": 600, "not_an_image": 20, "set_aside": 7}))
    >>> tally.sentence()
    '380 of 1,000 samples (38.0 %) are served; rejected: no_caption (600), not_an_image (20)'
    >>> tally.check(limit=0.7)
    >>> tally.check(limit=0.5)  # doctest: +IGNORE_EXCEPTION_DETAIL
    Traceback (most recent call last):
    DataError: ...
    """

    served: int = 0
    rejected: Counter[str] = field(default_factory=Counter)
    """By reason; `set_aside` is not final, and shard_* count shards."""

    @property
    def lost(self) -> int:
        """Samples that were rejected for good."""
        return sum(count for reason, count in self.rejected.items() if reason not in _NOT_LOST)

    @property
    def seen(self) -> int:
        """Samples that were looked at, down to those of the index that were never read."""
        return self.served + self.lost

    @property
    def served_share(self) -> float:
        """Of those seen; 1 before the first."""
        return self.served / self.seen if self.seen else 1.0

    def sentence(self) -> str:
        """The numbers, the most frequent reasons first."""
        reasons = [(r, n) for r, n in self.rejected.most_common() if r not in _NOT_LOST]
        told = ", ".join(f"{reason} ({count:,})" for reason, count in reasons[:_REASONS])
        more = f" and {len(reasons) - _REASONS} reasons more" if len(reasons) > _REASONS else ""
        share = f"{self.served:,} of {self.seen:,} samples ({100 * self.served_share:.1f} %) are served"
        return f"{share}; rejected: {told}{more}" if told else share

    def check(self, limit: float) -> None:
        """Raise DataError where the rejected share is above `limit`."""
        if self.seen and self.lost > limit * self.seen:
            raise DataError(
                f"Only {self.sentence()}. {remedy(self.rejected)}; `ldm data inspect` shows the samples. If "
                f"so few are meant, raise data.max_rejected_share={limit:g}."
            )


def remedy(rejected: Counter[str]) -> str:
    """What to do about the most frequent reasons."""
    frequent = [reason for reason, _ in rejected.most_common(2)]
    if "too_small" in frequent:
        return "Lower data.image_size to what the pictures have, or set data.allow_enlarging=true"
    return "Correct the shards, data.filter or data.captions"


def added(tallies: Iterable[Tally]) -> Tally:
    """Those of several loaders as one."""
    total = Tally()
    for tally in tallies:
        total.served += tally.served
        total.rejected.update(tally.rejected)
    return total
