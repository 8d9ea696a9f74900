"""Adafactor over fp32 masters that ZeRO or FSDP may have cut anywhere: only sums go between the ranks.

Adafactor (Shazeer and Stern 2018, in torch's form) keeps of the squared gradients of a matrix the means of
its rows and columns, whose product stands for the second moment, and no first moment. Means are sums, to
which each rank adds what it has. Of a matrix [2, 4] rank 0 has five elements and rank 1 three:

    rank 0   | b b b b |  4         rank 1   | . . . . |  0         the numbers: how many elements
             | b . . . |  1                  | . b b b |  3         are in each sum
               2 1 1 1                         0 1 1 1

One step:
    sums      of g^2, by rows and columns, of all parameters in one vector             all-reduce
    means     of before, moved towards these; the same on every rank
    update    U = g / sqrt(row mean x column mean / their mean), in the place of the gradient
    sizes     sums of U^2 and w^2, of all parameters in one vector                     all-reduce
    weights   w -= rate x max(eps2, RMS(w)) x U / max(1, RMS(U) / clip)

A kernel of a convolution is the matrix [out, in x kernel], as to Muon. torch's own would take kernels one by
one, [height, width] each, and keep two thirds of a 3 x 3 one and twice a 1 x 1 one, whole on every rank: 1.9
bytes a parameter of SD2's UNet where this keeps 0.007. A vector keeps its whole second moment.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from trainer.config.training import OptimizerConfig
from trainer.distributed.engine import Fragment
from trainer.distributed.replicas import owned_parts


@dataclass(frozen=True)
class _Means:
    """Of the squared gradients of one parameter: views of the vector of all."""

    rows: Tensor | None
    """fp32 [rows]; None of a vector."""
    columns: Tensor
    """fp32 [columns]; of a vector the second moment of each element."""

    def add(self, gradient: Tensor, start: int, copies: int) -> None:
        """What the elements [start, start + n) add to both; copies: how many ranks add the same."""
        if self.rows is None:
            part = self.columns[start : start + len(gradient)]
            part.addcmul_(gradient, gradient, value=1.0 / copies)
            return
        first, before, after = self._place(start, len(gradient))
        squares = F.pad(gradient, (before, after)).square_().view(-1, len(self.columns))
        self.rows[first : first + len(squares)].add_(squares.sum(1), alpha=1.0 / (copies * squares.shape[1]))
        self.columns.add_(squares.sum(0), alpha=1.0 / (copies * len(self.rows)))

    def normalise(self, gradient: Tensor, start: int, eps: float) -> None:
        """Divide the elements [start, start + n) by their root mean square, in place."""
        if self.rows is None:
            squares = self.columns[start : start + len(gradient)].clamp(min=eps * eps)
        else:
            first, before, after = self._place(start, len(gradient))
            last = first + (before + len(gradient) + after) // len(self.columns)
            shares = self.rows[first:last] / self.rows.mean().clamp(min=eps)
            whole = torch.outer(shares, self.columns).view(-1)
            squares = whole.narrow(0, before, len(gradient)).clamp_(min=eps * eps)
        gradient.mul_(squares.rsqrt_())

    def _place(self, start: int, numel: int) -> tuple[int, int, int]:
        """(first row, elements of it that lie before the run, elements after it in its last row)"""
        width = len(self.columns)
        return start // width, start % width, -(start + numel) % width


class Adafactor(torch.optim.Optimizer):
    """Made before the engine lays out its masters; `attach` says afterwards what lies where in them.

    Clips and leaves out steps as a fused AdamW: by `grad_scale` and `found_inf`, without the host.
    """

    def __init__(self, groups: Iterable[list[torch.nn.Parameter]], config: OptimizerConfig) -> None:
        # Under the names that AdamW has, which engines read.
        defaults = {"lr": config.learning_rate, "fused": True}
        super().__init__([{"params": group} for group in groups], defaults)
        self._config = config
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._masters: list[Tensor] = []

    def attach(
        self,
        fragments: Sequence[Fragment],
        shapes: Mapping[str, tuple[int, ...]],
        masters: Sequence[Tensor],
        *,
        copies: int,
    ) -> None:
        """What this rank updates.

        Args:
            fragments: of these masters. shapes: of all parameters, in the same order on every rank.
            copies: on how many ranks each element is updated.
        """
        self._shapes, self._masters = dict(shapes), list(masters)
        self._parts = owned_parts(fragments, masters)
        self._exchanges = dist.is_initialized() and dist.get_world_size() > copies
        self._copies = copies if self._exchanges else 1
        device = masters[0].device
        self._vector, self._sums = torch.zeros(2, means_elements(shapes.values()), device=device).unbind()
        self._means, self._added = self._views(self._vector), self._views(self._sums)
        place = {name: number for number, name in enumerate(shapes)}
        self._places = torch.tensor([place[f.name] for f in fragments], dtype=torch.int64, device=device)
        counts = [float(self._copies * math.prod(shape)) for shape in shapes.values()]
        self._counts = torch.tensor(counts, device=device)

    @property
    def means(self) -> dict[str, Tensor]:
        """fp32, views, whole and the same on every rank: `<matrix>.rows` [rows] and `.columns` [columns], and
        under a vector's own name its second moment."""
        found: dict[str, Tensor] = {}
        for name, means in self._means.items():
            if means.rows is None:
                found[name] = means.columns
            else:
                found |= {f"{name}.rows": means.rows, f"{name}.columns": means.columns}
        return found

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update; nothing before `attach` (DeepSpeed makes a step at birth). Collective."""
        assert closure is None
        if not self._shapes:
            return
        config, rate = self._config, self.param_groups[0]["lr"]
        goes = self._clip()
        steps = [self.state[master]["step"] for master in self._masters]
        torch._foreach_add_(steps, [goes] * len(steps))
        made = steps[0].clamp(min=1.0)
        self._add_up()
        self._vector.lerp_(self._sums, made.pow(config.beta2_decay) * goes)
        for part in self._parts:
            fragment = part.fragment
            self._means[fragment.name].normalise(part.gradient, fragment.start, config.adafactor_eps[0])
        weights, updates = self._sizes()
        relative = made.rsqrt().clamp(max=rate) * weights.clamp(min=config.adafactor_eps[1])
        strides = -goes * relative / (updates / config.update_clip).clamp(min=1.0)
        masters = [part.fragment.master for part in self._parts]
        if masters:
            torch._foreach_mul_(masters, 1.0 - rate * config.weight_decay * goes)
        for part, stride in zip(self._parts, strides[self._places].unbind(), strict=True):
            part.fragment.master.addcmul_(part.gradient, stride)

    def _clip(self) -> Tensor:
        """Clip gradients as they were asked to be; 0-d fp32: 1, or 0 where this step is left out."""
        gradients = [master.grad for master in self._masters if master.grad is not None]
        found_inf, scale = getattr(self, "found_inf", None), getattr(self, "grad_scale", None)
        if scale is not None:
            torch._foreach_div_(gradients, scale)
        if found_inf is None:
            return torch.ones((), device=self._vector.device)
        left_out = found_inf.bool()
        for gradient in gradients:
            gradient.masked_fill_(left_out, 0.0)  # nothing times NaN is NaN
        return 1.0 - found_inf

    def _add_up(self) -> None:
        """Means of this step's squared gradients, as those of before lie."""
        self._sums.zero_()
        for part in self._parts:
            self._added[part.fragment.name].add(part.gradient, part.fragment.start, self._copies)
        if self._exchanges:
            dist.all_reduce(self._sums)

    def _sizes(self) -> Tensor:
        """Root mean squares of weights and updates, fp32 [2, parameters]."""
        squares = torch.zeros(2, len(self._shapes), device=self._vector.device)
        if self._parts:
            weights = torch._foreach_norm([part.fragment.master for part in self._parts])
            updates = torch._foreach_norm([part.gradient for part in self._parts])
            norms = torch.stack([torch.stack(weights), torch.stack(updates)])
            squares[:, self._places] = norms.square_()
        if self._exchanges:
            dist.all_reduce(squares)
        return squares.div_(self._counts).sqrt_()

    def _views(self, vector: Tensor) -> dict[str, _Means]:
        lengths = [_lengths(shape) for shape in self._shapes.values()]
        parts = iter(vector.split([length for both in lengths for length in both]))
        found = {}
        for name, shape in self._shapes.items():
            rows, columns = next(parts), next(parts)
            found[name] = _Means(rows if len(shape) > 1 else None, columns)
        return found


def _lengths(shape: tuple[int, ...]) -> tuple[int, int]:
    """(row means, column means) of a parameter; a vector has a column for every element, and no rows."""
    return (shape[0], math.prod(shape[1:])) if len(shape) > 1 else (0, math.prod(shape))


def means_elements(shapes: Iterable[tuple[int, ...]]) -> int:
    """Elements of all means of parameters of these shapes."""
    return sum(sum(_lengths(shape)) for shape in shapes)
