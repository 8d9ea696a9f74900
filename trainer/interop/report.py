"""What happened to every tensor when weights were imported, or a network started from others."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

MAX_LISTED = 12


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
