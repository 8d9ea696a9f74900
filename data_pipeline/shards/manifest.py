"""The manifest of a shard set: one row per shard, with what is needed before any index is read.

How many samples (the order), their aspects (the buckets), and name and checksum of the index file. So a set
of 200,000 shards is opened by reading one file, and the index of a shard is read when a lane comes to it.

    _index/manifest.jsonl.gz                     all rows of the last build that came to its end
    _index/parts/<time>-<time>-<random>.jsonl.gz rows since then, a part every 30 s; the newest row counts
    _index/00000-<digest>.npz                    the index of one shard

Whoever reads takes all of them together, so nothing is lost when a build is killed, several may write at a
time, and what a build has to save does not grow with what is there. Its end makes one file of them again:

    reader, merger     lists parts     reads them          reads the manifest
    merger                                                                     writes it     removes old parts

What a reader finds gone from the parts is in the manifest by the time it reads that. A merger may write over
what another one has just written, without the parts that it had not listed yet; these are there still, for
only those are removed that were written long before.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import logging
import time
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields, replace
from typing import NamedTuple

import numpy as np

from data_pipeline.errors import AccessDenied, DataError, Failure, NotFound
from data_pipeline.order.buckets import aspect_histogram
from data_pipeline.shards.index import DAMAGE, VERSION, ShardIndex, decode_index
from data_pipeline.storage.files import list_names, read_bytes, remove_file, remove_names, write_bytes
from data_pipeline.storage.retry import QUICK_TRIES
from data_pipeline.storage.urls import is_http, join, name_of

logger = logging.getLogger(__name__)

MANIFEST = "manifest.jsonl.gz"
PARTS = "parts"
_READ_BYTES = 1 << 20
_READERS = 16
_ROUNDS = 5
"""Listings of the parts, as long as some are gone before they are read."""
_SETTLED_S = 3600.0
"""Age at which a part may be removed: who merges without having seen it has long written its manifest."""
_MANY_PARTS = 64
_REMOVED_AT_ONCE = 1000
_LEVEL = 3
"""Of compression: level 9 takes ten times as long for a tenth less."""
_MAX_MEMBERS = 64


class Former(NamedTuple):
    """What a shard was before it was replaced: orders of runs that have begun count it so."""

    size: int
    samples: int
    until: float
    """When the build began that met another, in seconds since 1970."""


@dataclass(frozen=True, slots=True)
class ManifestRow:
    """One indexed shard."""

    shard: str
    """URL of the tar."""
    size: int
    version: str
    """ETag or modification time when it was indexed."""
    samples: int
    """Raw samples."""
    bytes: int
    """Bytes of all members."""
    index: str
    """Name of the index file in the index folder."""
    checksum: str
    """SHA-256 of the index file."""
    problems: tuple[str, ...] = ()
    missing_rows: int = 0
    aspects: dict[str, int] = field(default_factory=dict)
    """Pictures by aspect ratio, also those of samples with several."""
    columns: dict[str, str] = field(default_factory=dict)
    """Filter columns of the shard, and what their values are (`ShardIndex.column_kinds`)."""
    members: tuple[str, ...] = ()
    """Extensions that occur, the most frequent first."""
    apart: int = 0
    """Samples whose members lie apart."""
    beside: str = ""
    """The parquet that was beside the tar (`ShardIndex.beside`); "": nobody has noted it."""
    former: tuple[Former, ...] = ()
    """What the shard was, where it had another size or number of samples, the oldest first."""

    @property
    def is_bad(self) -> bool:
        """Whether the shard is no tar; the only problem says why, and there is no index file."""
        return not self.index


def index_name(shard: str) -> str:
    """File name of the index of a shard."""
    digest = hashlib.sha256(shard.encode()).hexdigest()[:10]
    return f"{name_of(shard).removesuffix('.tar')}-{digest}.npz"


def store_index(folder: str, index: ShardIndex) -> ManifestRow:
    """Write the index file of a shard; its row is the caller's to add to the manifest."""
    encoded = index.encode()
    write_bytes(join(folder, index_name(index.shard)), encoded)
    return _row_of(index, encoded)


def _row_of(index: ShardIndex, encoded: bytes) -> ManifestRow:
    """Manifest row of an index and its encoded form."""
    frequent = sorted(index.extensions, key=lambda e: -int((index.extents(e)[0] >= 0).sum()))
    sizes = np.concatenate([np.zeros((2, 0), np.uint32), *index.pictures.values()], axis=1)
    heights, widths = sizes[:, (sizes > 0).all(axis=0)].astype(np.float64)
    return ManifestRow(
        shard=index.shard,
        size=index.size,
        version=index.version,
        samples=len(index),
        bytes=int(index.sizes.sum(dtype=np.int64)),
        index=index_name(index.shard),
        checksum=hashlib.sha256(encoded).hexdigest(),
        problems=index.problems,
        missing_rows=index.missing_rows,
        aspects=aspect_histogram(heights, widths),
        columns=index.column_kinds(),
        members=tuple(frequent[:_MAX_MEMBERS]),
        apart=index.apart,
        beside=index.beside,
    )


