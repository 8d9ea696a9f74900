"""Takes samples out of a cache of moments for good: parts that hold them are written anew without them.

    read       the table of every part: which rows does a removal list name, by key, URL or digest?
    rewrite    what is left of such a part becomes a part of its own, committed like any other
    remove     rows of the shards, tar, table of the old one, in this order

A kill in between leaves both, and the same command again goes on. What was interrupted while it was written
(a tar without a table, of which nobody knows what it holds) goes too, once it is old enough to be nobody's.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

from data_pipeline.errors import DataError
from data_pipeline.moments.entry import KeptMember, Label, digest
from data_pipeline.moments.parts import (
    PARTS,
    SHARDS,
    STAGE,
    Row,
    Table,
    commit_part,
    part_of,
    part_url,
    shard_folder,
    stage_folders,
    whole_table,
    written_s,
)
from data_pipeline.shards.removals import RemovalList, read_removals
from data_pipeline.shards.selection import removed_by
from data_pipeline.storage.files import list_names, list_tree, read_bytes, remove_file
from data_pipeline.storage.urls import join, name_of

_READERS = 8
_ABANDONED_S = 3600.0
"""Nobody takes that long between a tar and its table."""


@dataclass(frozen=True)
class Purged:
    """What was done to a cache."""

    parts: int = 0
    """Parts that were looked at."""
    entries: int = 0
    removed: int = 0
    """Entries that the lists name."""
    rewritten: int = 0
    """Parts that held some."""
    unknown: int = 0
    """Parts removed because nothing says what they hold."""
    unfinished: int = 0
    """Parts that may still be being written."""

    def __add__(self, other: Purged) -> Purged:
        mine, theirs = vars(self).values(), vars(other).values()
        return Purged(*(a + b for a, b in zip(mine, theirs, strict=True)))


def purge(
    cache: str,
    removal_lists: Sequence[str],
    *,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Purged:
    """Remove what the lists at these URLs name from all stages of a cache folder.

    Raises:
        DataError: a list that cannot be read with certainty, or no cache there; nothing has been removed.
        UserError, RetryableFault: storage; what was done is done, and the same again goes on.
    """
    removals = read_removals(removal_lists)
    stages = stage_folders(cache)
    if not stages:
        raise DataError(
            f"{cache} is no cache of moments (none of its folders holds a {STAGE}), so nothing was removed; "
            "give the same first_stage.cache as the runs that filled it."
        )
    found = {(stage, name) for stage in stages for name in list_names(join(stage, PARTS))}
    parts = sorted({(stage, part) for stage, name in found if (part := part_of(name))})
    total = Purged()
    with ThreadPoolExecutor(_READERS) as pool:
        task = partial(_purge_part, found=found, removals=removals)
        for done, each in enumerate(pool.map(task, parts), 1):
            total += each
            progress(done, len(parts))
    return total


def _purge_part(
    place: tuple[str, str], *, found: set[tuple[str, str]], removals: Sequence[RemovalList]
) -> Purged:
    folder, part = place
    has_tar, has_table = ((folder, f"{part}.{kind}") in found for kind in ("tar", "json"))
    if not has_table and time.time() - written_s(part) < _ABANDONED_S:
        return Purged(unfinished=1)
    table = whole_table(join(folder, PARTS, f"{part}.json")) if has_table and has_tar else None
    if table is None:
        _remove(folder, part, None)
        return Purged(unknown=1)
    rows = [(shard, row) for shard, each in table.rows.items() for row in each]
    named = {row.key for shard, row in rows if removed_by(removals, row.sample, shard, row.identities)}
    if not named:
        return Purged(parts=1, entries=len(rows))
    _rewrite(folder, table, [(shard, row) for shard, row in rows if row.key not in named])
    return Purged(1, len(rows), len(named), 1)


def _rewrite(folder: str, table: Table, rows: Sequence[tuple[str, Row]]) -> None:
    """Commit the rows that stay as a new part, then remove the old one."""
    data = read_bytes(part_url(folder, table.part)) if rows else b""
    entries = [
        (
            Label(
                *(row.key, shard, row.sample, row.offset, row.identities),
                tuple(KeptMember(extension, 0, b"") for extension in row.members),  # in the data already
            ),
            data[row.offset : row.offset + row.size],
        )
        for shard, row in rows
    ]
    whole = [entry for entry, (_, row) in zip(entries, rows, strict=True) if digest(entry[1]) == row.check]
    if whole:
        commit_part(folder, whole)
    _remove(folder, table.part, table)


def _remove(folder: str, part: str, table: Table | None) -> None:
    """Remove a part; without its table, all that bears its name is looked for, files cut short included."""
    if table is not None:
        files = [
            join(shard_folder(folder, shard), f"{part}.{kind}")
            for shard in table.rows
            for kind in ("json", "bad")
        ]
    else:
        listed = [
            join(folder, inner, name) for inner in (SHARDS, PARTS) for name in list_tree(join(folder, inner))
        ]
        files = [url for url in listed if name_of(url).startswith(f"{part}.")]
    for url in (*files, part_url(folder, part), join(folder, PARTS, f"{part}.json")):
        remove_file(url)
