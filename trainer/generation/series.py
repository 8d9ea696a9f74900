"""Which pictures a large set consists of, and in which batches and parts they are made.

Picture i is a function of (seed, first_index + i, its prompt, its label), and of nothing else but settings
and weights. Its last bit also depends on the size of the batch that it is drawn in, so all batches are
equally large and begin at multiples of their size; the last one is filled up with pictures that are thrown
away.

    count 10, batches of 4, parts of 8     0 1 2 3 | 4 5 6 7 || 8 9 (10 11)

A part is what is written and counted as a whole. Ranks take parts: whichever of them makes one, alone or for
the second time after a kill, makes the same bytes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from trainer.sample import Request, StartingPicture


@dataclass(frozen=True)
class Series:
    """A set of pictures to be made."""

    template: Request
    """Of one picture: all that the pictures share. Caption and class label are replaced."""
    count: int
    """Pictures, at least 1."""
    prompts: tuple[str, ...] = ("",)
    """Taken in turn, from the first again where there are fewer of them than pictures."""
    labels: tuple[int, ...] = ()
    """Class indices, in turn, too; empty for models without classes."""
    seed: int = 0
    first_index: int = 0
    """Index of the first picture, from which its noise is drawn."""
    batch_size: int = 16
    """Pictures that are drawn together."""
    batches_per_part: int = 1

    @property
    def part_size(self) -> int:
        """Pictures of a part; the last one may have fewer."""
        return self.batch_size * self.batches_per_part

    @property
    def parts(self) -> int:
        """How many there are."""
        return -(-self.count // self.part_size)

    def rows(self, part: int) -> range:
        """Places in the set of a part's pictures."""
        return range(part * self.part_size, min(self.count, (part + 1) * self.part_size))

    def batches(self, part: int) -> Iterator[range]:
        """Places of each batch of a part, all of one size: those from `count` on are not wanted."""
        rows = self.rows(part)
        for first in range(rows.start, rows.stop, self.batch_size):
            yield range(first, first + self.batch_size)

    def caption(self, row: int) -> str:
        """What a picture is to show; empty without text."""
        return self.prompts[row % len(self.prompts)]

    def item(self, row: int) -> dict[str, Any]:
        """Of a picture what it does not share with the others, JSON-able."""
        label = {"class_label": self.labels[row % len(self.labels)]} if self.labels else {}
        return {"prompt": self.caption(row), "index": self.first_index + row, **label}

    def request(self, rows: Sequence[int]) -> Request:
        """What `trainer.sample.draw` is asked for; its indices are `first_index` + rows."""
        n, one = len(rows), self.template
        conditions = {name: _repeat(value, n) for name, value in one.conditions.items()}
        if self.labels:
            conditions["class_label"] = torch.tensor([self.labels[row % len(self.labels)] for row in rows])
        return replace(
            one,
            captions=tuple(map(self.caption, rows)),
            conditions=conditions,
            pixels=None if one.pixels is None else _repeat(one.pixels, n),
            start=None if one.start is None else _repeated_start(one.start, n),
            negative=one.negative * n,
        )


def _repeated_start(start: StartingPicture, n: int) -> StartingPicture:
    mask = None if start.mask is None else _repeat(start.mask, n)
    return replace(start, pixels=_repeat(start.pixels, n), mask=mask)


def _repeat(value: Tensor, n: int) -> Tensor:
    """[1, ...] -> [n, ...], without copying."""
    return value.expand(n, *value.shape[1:])
