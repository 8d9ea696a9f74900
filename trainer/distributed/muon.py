"""Muon for matrices and AdamW for the rest, over fp32 masters that ZeRO or FSDP may have cut anywhere.

Muon (Jordan et al. 2024) steps along the momentum of a weight matrix with all of its singular values brought
to about 1, so it needs the matrix whole. Stages 1 and 2 of ZeRO lay all parameters end to end and cut them
into equal parts; two ranks, the second of three matrices lies on both:

    rank 0   |a a a a b b|     momentum of what is owned, in bf16 (as the iteration wants it), to all ranks
    rank 1   |b b c c c c|     each rank puts together the matrices that it owns a piece of (0: a b, 1: b c),
                               iterates, and takes its own piece of each step

FSDP cuts every matrix by rows over the ranks of a node: the same exchange, inside of the node.

The momentum is kept in the place of AdamW's exp_avg, so that checkpoints know nothing of this; exp_avg_sq of
a matrix stays zero. The rate is scaled so that a step is as large as AdamW's (Liu et al. 2025, "Muon is
scalable for LLM training", section 2.2): rate and decay of an AdamW recipe serve.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from trainer.config.training import OptimizerConfig
from trainer.distributed.engine import Fragment
from trainer.distributed.replicas import OwnedPart, owned_parts

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the quintic iteration, and how often it is made (Jordan et al. 2024)."""
ITERATIONS = 5
SMALLEST_NORM = 1e-7
NO_MATRICES = ("conv_in", "conv_out")
"""First and last layers, which Muon leaves to AdamW; so it does tables of embeddings."""


def is_matrix(name: str, shape: Sequence[int]) -> bool:
    """Whether Muon takes the parameter: hidden weights; those of convolutions as [out, in x kernel]."""
    *modules, _ = name.split(".")
    if len(shape) < 2 or name.endswith("embedding") or any(module in NO_MATRICES for module in modules):
        return False
    if modules and modules[-1].endswith("embedding"):
        return False
    return min(shape[0], math.prod(shape[1:])) > 1


def orthogonalised(matrix: Tensor) -> Tensor:
    """bf16 [rows, columns] with singular values of about 1 and the same vectors, by Newton and Schulz."""
    a, b, c = COEFFICIENTS
    x = matrix.bfloat16()
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x
    x = x / x.norm().clamp(min=SMALLEST_NORM)
    for _ in range(ITERATIONS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x


class Muon(torch.optim.Optimizer):
    """Made before the engine lays out its masters; `attach` says afterwards what lies where in them."""

    def __init__(self, groups: Iterable[list[torch.nn.Parameter]], config: OptimizerConfig) -> None:
        # Under the names that AdamW has, which engines read.
        defaults = {"lr": config.learning_rate, "fused": False}
        super().__init__([{"params": group} for group in groups], defaults)
        self._config = config
        self._vectors: list[OwnedPart] = []
        self._matrices: list[OwnedPart] = []
        self._lengths: list[int] = []
        self._places: dict[str, list[tuple[int, int, int, int]]] = {}
        self._group: dist.ProcessGroup | None = None

    def attach(
        self, fragments: Sequence[Fragment], *, cut: bool, group: dist.ProcessGroup | None = None
    ) -> None:
        """What this rank updates: whole parameters, or, where they are `cut`, its fragments of them.

        Collective over the `group` that has them all; unset: all ranks.
        """
        owners = [owner for group in self.param_groups for owner in group["params"]]
        pieces = owned_parts(fragments, owners)
        self._vectors = [p for p in pieces if not is_matrix(p.fragment.name, p.fragment.shape)]
        self._matrices = [p for p in pieces if is_matrix(p.fragment.name, p.fragment.shape)]
        if not cut or not dist.is_initialized() or dist.get_world_size(group) == 1:
            return
        self._group = group
        own = [(p.fragment.name, p.fragment.start, p.fragment.master.numel()) for p in self._matrices]
        of_ranks: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(of_ranks, own, group=group)
        for rank, spans in enumerate(of_ranks):
            position = 0
            for name, start, numel in spans:
                self._places.setdefault(name, []).append((rank, position, start, numel))
                position += numel
            self._lengths.append(position)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update; nothing before `attach` (DeepSpeed makes a step at birth). Collective where cut."""
        assert closure is None
        if not self._vectors and not self._matrices and not self._lengths:
            return
        steps = 0
        for group in self.param_groups:
            for owner in group["params"]:
                self.state[owner]["step"] += 1
                steps = int(self.state[owner]["step"])
        rate = self.param_groups[0]["lr"]
        everything = [piece.fragment.master for piece in (*self._vectors, *self._matrices)]
        if everything:
            torch._foreach_mul_(everything, 1.0 - rate * self._config.weight_decay)
        self._step_vectors(rate, steps)
        self._step_matrices(rate)

    def _step_vectors(self, rate: float, steps: int) -> None:
        """AdamW (Loshchilov and Hutter 2019, algorithm 2)."""
        if not self._vectors:
            return
        first, second = self._config.betas
        gradients = [piece.gradient for piece in self._vectors]
        means = [piece.fragment.moments["exp_avg"] for piece in self._vectors]
        squares = [piece.fragment.moments["exp_avg_sq"] for piece in self._vectors]
        torch._foreach_lerp_(means, gradients, 1.0 - first)
        torch._foreach_mul_(squares, second)
        torch._foreach_addcmul_(squares, gradients, gradients, 1.0 - second)
        roots = torch._foreach_sqrt(squares)
        torch._foreach_div_(roots, math.sqrt(1.0 - second**steps))
        torch._foreach_add_(roots, self._config.eps)
        masters = [piece.fragment.master for piece in self._vectors]
        torch._foreach_addcdiv_(masters, means, roots, -rate / (1.0 - first**steps))

    def _step_matrices(self, rate: float) -> None:
        momentum = self._config.momentum
        updates = []
        for piece in self._matrices:
            mean = piece.fragment.moments["exp_avg"].lerp_(piece.gradient, 1.0 - momentum)
            updates.append(piece.gradient.lerp(mean, momentum).bfloat16())  # Nesterov's
        gathered = self._gather(updates) if self._lengths else None
        for piece, update in zip(self._matrices, updates, strict=True):
            fragment = piece.fragment
            flat = update if gathered is None else self._whole(fragment, gathered)
            matrix = flat.view(fragment.shape[0], -1)
            step = orthogonalised(matrix).reshape(-1).narrow(0, fragment.start, fragment.master.numel())
            scale = 0.2 * math.sqrt(max(matrix.shape))
            fragment.master.add_(step.float(), alpha=-rate * scale)

    def _gather(self, updates: list[Tensor]) -> list[Tensor]:
        """bf16 [longest] of every rank."""
        longest = max(self._lengths)
        device = self.param_groups[0]["params"][0].device
        own = torch.zeros(longest, dtype=torch.bfloat16, device=device)
        if updates:
            packed = torch.cat(updates)
            own[: len(packed)] = packed
        of_ranks = [torch.empty_like(own) for _ in self._lengths]
        dist.all_gather(of_ranks, own, group=self._group)
        return of_ranks

    def _whole(self, fragment: Fragment, of_ranks: list[Tensor]) -> Tensor:
        whole = torch.empty(math.prod(fragment.shape), dtype=torch.bfloat16, device=fragment.master.device)
        for rank, position, start, numel in self._places[fragment.name]:
            whole[start : start + numel] = of_ranks[rank][position : position + numel]
        return whole
