"""Which samples are read and which of their members: filters and removal lists."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from data_pipeline.config import DataConfig
from data_pipeline.errors import DataError
from data_pipeline.order.buckets import aspect_of, bucket_shapes, nearest_shapes
from data_pipeline.shards.filters import Filter
from data_pipeline.shards.identities import hash_identity, identity_text, is_identity, numbered
from data_pipeline.shards.index import DEFECTS, ShardIndex
from data_pipeline.shards.removals import RemovalList, read_removals
from data_pipeline.shards.split import REASONS, Part, held_out
from data_pipeline.storage.urls import shard_names

_JSON_CONDITIONS = ("class_label", "layout")
_MEMBER_CONDITIONS = {"semantic_map": "seg.png", "depth": "depth.png", "class_label": "cls"}


class Decision(NamedTuple):
    """What is decided about the n samples of a shard before a byte of it is read."""

    codes: NDArray[np.int32]
    """[n] -1 for samples to read, else position of the reason in `names`."""
    names: tuple[str, ...]
    accepted: NDArray[np.bool_]
    """[n] what buckets count: removal lists may grow during a run, and must not shift its order."""

    def counted(self) -> Counter[str]:
        """How many samples are not read, by reason."""
        codes, counts = np.unique(self.codes[self.codes >= 0], return_counts=True)
        return Counter(dict(zip([self.names[code] for code in codes], counts.tolist(), strict=True)))


@dataclass
class Selection:
    """Everything that decides about a sample before its picture is decoded."""

    filter: Filter
    members: tuple[str, ...]
    """Extensions that are read."""
    max_member_bytes: int
    picture: tuple[str, ...]
    """Extensions of the picture: the first that a sample has is read."""
    shapes: tuple[tuple[int, int], ...] = ()
    """(height, width) of batches: a picture smaller than that of nearest aspect is not read. (): all are."""
    removals: tuple[RemovalList, ...] = ()
    captions: tuple[str, ...] = ()
    """Columns that captions may come from."""
    wants_text: bool = False
    """Whether a sample needs a caption, and only the txt may have it."""
    max_pixels: float = math.inf
    reads_json: bool = False
    """Whether every sample's json is read, not only where the index cannot decide the filter."""
    held_out_share: float = 0.0
    """Share of the samples that training does not see."""
    part: Part = "training"
    """Whether the others are read, or those."""

    @property
    def columns(self) -> set[str]:
        """What samples are chosen by, or have their captions in."""
        return {*self.filter.columns, *self.captions}

    def decide(self, index: ShardIndex) -> Decision:
        """All that the index can decide about its samples."""
        removed = [f"removed: {removal.name}" for removal in self.removals]
        names = (
            *(*self.filter.reasons(), *removed),
            *("no_caption", "too_many_pixels", "too_large", "too_small", REASONS[self.part], *DEFECTS),
        )
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
            if self.wants_text:
                result[(result < 0) & index.without_text()] = names.index("no_caption")
            heights, widths = index.picture_sizes()
            result[(result < 0) & (heights * widths > self.max_pixels)] = names.index("too_many_pixels")
            result[(result < 0) & self._too_small(index)] = names.index("too_small")
            largest = self.extents(index)[1].max(axis=0)
            result[largest > self.max_member_bytes] = names.index("too_large")
            if self.held_out_share:
                other = held_out(index.keys, self.held_out_share) != (self.part == "validation")
                result[(result < 0) & other] = names.index(REASONS[self.part])
        defects = index.defects.astype(np.int32)
        accepted = (result < 0) & (defects == 0)
        self._mark_removed(index, result, [names.index(name) for name in removed])
        # A defect outranks filter and removal list.
        result = np.where(defects > 0, defects + len(names) - len(DEFECTS), result)
        return Decision(result, names, accepted)

    def _too_small(self, index: ShardIndex) -> NDArray[np.bool_]:
        """[n] whether a picture would have to be enlarged; of unknown sizes decoding decides."""
        heights, widths = index.picture_sizes()
        if not self.shapes:
            return np.zeros(len(index), np.bool_)
        target = np.asarray(self.shapes)[nearest_shapes(self.shapes)[aspect_of(heights, widths)]]
        return np.asarray((heights < target[:, 0]) | (widths < target[:, 1]))

    def extents(self, index: ShardIndex) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """First byte, -1 where there is none, and size [members, n] of what is read of every sample."""
        offsets = np.full((len(self.members), len(index)), -1, np.int64)
        sizes = np.zeros_like(offsets)
        missing = np.ones(len(index), bool)
        for row, extension in enumerate(self.members):
            if extension not in index.extensions:
                continue
            first, size = index.extents(extension)
            if extension in self.picture:  # of several, one is used
                first, size = np.where(missing, first, -1), np.where(missing, size, 0)
                missing &= first < 0
            offsets[row], sizes[row] = first, size
        return offsets, sizes

    def undecided(self, index: ShardIndex) -> Filter | None:
        """The clauses that need each sample's json, because the index does not keep a column."""
        late = self._part(index, decidable=False)
        return late if late.clauses else None

    def _part(self, index: ShardIndex, *, decidable: bool) -> Filter:
        return self.filter.part(
            [c for c in self.filter.clauses if decidable == (not any(n in index.omitted for n in c.columns))]
        )

    def _mark_removed(self, index: ShardIndex, result: NDArray[np.int32], codes: Sequence[int]) -> None:
        """Give the samples of each list its code; a sample of several lists counts for the first."""
        if not self.removals or not len(index):
            return
        columns = identity_hashes(index)
        for removal, code in reversed(list(zip(self.removals, codes, strict=True))):
            result[removal.matches(columns).any(axis=0)] = code


