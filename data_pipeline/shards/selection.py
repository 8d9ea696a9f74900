"""Which samples are read and which of their members: filters and removal lists."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from data_pipeline.config import DataConfig
from data_pipeline.shards.filters import Filter
from data_pipeline.shards.index import ShardIndex, hash_text
from data_pipeline.shards.tars import IMAGE_EXTENSIONS, parse_record
from data_pipeline.storage.files import read_bytes
from data_pipeline.storage.urls import shard_names

_JSON_CONDITIONS = ("class_label", "layout")
_MEMBER_CONDITIONS = {"semantic_map": "seg.png", "depth": "depth.png", "class_label": "cls"}


@dataclass
class Selection:
    """Everything that decides about a sample before its picture is decoded."""

    filter: Filter
    members: tuple[str, ...]
    """Extensions that are read."""
    max_member_bytes: int
    removed: NDArray[np.uint64] = field(default_factory=lambda: np.zeros(0, np.uint64))
    """Sorted hashes of removed keys, URLs and digests."""
    reads_json: bool = False
    """Whether every sample's json is read, not only where the index cannot decide the filter."""

    def reasons(self, index: ShardIndex) -> tuple[NDArray[np.int32], tuple[str, ...]]:
        """[n] -1 for samples to read, else position in the returned names."""
        names = (*self.filter.reasons(), "removed", "too_large")
        n = len(index)
        result = np.full(n, -1, np.int32)
        early = self._part(index, decidable=True)
        if early.clauses and n:
            columns = {name: index.column(name) for name in early.columns}
            known = {name: column for name, column in columns.items() if column is not None}
            # Either of a clause's two reasons: the second ones follow all of the first.
            place = [self.filter.clauses.index(clause) for clause in early.clauses]
            place += [len(self.filter.clauses) + i for i in place]
            result = np.asarray([*place, -1], np.int32)[early.first_failing(known, n)]
        if n:
            image_rows = [i for i, e in enumerate(index.extensions) if e in self.members]
            if image_rows:
                result[index.sizes[image_rows].max(axis=0) > self.max_member_bytes] = names.index("too_large")
            result[self._is_removed(index)] = names.index("removed")
        return result, names

    def undecided(self, index: ShardIndex) -> Filter | None:
        """The clauses that need each sample's json, because the index does not keep a column."""
        late = self._part(index, decidable=False)
        return late if late.clauses else None

    def _part(self, index: ShardIndex, *, decidable: bool) -> Filter:
        return self.filter.part(
            [c for c in self.filter.clauses if decidable == (not any(n in index.omitted for n in c.columns))]
        )

    def _is_removed(self, index: ShardIndex) -> NDArray[np.bool_]:
        hit = np.zeros(len(index), np.bool_)
        if not len(self.removed):
            return hit
        spellings = [removable_keys(key.decode("utf-8", "replace"), index.shard) for key in index.keys]
        keys = np.asarray([[hash_text(name) for name in names] for names in spellings], np.uint64)
        for column in (*keys.T, *index.hashes.values()):
            hit |= np.isin(column, self.removed)
        return hit


def make_selection(config: DataConfig) -> Selection:
    """Selection of a configuration; reads the removal lists. Raises DataError."""
    conditions = config.conditions
    reads_json = any(source != "txt" for source in config.captions) or any(
        c in _JSON_CONDITIONS for c in conditions
    )
    rows = Filter(config.filter)
    members = [
        *IMAGE_EXTENSIONS,
        *(["txt"] if "txt" in config.captions else []),
        *(["json"] if reads_json or rows.clauses else []),
        *(_MEMBER_CONDITIONS[c] for c in conditions if c in _MEMBER_CONDITIONS),
    ]
    return Selection(
        filter=rows,
        members=tuple(members),
        max_member_bytes=config.max_member_bytes,
        removed=read_removals(config.removal_lists),
        reads_json=reads_json,
    )


def removable_keys(key: str, shard: str) -> list[str]:
    """All that a removal list may call a sample: its key, alone or after any of its shard's names.

    A list written when there was one source must still hold when a second one makes the names longer.
    """
    return [key, *(f"{name}/{key}" for name in shard_names(shard))]


def removed_record(removed: NDArray[np.uint64], key: str, shard: str, body: bytes | None) -> bool:
    """Whether a sample that is not in any index is on the removal lists, by key or its json's identity."""
    record = parse_record(body) or {}
    identities = (str(record[n]) for n in ("url", "sha256", "md5", "hash") if record.get(n) is not None)
    names = [*removable_keys(key, shard), *identities]
    return bool(np.isin([hash_text(n) for n in names], removed).any())


def read_removals(urls: Iterable[str]) -> NDArray[np.uint64]:
    """Sorted hashes of every line of the files; blank lines and those that start with # are comments."""
    hashes: set[int] = set()
    for url in urls:
        for line in read_bytes(url).decode("utf-8", "replace").splitlines():
            entry = line.strip()
            if entry and not entry.startswith("#"):
                hashes.add(hash_text(_entry(entry)))
    return np.asarray(sorted(hashes), np.uint64)


def _entry(line: str) -> str:
    """A plain line, or the key, url or sha256 of a JSON one."""
    if line.startswith("{"):
        try:
            record = json.loads(line)
        except ValueError:
            return line
        for name in ("key", "url", "sha256", "md5", "hash"):
            if isinstance(record, dict) and isinstance(record.get(name), str):
                return str(record[name])
    return line
