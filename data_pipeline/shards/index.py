"""Per-shard index: keys, member offsets and sizes, filter columns.

A tar of two samples, the second without a caption, and what is kept of it:

    byte      0        512     1536     2048    2560     3072
              [header] [a.jpg] [header] [a.txt] [header] [b.jpg]
                         700 B              5 B            300 B

    keys            a   b
    offsets  jpg    1   6         of the first data byte, in blocks of 512
             txt    4   ABSENT
    sizes    jpg  700 300         bytes
             txt    5   0

So a member is the range [512 offset, 512 offset + size) of the tar, and nobody parses a tar while training.
The fields of the json (or parquet) become columns of n values, by what is in them:

    {"punsafe": 0.1, "status": "success", "url": "http://a.b/c.jpg", "exif": "{...long...}"}
         |                |                   |                          |
      numbers          codes and words     hashes, omitted            omitted: a filter on it must read
      floats, NaN      few short texts     for removal lists          each json ("late" clauses)
"""

from __future__ import annotations

import io
import json
import struct
import threading
import tokenize
import zipfile
import zlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_pipeline.errors import DataError
from data_pipeline.shards.filter_values import OTHER, as_column, spelled_number, to_numbers
from data_pipeline.shards.tars import BLOCK

VERSION = 6
ABSENT = np.uint32(0xFFFFFFFF)
DEFECTS = ("", "duplicate_key", "no_image", "too_large")
"""Reasons an index row is rejected for without being read; the array holds positions in here."""
ORIGINAL = ("original_height", "original_width")
"""Fields that tell the size of a picture before it was stored."""
PICTURE = ("picture_height", "picture_width")
"""Columns of the picture's size, read from its header; fields of these names do not count."""
DAMAGE = (
    *(ValueError, LookupError, TypeError, AttributeError, OSError, EOFError, SyntaxError, RuntimeError),
    *(ArithmeticError, MemoryError, tokenize.TokenError, struct.error, zlib.error, zipfile.BadZipFile),
)
"""What zipfile, gzip, json and numpy raise for damaged bytes."""
_ONE_AT_A_TIME = threading.Lock()
"""numpy parses array headers with `ast`, whose nesting counter CPython 3.11 shares between threads: when a
garbage collection runs Python code in the middle, two threads raise SystemError at each other."""