def make_selection(
    config: DataConfig, removals: tuple[RemovalList, ...] | None = None, *, part: Part = "training"
) -> Selection:
    """Selection of a configuration; reads the removal lists unless given them. Raises DataError."""
    conditions = config.conditions
    columns = tuple(source for source in config.captions if source != "txt")
    reads_json = bool(columns) or any(c in _JSON_CONDITIONS for c in conditions)
    rows = Filter(config.filter)
    picture = picture_members(config)
    members = [
        *picture,
        *(source for source in config.captions if source not in picture),
        *(["json"] if reads_json or rows.clauses else []),
        *(_MEMBER_CONDITIONS[c] for c in conditions if c in _MEMBER_CONDITIONS),
    ]
    return Selection(
        filter=rows,
        members=tuple(dict.fromkeys(members)),
        picture=picture,
        shapes=() if config.allow_enlarging else target_shapes(config),
        max_member_bytes=config.max_member_bytes,
        removals=read_removals(config.removal_lists) if removals is None else removals,
        captions=columns,
        wants_text=config.require_caption and set(config.captions) == {"txt"},
        max_pixels=config.max_image_pixels,
        reads_json=reads_json,
        held_out_share=config.validation.share,
        part=part,
    )


def target_shapes(config: DataConfig) -> tuple[tuple[int, int], ...]:
    """(height, width) of all batches that may occur. Raises DataError for impossible settings."""
    if not config.buckets:
        return ((config.image_size, config.image_size),)
    return tuple(bucket_shapes(config.image_size, config.bucket_step, config.bucket_max_aspect))


def picture_members(config: DataConfig) -> tuple[str, ...]:
    """data.picture as the index spells extensions. Raises DataError when it is empty."""
    spelled = dict.fromkeys(extension.strip().lstrip(".").lower() for extension in config.picture)
    if not spelled or "" in spelled:
        raise DataError(
            f"data.picture is {list(config.picture)}; name the extensions of the pictures, e.g. [jpg, png]."
        )
    return tuple(spelled)


def key_hashes(keys: Iterable[str], shard: str) -> NDArray[np.uint64]:
    """[n, ways] hashes of all that a removal list may call samples of a shard besides their identities.

    A key, alone or after any of its shard's names: a list written when there was one source must still hold
    when a second one makes the names longer. A key of digits may have lost its leading zeros in a table.
    """
    shards = shard_names(shard)
    hashes = [
        [
            hash_identity(key),
            *(hash_identity(f"{name}/{key}") for name in shards),
            hash_identity(numbered(key) or key),
            hash_identity(numbered(f"{shards[0]}/{key}") or key),
        ]
        for key in keys
    ]
    return np.asarray(hashes, np.uint64).reshape(-1, 3 + len(shards))


def identity_hashes(index: ShardIndex) -> NDArray[np.uint64]:
    """[ways to name a sample, n] hashes of all that a removal list may have of each sample; 0 is missing."""
    keys = key_hashes((key.decode("utf-8", "replace") for key in index.keys), index.shard)
    return np.stack([*keys.T, *index.hashes.values()])


def identities_in(record: Mapping[str, Any]) -> list[int]:
    """Hashes of the identities among the fields of a sample's json."""
    fields = [(name, value) for name, value in record.items() if value is not None and is_identity(name)]
    return [hash_identity(identity_text(name, value)) for name, value in fields]


def removed_by(
    removals: Sequence[RemovalList], key: str, shard: str, identities: Iterable[int]
) -> str | None:
    """Reason against one sample: the first list that has its key, or one of the hashes of its identities."""
    if not removals:
        return None
    hashes = np.asarray([*key_hashes([key], shard)[0], *identities], np.uint64)
    return next((f"removed: {each.name}" for each in removals if each.matches(hashes).any()), None)