def decode_listed(data: bytes, url: str, checksum: str) -> ShardIndex:
    """The index file at `url`, of the manifest's checksum. Raises DataError for another one."""
    if hashlib.sha256(data).hexdigest() != checksum:
        raise DataError(
            f"The index {url} does not match its manifest; delete it and run `ldm data index` again, or, if "
            "that has just been done, start the run again: it goes on with the new one."
        )
    return decode_index(data, url)


def bad_row(shard: str, size: int, version: str, why: str) -> ManifestRow:
    """Manifest row of a shard that is no tar."""
    return ManifestRow(shard, size, version, samples=0, bytes=0, index="", checksum="", problems=(why,))


def succeeding(row: ManifestRow, known: ManifestRow | None, now: float) -> ManifestRow:
    """A new row of a shard that was `known` until `now`, seconds since 1970."""
    if known is None:
        return row
    former = known.former
    in_orders = bool(known.former) or not known.is_bad
    if in_orders and (known.size, known.samples) != (row.size, row.samples):
        former = (*former, Former(known.size, known.samples, now))
    return replace(row, former=former)


def read_manifest(folder: str) -> dict[str, ManifestRow]:
    """Manifest rows by shard URL; empty when there is none of this version. Raises DataError when damaged."""
    return read_parts(folder)[0]


def read_parts(
    folder: str, progress: Callable[[int, int], object] = lambda done, total: None
) -> tuple[dict[str, ManifestRow], list[str]]:
    """The same, and the names of the parts in PARTS among whose rows they are.

    progress: called with the parts that are read and their number
    """
    place, parts = join(folder, PARTS), dict[str, dict[str, ManifestRow]]()
    for _ in range(_ROUNDS):
        names = [name for name in _names_in(place) if name not in parts]
        known = len(parts)
        with ThreadPoolExecutor(_READERS) as pool:
            found = pool.map(lambda name: _read_rows(join(place, name)), names)
            for done, (name, rows) in enumerate(zip(names, found, strict=True), 1):
                if rows is not None:
                    parts[name] = rows
                progress(known + done, known + len(names))
        if parts.keys() >= set(names):
            break
        # What is gone is in the manifest by now, or in a newer part of its writer's.
    whole = _read_rows(join(folder, MANIFEST)) or {}
    for name in sorted(parts):
        whole.update(parts[name])
    return whole, sorted(parts)


def without_file(folder: str, rows: Mapping[str, ManifestRow]) -> set[str]:
    """Shards whose index file is gone from the folder; none where it cannot be listed."""
    names = set(_names_in(folder))
    return {url for url, row in rows.items() if not row.is_bad and row.index not in names} if names else set()


def append_rows(folder: str, rows: Iterable[ManifestRow], *, instead_of: str = "") -> str:
    """Write rows that the manifest does not have yet, or has otherwise, as one part; returns its name.

    instead_of: an earlier part of this writer's, whose rows these are as well; it is removed
    """
    now = f"{time.time_ns():020d}"
    # The newest part wins, by when its first row was written: another writer may have come since. The second
    # time says how old the part is, the rest of the name is for others that write at the same time.
    name = f"{instead_of.partition('-')[0] or now}-{now}-{uuid.uuid4().hex[:8]}.jsonl.gz"
    write_bytes(join(folder, PARTS, name), _encode_rows(rows))
    if instead_of:
        try:
            remove_file(join(folder, PARTS, instead_of), tries=QUICK_TRIES)
        except Failure as error:  # a merger removes it in the end
            logger.debug("%s", error)
    return name


def has_many(parts: Sequence[str]) -> bool:
    """Whether so many parts may be removed that whoever has read them should `merge_parts`."""
    return len(_settled(parts)) > _MANY_PARTS


def merge_parts(
    folder: str,
    rows: Mapping[str, ManifestRow],
    parts: Sequence[str],
    progress: Callable[[int, int], object] = lambda done, total: None,
) -> None:
    """Make `rows` the manifest and remove the old ones of `parts`, both as `read_parts` has just given them.

    progress: called with the parts that are removed and their number
    """
    write_manifest(folder, rows)
    old = _settled(parts)
    for first in range(0, len(old), _REMOVED_AT_ONCE):
        some = old[first : first + _REMOVED_AT_ONCE]
        remove_names(join(folder, PARTS), some, keep_folder=True)  # others write there
        progress(first + len(some), len(old))