@dataclass
class ShardIndex:
    """Everything known about the n samples of one shard without reading their pixels."""

    shard: str
    """URL of the tar."""
    size: int
    """Bytes of the tar."""
    version: str
    """ETag or modification time of the tar that was indexed."""
    keys: NDArray[np.bytes_]
    """[n] sample keys."""
    extensions: tuple[str, ...]
    """Members that occur, one row of offsets and sizes each."""
    offsets: NDArray[np.uint32]
    """[extensions, n] first data byte in blocks of 512; ABSENT where there is no such member."""
    sizes: NDArray[np.uint32]
    """[extensions, n] bytes."""
    defects: NDArray[np.uint8]
    """[n] position in DEFECTS."""
    numbers: dict[str, NDArray[np.float64]] = field(default_factory=dict)
    """Numeric columns [n]; NaN is missing."""
    decimal: frozenset[str] = frozenset()
    """Numeric columns whose float32 stand for the shortest decimals that round to them."""
    codes: dict[str, NDArray[np.int16]] = field(default_factory=dict)
    """Low-cardinality text columns [n]: position in `words`, -1 is missing or in `numbers` (a column of both
    kinds), -2 a value that is not kept and stands in no json either."""
    words: dict[str, list[str]] = field(default_factory=dict)
    """Values of the text columns; none for a column that is empty in the whole shard."""
    hashes: dict[str, NDArray[np.uint64]] = field(default_factory=dict)
    """64-bit hashes of identifying columns (url, sha256, ...) for removal lists; 0 is missing."""
    omitted: tuple[str, ...] = ()
    """Columns that exist in the json but are not kept here."""
    pictures: dict[str, NDArray[np.uint32]] = field(default_factory=dict)
    """[2, n] heights and widths of every member that may be the picture, by extension; 0 is unknown."""
    blank: NDArray[np.bool_] | None = None
    """[n] Whether the txt holds no caption; None: no txt is blank."""
    problems: tuple[str, ...] = ()
    """Defects of the tar."""
    missing_rows: int = 0
    """Rows of the parquet without tar members (failed downloads)."""
    apart: int = 0
    """Samples whose members lie apart in the tar."""
    as_streamed: bool | None = None
    """Whether its samples, one after the other, are what is found by who reads the tar in windows without an
    index (`pieces.py`), and no parquet tells more of them; None: the index is of an earlier version."""
    beside: str = ""
    """The parquet that was beside the tar (`beside.edition_text`); "": the index is of an earlier version."""

    def __len__(self) -> int:
        return len(self.keys)

    def extents(self, extension: str) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """First byte and size of one member of every sample; -1 where absent."""
        row = self.extensions.index(extension)
        offsets = self.offsets[row].astype(np.int64) * BLOCK
        offsets[self.offsets[row] == ABSENT] = -1
        return offsets, self.sizes[row].astype(np.int64)

    def with_columns(self, names: Collection[str]) -> ShardIndex:
        """The same without other filter columns; what tells sizes and identities stays."""
        names = {*names, *ORIGINAL}
        return replace(
            self,
            numbers={name: column for name, column in self.numbers.items() if name in names},
            codes={name: column for name, column in self.codes.items() if name in names},
            words={name: words for name, words in self.words.items() if name in names},
        )

    def rows(self, start: int, stop: int) -> ShardIndex:
        """Index of the samples [start, stop) alone."""
        at = slice(start, stop)
        return replace(
            self,
            keys=self.keys[at],
            offsets=self.offsets[:, at],
            sizes=self.sizes[:, at],
            defects=self.defects[at].copy(),  # which `choose_picture` writes to
            numbers={name: column[at] for name, column in self.numbers.items()},
            codes={name: column[at] for name, column in self.codes.items()},
            hashes={name: column[at] for name, column in self.hashes.items()},
            pictures={name: sizes[:, at] for name, sizes in self.pictures.items()},
            blank=None if self.blank is None else self.blank[at],
        )

    def end_of(self, row: int) -> int:
        """Byte of the tar behind the members of a sample; 0 of the row before the first."""
        if row < 0:
            return 0
        there = self.offsets[:, row] != ABSENT
        offsets, sizes = (part[there, row].astype(np.int64) for part in (self.offsets, self.sizes))
        return int((offsets + -(-sizes // BLOCK)).max()) * BLOCK

    def without_text(self) -> NDArray[np.bool_]:
        """[n] Samples without a txt that holds a caption."""
        if "txt" not in self.extensions:
            return np.ones(len(self), bool)
        absent = self.offsets[self.extensions.index("txt")] == ABSENT
        return absent if self.blank is None else absent | self.blank

    def choose_picture(self, extensions: Sequence[str]) -> None:
        """Make the first of `extensions` that a sample has its picture: its size, and whether it has one."""
        heights, widths = np.full((2, len(self)), np.nan)
        missing = np.ones(len(self), bool)
        for extension in extensions:
            if extension not in self.extensions:
                continue
            chosen = missing & (self.offsets[self.extensions.index(extension)] != ABSENT)
            missing &= ~chosen
            if extension in self.pictures:
                sizes = self.pictures[extension].astype(np.float64)
                sizes[sizes == 0] = np.nan
                heights[chosen], widths[chosen] = sizes[:, chosen]
        self.numbers |= dict(zip(PICTURE, (heights, widths), strict=True))
        for name in PICTURE:
            self.codes.pop(name, None)
        self.omitted = tuple(n for n in self.omitted if n not in self.numbers)
        without = DEFECTS.index("no_image")
        self.defects[self.defects == without] = 0
        self.defects[missing & (self.defects == 0)] = without

    def column(self, name: str) -> NDArray[Any] | None:
        """One filter column: float64 with NaN, or objects with None; None when it is not kept."""
        if name in self.codes:
            texts: NDArray[Any] = np.asarray([*self.words[name], OTHER, None], dtype=object)[self.codes[name]]
            if name in self.numbers:
                numbers = self._numbers(name)
                texts = np.where(np.isnan(numbers), texts, numbers.astype(object))
            return texts
        if name in self.numbers:
            return self._numbers(name)
        if name in self.omitted:
            return None
        return np.full(len(self), np.nan)

    def _numbers(self, name: str) -> NDArray[np.float64]:
        return _widen(self.numbers[name], name in self.decimal)

    def column_kinds(self) -> dict[str, str]:
        """What the values of each column are, by name.

        number; text: none spells a number; mixed: anything else; unkept: in the parquet alone; empty: without
        a value.
        """
        kinds = dict.fromkeys(self.omitted, "mixed") | dict.fromkeys(self.numbers, "number")
        for name, codes in self.codes.items():
            lost = bool((codes == -2).any())
            if name in self.numbers or any(spelled_number(w) is not None for w in self.words[name]):
                kinds[name] = "mixed"
            elif self.words[name]:
                kinds[name] = "mixed" if lost else "text"
            else:
                kinds[name] = "unkept" if lost else "empty"
        return kinds

    def picture_sizes(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Heights and widths [n] of the pictures as read from their headers; NaN where unknown."""
        unknown = np.full(len(self), np.nan)
        heights, widths = (self.numbers.get(name, unknown).astype(np.float64) for name in PICTURE)
        return heights, widths

    def original_sizes(self) -> NDArray[np.int32]:
        """[2, n] heights and widths before pictures were stored, as img2dataset notes them; 0 is unknown."""
        columns = [self.column(name) for name in ORIGINAL]
        if any(column is None for column in columns):
            return np.zeros((2, len(self)), np.int32)
        sizes = np.stack([to_numbers(as_column(column)).values for column in columns if column is not None])
        usable = ((sizes >= 1) & (sizes < 1 << 31)).all(axis=0)  # no NaN is either
        return np.where(usable, sizes, 0).astype(np.int32)

    def encode(self) -> bytes:
        """Compact bytes: a zip of .npy arrays, no pickle."""
        narrowed = {k: _narrow(self._numbers(k)) for k in self.numbers}
        header: dict[str, Any] = {
            "decimal": [k for k, (_, decimal) in narrowed.items() if decimal],
            "format": VERSION,
            "shard": self.shard,
            "size": self.size,
            "version": self.version,
            "extensions": self.extensions,
            "words": self.words,
            "omitted": self.omitted,
            "pictures": list(self.pictures),
            # Names of columns are anything, which names in a zip are not.
            "columns": [list(narrowed), list(self.codes), list(self.hashes)],
            "apart": self.apart,
            "problems": self.problems,
            "missing_rows": self.missing_rows,
        }
        if self.as_streamed is not None:
            header["as_streamed"] = self.as_streamed
        if self.beside:
            header["beside"] = self.beside
        arrays: dict[str, NDArray[Any]] = {
            "header": np.frombuffer(json.dumps(header).encode(), np.uint8),
            "keys": self.keys,
            "offsets": self.offsets,
            "sizes": self.sizes,
            "defects": self.defects,
        }
        if self.pictures:
            arrays["pictures"] = np.stack(list(self.pictures.values()))
        if self.blank is not None:
            arrays["blank"] = self.blank
        arrays |= {f"n{i}": v for i, (v, _) in enumerate(narrowed.values())}
        arrays |= {f"c{i}": v for i, v in enumerate(self.codes.values())}
        arrays |= {f"h{i}": v for i, v in enumerate(self.hashes.values())}
        out = io.BytesIO()
        np.savez_compressed(out, allow_pickle=False, **arrays)
        return out.getvalue()


def decode_index(data: bytes, where: str) -> ShardIndex:
    """Inverse of ShardIndex.encode. Raises DataError for anything else."""
    try:
        with _ONE_AT_A_TIME, np.load(io.BytesIO(data), allow_pickle=False) as arrays:
            header = json.loads(arrays["header"].tobytes())
            if header["format"] != VERSION:
                raise ValueError(f"format {header['format']}")
            numbers, codes, hashes = (
                {name: arrays[f"{kind}{i}"] for i, name in enumerate(names)}
                for kind, names in zip("nch", header["columns"], strict=True)
            )
            return ShardIndex(
                shard=header["shard"],
                size=header["size"],
                version=header["version"],
                keys=arrays["keys"],
                extensions=tuple(header["extensions"]),
                offsets=arrays["offsets"],
                sizes=arrays["sizes"],
                defects=arrays["defects"],
                numbers=numbers,
                codes=codes,
                words=header["words"],
                hashes=hashes,
                decimal=frozenset(header.get("decimal", ())),
                omitted=tuple(header["omitted"]),
                pictures={e: arrays["pictures"][i] for i, e in enumerate(header["pictures"])},
                blank=arrays.get("blank"),
                apart=header["apart"],
                problems=tuple(header["problems"]),
                missing_rows=header["missing_rows"],
                as_streamed=header.get("as_streamed"),
                beside=header.get("beside", ""),
            )
    except DAMAGE as error:
        raise DataError(
            f"The index {where} is damaged or of another version ({error}); delete it and run "
            "`ldm data index` again."
        ) from error


def _narrow(values: NDArray[np.float64]) -> tuple[NDArray[Any], bool]:
    """The same numbers in 4 bytes where that is possible, and whether they are to be read by their decimals.

    0.1 is no float32, but it is what the nearest float32 is written as: `p <= 0.1` must hold of it as it does
    where a shard has the text 0.1.
    """
    with np.errstate(over="ignore"):
        narrow = values.astype(np.float32)
    for decimal in (False, True):
        if np.array_equal(_widen(narrow, decimal), values, equal_nan=True):
            return narrow, decimal
    return values, False


def _widen(values: NDArray[Any], decimal: bool) -> NDArray[np.float64]:
    """Inverse of _narrow: float64."""
    return (values.astype(str) if decimal and values.dtype == np.float32 else values).astype(np.float64)
