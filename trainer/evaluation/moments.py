"""Mean and covariance of features that stream by, as sums that do not depend on the order of their parts.

    block of B pictures -> features [B, D] fp32 -> sums [D], products [D, D] fp64 -> added with compensation

A block's own sums are the same wherever they are made. They are added up in two fp64 words (Knuth, TAOCP 2,
4.2.2: what an addition rounds away is itself an fp64 number), about 106 bits, so any order of blocks, and any
deal of them to ranks, rounds to the same fp64 statistics in the end.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Moments:
    """Count, sum and sum of products of D-dimensional features."""

    def __init__(self, width: int, device: torch.device | str = "cpu") -> None:
        self.count = 0
        shapes = ((width,), (width, width))
        self._words = [
            (
                torch.zeros(s, dtype=torch.float64, device=device),
                torch.zeros(s, dtype=torch.float64, device=device),
            )
            for s in shapes
        ]

    def add(self, features: Tensor) -> None:
        """Take in one block, [B, D]."""
        block = features.double()
        self.count += len(block)
        for i, part in enumerate((block.sum(dim=0), block.T @ block)):
            high, low = self._words[i]
            total = high + part
            back = total - high
            # in place: a matrix of 2048 x 2048 is 32 MB, and each pass over it takes time
            low += part.sub_(back).add_(high.sub_(back.neg_().add_(total)))
            self._words[i] = total, low

    def tensors(self) -> list[Tensor]:
        """All of it as tensors on the CPU, for another process."""
        count = torch.tensor([self.count])
        return [count, *(word.cpu() for pair in self._words for word in pair)]

    def merge(self, tensors: Sequence[Tensor]) -> None:
        """Take in what another process has counted."""
        count, *words = tensors
        self.count += int(count)
        for i, pair in enumerate((words[:2], words[2:])):
            high, low = (word.to(self._words[i][0].device) for word in pair)
            self._words[i] = _plus(self._words[i], (high, low))

    def mean(self) -> Tensor:
        """[D] fp64, on the CPU."""
        return self._sums(0) / self.count

    def covariance(self) -> Tensor:
        """[D, D] fp64 on the CPU, of n - 1 degrees of freedom; zeros for a single picture."""
        sums, products = self._sums(0), self._sums(1)
        centred = products - torch.outer(sums, sums / self.count)
        return (centred + centred.T) / (2 * max(1, self.count - 1))

    def _sums(self, which: int) -> Tensor:
        high, low = self._words[which]
        return (high + low).cpu()


def _plus(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Sum of two numbers of two words each, as one whose low word is what its high word lacks."""
    high = first[0] + second[0]
    back = high - first[0]
    lost = (first[0] - (high - back)) + (second[0] - back)
    low = lost + (first[1] + second[1])
    total = high + low
    return total, low - (total - high)