def _settled(parts: Sequence[str]) -> list[str]:
    """Those of the parts that are old enough to be removed."""
    return [name for name in parts if time.time() - _written_s(name) > _SETTLED_S]


def _written_s(part: str) -> float:
    """When a part was written, in seconds since 1970; 0 of other names."""
    time_ns = part.rpartition("-")[0].rpartition("-")[2]
    return int(time_ns) / 1e9 if time_ns.isdecimal() else 0.0


def write_manifest(folder: str, rows: Mapping[str, ManifestRow]) -> None:
    """Write the manifest whole, with a checksum over its rows."""
    write_bytes(join(folder, MANIFEST), _encode_rows(rows[shard] for shard in sorted(rows)))


def _names_in(folder: str) -> list[str]:
    if is_http(folder):  # there nobody writes, and nothing can be listed
        return []
    try:
        return list_names(folder)
    except AccessDenied:  # who may read may not always list
        return []


def _read_rows(url: str) -> dict[str, ManifestRow] | None:
    """Rows of a manifest or a part of it, none of an older version's; None when it is not there.

    Some lines at a time: the rows of 200,000 shards are hundreds of megabytes as text.
    """
    try:
        raw = read_bytes(url)
    except NotFound:
        return None
    try:
        with gzip.GzipFile(fileobj=io.BytesIO(raw)) as lines:
            head = json.loads(lines.readline())
            if head["format"] != VERSION:
                return {}  # an older index is read anew
            # Rows name their set of columns by its place in the head: a million shards share a few objects.
            sets = [{str(k): str(v) for k, v in c.items()} for c in head["columns"]]
            members = [tuple(str(e) for e in extensions) for extensions in head["members"]]
            beside: dict[str, str] = head.get("beside", {})
            former: dict[str, list[list[float]]] = head.get("former", {})
            rows, digest = {}, hashlib.sha256()
            while some := lines.readlines(_READ_BYTES):
                text = b"".join(some)
                digest.update(text)
                # Several at a time: what they have in common, such as names of aspects, is then one object.
                for row in json.loads(b"[" + text.rstrip(b"\n").replace(b"\n", b",") + b"]"):
                    row["problems"] = tuple(row["problems"])
                    row["columns"] = sets[row["columns"]]
                    row["members"] = members[row["members"]]
                    row["beside"] = beside.get(row["shard"], "")
                    row["former"] = tuple(
                        Former(int(size), int(samples), until)
                        for size, samples, until in former.get(row["shard"], ())
                    )
                    rows[row["shard"]] = ManifestRow(**row)
        if digest.hexdigest() != head["checksum"]:
            raise ValueError("checksum")
    except DAMAGE as error:
        raise DataError(
            f"The manifest {url} is damaged or of another version ({error}); delete it and run "
            "`ldm data index` again."
        ) from error
    return rows


def _encode_rows(rows: Iterable[ManifestRow]) -> bytes:
    """Compressed lines, the first of which has the checksum of the others and what they share.

    Rows are compressed one by one and the head, known last, goes before them as a gzip member of its own, so
    that the text as a whole never exists.
    """
    sets: dict[tuple[tuple[str, str], ...], int] = {}
    members: dict[tuple[str, ...], int] = {}
    beside: dict[str, str] = {}
    former: dict[str, tuple[Former, ...]] = {}
    digest, number, out = hashlib.sha256(), 0, io.BytesIO()
    with gzip.GzipFile(fileobj=out, mode="wb", compresslevel=_LEVEL, mtime=0) as body:
        for row in rows:
            shared = {
                "columns": sets.setdefault(tuple(sorted(row.columns.items())), len(sets)),
                "members": members.setdefault(row.members, len(members)),
            }
            fields = {name: getattr(row, name) for name in _FIELDS}
            if row.beside:
                beside[row.shard] = row.beside
            if row.former:
                former[row.shard] = row.former
            # Before each but the first: the checksum is of the lines without the last one's end.
            line = (b"\n" if number else b"") + json.dumps({**fields, **shared}).encode()
            digest.update(line)
            body.write(line)
            number += 1
    head = {"format": VERSION, "shards": number, "checksum": digest.hexdigest()}
    head |= {"columns": [dict(s) for s in sets], "members": list(members), "beside": beside}
    head |= {"former": former} if former else {}
    return gzip.compress((json.dumps(head) + "\n").encode(), mtime=0) + out.getvalue()


# Runs of earlier versions, which go on beside this one, refuse a row with a field that they do not know, and
# take no notice of one in the head.
_FIELDS = [field.name for field in fields(ManifestRow) if field.name not in ("beside", "former")]
