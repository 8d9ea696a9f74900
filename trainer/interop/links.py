"""Links between our tensors and those of another dialect, applied in both directions, all or nothing; and
what became of each tensor."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trainer.weights import check_fit, shapes_of

ANOTHER = "Change the configuration or name another file."
"""The remedy where tensors do not fit."""
MAX_LISTED = 12


@dataclass(frozen=True)
class Link:
    """One tensor of ours, and how a dialect stores it. Values are moved, never computed with."""

    ours: str
    """Our name."""
    theirs: tuple[str, ...]
    """Names in the dialect; several are stacked along the first axis of ours."""
    ones: int = 0
    """Axes of length one that the dialect appends: 2 for a 1x1 convolution where ours is linear."""
    heads: int = 0
    """Heads of an ADM attention, which stores q, k and v head by head; 0 where this does not apply."""
    transposed: bool = False
    """Whether the dialect stores the transpose."""

    def to_theirs(self, tensor: Tensor) -> dict[str, Tensor]:
        """Our tensor as the dialect stores it."""
        if self.heads:  # [3 * C, ...] as (q | k | v) -> per head (q, k, v)
            tensor = tensor.unflatten(0, (3, self.heads, -1)).transpose(0, 1).flatten(0, 2)
        if self.transposed:
            tensor = tensor.t()
        tensor = tensor.reshape(tensor.shape + (1,) * self.ones)
        return dict(zip(self.theirs, tensor.chunk(len(self.theirs)), strict=True))

    def to_ours(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """The inverse; `tensors` holds every name of `theirs`, with the right shapes."""
        parts = [tensors[name] for name in self.theirs]
        whole = parts[0] if len(parts) == 1 else torch.cat(parts)
        whole = whole.reshape(whole.shape[: whole.dim() - self.ones])
        if self.transposed:
            whole = whole.t()
        if self.heads:
            whole = whole.unflatten(0, (self.heads, 3, -1)).transpose(0, 1).flatten(0, 2)
        return whole.contiguous()


def export_tensors(links: Iterable[Link], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our tensors in the dialect; also works on meta tensors, to learn the dialect's shapes."""
    exported: dict[str, Tensor] = {}
    for link in links:
        exported.update(link.to_theirs(tensors[link.ours]))
    return exported


def import_tensors(
    links: Sequence[Link], expected: Mapping[str, Tensor], theirs: Mapping[str, Tensor], source: str
) -> dict[str, Tensor]:
    """The dialect's tensors under our names and in our shapes.

    Args:
        links: one per tensor of ours.
        expected: our tensors, of which only the shapes matter (meta tensors will do).
        theirs: the dialect's tensors, exactly those that belong to the network.
        source: where they come from, named in errors.

    Raises:
        ConfigError: names or shapes differ; all of them are listed, and nothing is converted.
    """
    check_fit(shapes_of(export_tensors(links, expected)), shapes_of(theirs), source, ANOTHER)
    return {link.ours: link.to_ours(theirs) for link in links}


@dataclass(frozen=True)
class TransferReport:
    """Tensor names by what became of them."""

    taken: tuple[str, ...] = ()
    """Copied as they are."""
    widened: tuple[str, ...] = ()
    """Copied, with added input channels that start at zero."""
    new: tuple[str, ...] = ()
    """Not in the source: they keep their initial values, or start at zero where a condition is added."""
    left: tuple[str, ...] = ()
    """In the source and not used."""
    files: tuple[str, ...] = ()
    """Files and folders written."""
    notes: tuple[str, ...] = ()
    """What else a reader of these files should know, a sentence each."""

    def describe(self) -> str:
        """A few lines for people."""
        lines = [f"taken: {len(self.taken)} tensors"]
        for title, names in (("widened", self.widened), ("new", self.new), ("left", self.left)):
            if names:
                lines.append(f"{title}: {len(names)} tensors: {_shortened(names)}")
        return "\n".join([*lines, *self.notes, *(f"wrote {file}" for file in self.files)])


def _shortened(names: tuple[str, ...]) -> str:
    """Every name while they are few, otherwise counts by leading part."""
    if len(names) <= MAX_LISTED:
        return ", ".join(names)
    groups = Counter(".".join(name.split(".")[:2]) for name in names).most_common()
    listed = [f"{group}.* ({count})" if count > 1 else group for group, count in groups[:MAX_LISTED]]
    rest = sum(count for _, count in groups[MAX_LISTED:])
    return ", ".join(listed) + (f", and {rest} more" if rest else "")
