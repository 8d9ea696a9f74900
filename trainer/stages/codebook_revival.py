"""Dead entries of a codebook, which no look-up chooses any more, moved to where encoder outputs are.

An entry moves only when it is chosen, so one that starts far from all outputs, or is left behind by them,
never comes back. Every n optimizer steps the entries that nothing chose meanwhile take the place of outputs
of that step, one drawn from each sample, in the order of the samples: the same at any number of ranks.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from trainer.distributed import collectives
from trainer.distributed.engine import Engine
from trainer.rng import Purpose, uniform

ENTRIES = "quantize.embedding.weight"
"""The codebook, [K, z], among the parameters of a quantised first stage."""


class CodebookRevival:
    """Counts for how long entries were idle, and revives them. Collective."""

    def __init__(self, engine: Engine, every: int, seed: int) -> None:
        """`every`: steps between revivals, and without a look-up after which an entry counts as dead."""
        self._engine, self._every, self._seed = engine, every, seed
        shape = engine.parameter_shapes[ENTRIES]
        self._shape = (shape[0], shape[1])
        self.idle = torch.zeros(shape[0], device=engine.device)

    def is_due(self, made: int) -> bool:
        """Whether the next optimizer step, after so many, is one that revives."""
        return (made + 1) % self._every == 0

    def candidates(self, latents: Tensor, ordinals: Tensor) -> tuple[Tensor, Tensor]:
        """One encoder output of each sample: ordinals int64 [B] and points float32 [B, z].

        latents: encoder outputs before quantisation, [B, z, h, w].
        """
        points = latents.detach().float().flatten(2)  # [B, z, h * w]
        place = uniform(self._seed, ordinals, Purpose.REVIVAL, ()) * points.shape[2]
        place = place.long().clamp(max=points.shape[2] - 1)
        return ordinals, points.gather(2, place.view(-1, 1, 1).expand(-1, points.shape[1], 1)).squeeze(2)

    @torch.no_grad()
    def after_step(self, counts: Tensor, candidates: Sequence[tuple[Tensor, Tensor]] | None) -> Tensor:
        """Take the step's look-ups into account, and revive where candidates are given; how many, 0-d.

        Args:
            counts: look-ups of each entry [K], over all ranks.
            candidates: this rank's, of every micro-batch; None where no revival is due.
        """
        self.idle = torch.where(counts > 0, 0.0, self.idle + 1.0)
        revived = torch.zeros((), device=self._engine.device)
        if candidates is None:
            return revived
        dead = (self.idle >= self._every).nonzero().flatten().cpu()
        own = [(ordinals.cpu(), points.cpu()) for ordinals, points in candidates]
        pairs = [pair for share in collectives.all_gather_object(own) for pair in share]
        ordinals, points = (torch.cat(parts) for parts in zip(*pairs, strict=True))
        order = ordinals.argsort(stable=True)[: len(dead)]
        dead = dead[: len(order)]
        if not len(dead):
            return revived
        self._move(dead, points[order])
        self.idle[dead.to(self.idle.device)] = 0.0
        return revived + len(dead)

    def _move(self, dead: Tensor, points: Tensor) -> None:
        """Write points [n, z] over the entries `dead` [n] that this rank owns, and forget their moments."""
        size, width = self._shape
        chosen = torch.zeros(size, dtype=torch.bool)
        chosen[dead] = True
        wanted = torch.zeros(size, width)
        wanted[dead] = points
        mask, values = chosen.unsqueeze(1).expand(size, width).flatten(), wanted.flatten()
        for fragment in self._engine.fragments():
            if fragment.name != ENTRIES:
                continue
            part = slice(fragment.start, fragment.start + fragment.master.numel())
            here = mask[part].to(fragment.master.device)
            fragment.master.copy_(torch.where(here, values[part].to(fragment.master), fragment.master))
            for moment in fragment.moments.values():
                moment.masked_fill_(here, 0.0)
        self._engine.refresh(moments=True)
