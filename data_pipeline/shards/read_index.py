"""Reads one shard: its tar headers, its json members and the headers of its pictures become an index.

scan                  tar headers, json members, headers of each picture; pixels are jumped over
group, assemble       members -> samples -> arrays
_add_columns          fields of the json, by type
_add_parquet          fields that only the parquet has; rows whose download failed
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_pipeline.errors import AccessDenied, DataError, NotATar, NotFound
from data_pipeline.pictures.headers import size_of
from data_pipeline.shards.beside import (
    KEY,
    NO_PARQUET,
    edition_text,
    parquet_of,
    read_table,
    rows_by_key,
)
from data_pipeline.shards.filter_values import OTHER, plain, spelled_number
from data_pipeline.shards.grouping import (
    IMAGE_EXTENSIONS,
    Grouping,
    Sample,
    come_one_by_one,
    group,
    split_name,
)
from data_pipeline.shards.identities import hash_identity, identity_text, is_identity
from data_pipeline.shards.index import ABSENT, DEFECTS, ORIGINAL, ShardIndex
from data_pipeline.shards.records import MAX_JSON, TEXT_BYTES, is_blank, is_damaged, parse_record
from data_pipeline.shards.tars import BLOCK, MemberBytes, TarScan, scan
from data_pipeline.storage.files import read_range, read_with_edition
from data_pipeline.storage.listing import ListedFile
from data_pipeline.storage.urls import name_of

_MAX_WORDS = 256
"""Different texts up to which a column is kept ("status", "license"); with more it is a caption or a URL."""
_MAX_WORD = 64
_UNREADABLE = "unreadable"
"""What is noted of a json member that is no object, or of a text in another encoding."""
_NO_TEXT = "no UTF-8: captions get replacement characters there; `iconv -f latin1 -t utf8` may mend them"
_CONSEQUENCES = {
    "json": f"no JSON objects in UTF-8 of at most {MAX_JSON:,} bytes: filters and removal lists see none of "
    "their fields",
    "txt": _NO_TEXT,
    "caption": _NO_TEXT,
}
_HEAD = 512
_KINDS = {
    b"\x1f\x8b": "gzip", b"bzh": "bzip2", b"\xfd7zxz": "xz", b"\x28\xb5\x2f\xfd": "zstd", b"lzip": "lzip",
    b"\x04\x22\x4d\x18": "lz4", b"\x1f\x9d": "compress", b"pk\3\4": "a zip archive",
    b"7z\xbc\xaf\x27\x1c": "a 7z archive", b"rar!": "a rar archive", b"par1": "a parquet file",
    b"<!doctype html": "a web page", b"<html": "a web page", b"<?xml": "XML, perhaps an error of the server",
    b"version https://git-lfs": "a git-lfs pointer: run `git lfs pull`", b"{": "JSON",
    b"\xff\xd8\xff": "a picture", b"\x89png": "a picture",
}  # fmt: skip
"""What is taken for a tar now and then, by its first bytes in lower case."""
_UNPACK = {
    "gzip": "gunzip", "bzip2": "bunzip2", "xz": "unxz", "zstd": "unzstd", "lzip": "lzip -d", "lz4": "unlz4",
    "compress": "uncompress",
}  # fmt: skip


def read_index(
    shard: ListedFile, *, timeout_s: float = 30.0, tries: int = 8, counts: Counter[str] | None = None
) -> ShardIndex:
    """Index of one shard from its tar headers and json members, or the parquet beside it.

    counts: takes the requests and bytes of the reading
    """
    counts = Counter() if counts is None else counts

    def read(start: int, stop: int) -> bytes:
        counts.update(requests=1, bytes=stop - start)
        return read_range(shard.url, start, stop, timeout_s=timeout_s, tries=tries)

    found = scan(read, shard.size, look=look)
    if not found.is_tar:
        raise NotATar(not_a_tar(shard.url, read(0, min(shard.size, _HEAD)), found))
    return index_of(shard, found, counts)


def index_of(shard: ListedFile, found: TarScan, counts: Counter[str] | None = None) -> ShardIndex:
    """Index of a shard in whose tar `scan` has found this, and `look` seen. Raises NotATar."""
    try:
        grouping = group(found.members)
    except NotATar as error:
        raise NotATar(f"{shard.url}: {error}.") from error
    index = assemble(shard, found, grouping)
    streamed = _is_as_streamed(index, found, grouping)
    told_more = _add_parquet(index, shard, Counter() if counts is None else counts)
    index.as_streamed = streamed and not told_more
    # Last, for these columns are ours whatever the json and the parquet have.
    index.choose_picture(IMAGE_EXTENSIONS)
    return index


def _is_as_streamed(index: ShardIndex, found: TarScan, grouping: Grouping) -> bool:
    """Whether who reads the tar in windows finds the same (`ShardIndex.as_streamed`), the parquet left aside.

    Columns that are not kept are read from each json either way, but the sizes before pictures were stored.
    """
    return (
        found.others == 0
        and DEFECTS.index("too_large") not in index.defects
        and not set(ORIGINAL) & set(index.omitted)
        and come_one_by_one(found.members, grouping.samples)
    )


def not_a_tar(url: str, head: bytes, found: TarScan) -> str:
    """Sentence that says what a shard is instead, by its first bytes."""
    head = head[:_HEAD].lstrip().lower()
    kind = next((kind for magic, kind in _KINDS.items() if head.startswith(magic)), "")
    if unpack := _UNPACK.get(kind):
        return (
            f"{url} is not a tar archive (it is compressed with {kind}), and places in it cannot be read "
            f"alone; unpack it with `{unpack}`, or remove it and correct data.shards."
        )
    what = f"it is {kind}" if kind else "; ".join(found.problems) or "it is empty"
    return f"{url} is not a tar archive ({what}); remove it or correct data.shards."


def assemble(shard: ListedFile, found: TarScan, grouping: Grouping) -> ShardIndex:
    """Index of these samples of a shard, of which `look` has seen what is kept."""
    samples = grouping.samples
    extensions = tuple(sorted({e for sample in samples for e in sample.members}))
    rows = {extension: row for row, extension in enumerate(extensions)}
    offsets = np.full((len(extensions), len(samples)), ABSENT, np.uint32)
    sizes = np.zeros((len(extensions), len(samples)), np.uint32)
    defects = np.zeros(len(samples), np.uint8)
    blank = np.zeros(len(samples), bool)
    pictures: dict[str, NDArray[np.uint32]] = {}
    records: list[dict[str, Any]] = []
    for i, sample in enumerate(samples):
        for extension, member in sample.members.items():
            if member.size >= ABSENT:
                defects[i] = DEFECTS.index("too_large")
                continue
            offsets[rows[extension], i], sizes[rows[extension], i] = member.offset // BLOCK, member.size
            if _is_picture(extension):
                sizes_of = pictures.setdefault(extension, np.zeros((2, len(samples)), np.uint32))
                noticed = found.seen.get(member.offset)
                sizes_of[:, i] = noticed if isinstance(noticed, tuple) else (0, 0)
        if "txt" in sample.members and found.seen.get(sample.members["txt"].offset) is True:
            blank[i] = True
        if sample.duplicate:
            defects[i] = DEFECTS.index("duplicate_key")
        records.append(_record(sample, found))
    index = ShardIndex(
        shard=shard.url,
        size=shard.size,
        version=shard.version,
        keys=np.asarray([sample.key.encode() for sample in samples], dtype=np.bytes_),
        extensions=extensions,
        offsets=offsets,
        sizes=sizes,
        defects=defects,
        pictures=pictures,
        blank=blank if blank.any() else None,
        problems=tuple([*found.problems, *_unreadable(samples, found), *grouping.problems][:100]),
        apart=grouping.apart,
    )
    if any(records):
        _add_columns(index, records)
    return index


def _unreadable(samples: Sequence[Sample], found: TarScan) -> Iterator[str]:
    """Sentences about json members whose fields nobody will see, and texts with bytes that are none."""
    for extension, what in _CONSEQUENCES.items():
        members = [sample.members[extension] for sample in samples if extension in sample.members]
        bad = [member.name for member in members if found.seen.get(member.offset) == _UNREADABLE]
        if bad:
            yield f"{len(bad)} {extension} members, first {bad[0][:80]!r}, are {what}"


def look(name: str, member: MemberBytes) -> Any:
    """What the index keeps of a member: fields of the json, height and width, whether a text is blank."""
    extension = split_name(name)[1]
    if extension in ("txt", "caption"):
        text = member.read(0, TEXT_BYTES)
        return is_blank(text) or (_UNREADABLE if is_damaged(text) else None)
    if extension == "json":
        record = parse_record(member.read(0, MAX_JSON + 1))
        return _UNREADABLE if record is None else record
    return size_of(member.read, member.size) if _is_picture(extension) else None


def _is_picture(extension: str) -> bool:
    """Whether a member may be the picture: `jpg`, `original.jpg`, maps too."""
    return extension.rpartition(".")[2] in IMAGE_EXTENSIONS


def _record(sample: Sample, found: TarScan) -> dict[str, Any]:
    known = found.seen.get(sample.members["json"].offset) if "json" in sample.members else None
    return dict(known) if isinstance(known, dict) else {}


def _add_columns(index: ShardIndex, records: Sequence[dict[str, Any]], *, parquet: bool = False) -> None:
    """Keep the fields of the json (or parquet) as numbers and texts, hashes for removal lists.

    What is too long or too varied is omitted: a filter reads it from each json. The parquet is not there
    while training, so of its columns more is kept: numbers that are spelled as texts, and where a value was.
    """
    omitted = list(index.omitted)
    for name in sorted({name for record in records for name in record}):
        raw = [record.get(name) for record in records]
        if is_identity(name):
            hashed = [0 if v is None else hash_identity(identity_text(name, v)) for v in raw]
            index.hashes[name] = np.asarray(hashed, np.uint64)
        values = [plain(v) for v in raw]
        if parquet:
            values = _keepable(name, values)
        words = {v for v in values if isinstance(v, str)}
        numeric = any(isinstance(v, float) for v in values)
        if not parquet and (OTHER in values or (words and not _fit(name, words, values))):
            omitted.append(name)
            continue
        if numeric:
            numbers = [v if isinstance(v, float) else math.nan for v in values]
            index.numbers[name] = np.asarray(numbers, np.float64)
        if words or OTHER in values or not numeric:
            index.words[name] = sorted(words)
            place: dict[Any, int] = {word: i for i, word in enumerate(index.words[name])} | {OTHER: -2}
            codes = [-1 if v is None or isinstance(v, float) else place[v] for v in values]
            index.codes[name] = np.asarray(codes, np.int16)
    index.omitted = tuple(omitted)


def _fit(name: str, words: set[str], values: Sequence[Any]) -> bool:
    """Whether the texts of a column are few and short enough to be kept."""
    present = sum(v is not None for v in values)
    few = len(words) <= min(_MAX_WORDS, max(8, present // 4)) and not is_identity(name)
    return few and all(len(word) <= _MAX_WORD for word in words)


def _keepable(name: str, values: list[Any]) -> list[Any]:
    """Values of a parquet column with the texts that do not fit as the number that they spell, or OTHER."""
    if _fit(name, {v for v in values if isinstance(v, str)}, values):
        return values
    spelled = [spelled_number(v) if isinstance(v, str) else v for v in values]
    return [OTHER if s is None and v is not None else s for s, v in zip(spelled, values, strict=True)]


def _add_parquet(index: ShardIndex, shard: ListedFile, counts: Counter[str]) -> bool:
    """Use the parquet beside the tar: columns that the json lacks, and rows without members.

    Returns whether it has a value that no json has.
    """
    url = parquet_of(shard.url)
    counts["requests"] += 1
    try:
        raw, edition = read_with_edition(url)
    except (NotFound, AccessDenied):
        index.beside = NO_PARQUET
        return False  # plain webdataset shards have none, which S3 may tell by refusing
    counts["bytes"] += len(raw)
    index.beside = edition_text(edition)
    try:
        table = read_table(raw)
        keys = [key.decode() for key in index.keys]
        rows = rows_by_key(table[KEY], keys)
    except DataError as error:
        index.problems += (f"parquet {name_of(url)} {error}",)
        return False
    except Exception as error:  # noqa: BLE001 - pyarrow raises many types for damaged files
        index.problems += (f"parquet {name_of(url)} is not readable: {str(error)[:120]}",)
        return False
    index.missing_rows = len(rows.keys() - set(keys))
    if len(rows) < len(table[KEY]):
        again = len(table[KEY]) - len(rows)
        index.problems += (f"{again} rows of {name_of(url)} have the key of another, and the last counts",)
    strangers = sum(key not in rows for key in keys)
    if strangers:
        index.problems += (f"{strangers} samples have no row in {name_of(url)}",)
    empty = {name for name, words in index.words.items() if not words}
    have = {*index.numbers, *index.codes, *index.hashes, *index.omitted} - empty
    extra = [name for name in table if name not in have]
    if not extra or not keys:
        return False
    records = [{n: table[n][rows[k]] for n in extra} if k in rows else {} for k in keys]
    _add_columns(index, records, parquet=True)
    return any(plain(value) is not None for record in records for value in record.values())
