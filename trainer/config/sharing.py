"""How a global batch is shared among any number of ranks: who has which samples, in how many passes.

    2048 samples, at most 8 at once          largest share     passes x rows     computed for nothing
    256 ranks     8 each                           8               1 x 8               -
    504 ranks     5 on 32 ranks, 4 on 472          5               1 x 5              19 %
    3 ranks       683, 683, 682                  683              86 x 8             0.8 %

Every rank makes equally many passes of equally many rows, since the ranks meet in each (gradients, gathered
weights) and shapes that change would be compiled and captured anew. Rows that no sample is left for repeat
another one with weight 0 (`data_pipeline/batch.py`). The engines average over passes and ranks, as if all
rows were samples, so a pass's mean is multiplied by rows / samples (`gain`), and the gradient is exactly the
mean over the global batch. Where the ranks divide the batch, no row is added and the gain is 1.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Sharing:
    """One global batch on a number of ranks."""

    samples: int
    """Of the global batch."""
    ranks: int
    at_once: int
    """Samples that a rank may take in one pass."""
    together: int = 1
    """So many consecutive samples stay on one rank; they divide the global batch."""

    @property
    def largest_share(self) -> int:
        """Samples of the rank that has most; the others' are smaller by `together` at most."""
        return -(-self.samples // (self.ranks * self.together)) * self.together

    @property
    def micro_batches(self) -> int:
        """Passes of every rank."""
        return -(-self.largest_share // self.at_once)

    @property
    def rows(self) -> int:
        """Of every pass."""
        return -(-self.largest_share // self.micro_batches)

    @property
    def computed(self) -> int:
        """Rows of all passes of all ranks."""
        return self.rows * self.micro_batches * self.ranks

    @property
    def gain(self) -> float:
        """What the mean over a pass's rows is multiplied by, padding counted as 0."""
        return self.computed / self.samples

    @property
    def waste(self) -> float:
        """Share of the rows that stand for no sample."""
        return 1.0 - self.samples / self.computed

    @property
    def fewest_ranks(self) -> int:
        """The fewest ranks whose step is as short: more of them only add padding."""
        return -(-self.samples // self.largest_share)

    def sentence(self) -> str:
        """What is computed for nothing, and what would not be."""
        fewer = f"; {self.fewest_ranks} ranks make a step as short" if self.fewest_ranks < self.ranks else ""
        ranks = f"{self.ranks} rank{'s' * (self.ranks > 1)}"
        return (
            f"{self.samples:,} samples on {ranks} are {self.micro_batches} x {self.rows} each: "
            f"{100 * self.waste:.1f} % of the rows are padding{fewer}"
        )
