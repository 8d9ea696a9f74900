"""How many of the samples that a loader looked at it has served, and why not the others.

>>> tally = Tally(served=380, rejected=Counter({"no_caption": 600, "not_an_image": 20, "set_aside": 7}))
>>> tally.sentence()
'380 of 1,000 samples (38.0 %) are served; rejected: no_caption (600), not_an_image (20)'
>>> tally.check(limit=0.7)
>>> tally.check(limit=0.5)  # doctest: +IGNORE_EXCEPTION_DETAIL
Traceback (most recent call last):
DataError: ...
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from data_pipeline.errors import DataError

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


@dataclass
class Tally:
    """Counts since a loader was opened."""

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
