"""What a position says of the shards that it is in, by which a later start knows them again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

Fingerprint: TypeAlias = str | tuple[str, ...]
"""Of all shards, or of those of each source where sources have weights."""


@dataclass(frozen=True)
class ShardSet:
    """The shards that a position is in."""

    fingerprint: Fingerprint
    shards: tuple[int, ...] = ()
    """Of each source."""
    grown: tuple[Earlier, ...] = ()
    """What the set was before it grew, oldest first."""
    kept: tuple[KeptShard, ...] = ()
    """What shards were when the run began, where they were replaced since."""


class Earlier(NamedTuple):
    """A set before it grew."""

    shards: tuple[int, ...]
    """Of each source, the first of those that it has now."""
    until: tuple[int, ...]
    """Epoch of each source from which on it has more; of one order over all sources, its epoch."""


class KeptShard(NamedTuple):
    """A shard as a fingerprint has it, which by now is another one."""

    source: int
    place: int
    """Among those of its source."""
    size: int
    samples: int
