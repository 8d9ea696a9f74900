"""The manifest of a shard set: one row per shard, with what is needed before any index is read.

How many samples (the order), their aspects (the buckets), and name and checksum of the index file. So a set
of 200,000 shards is opened by reading one file, and the index of a shard is read when a lane comes to it.
"""

from __future__ import annotations

import gzip
import hashlib
import json
from dataclasses import dataclass, field

import numpy as np

from data_pipeline.errors import DataError, NotFound
from data_pipeline.order.buckets import aspect_histogram
from data_pipeline.shards.index import DAMAGE, VERSION, ShardIndex, decode_index
from data_pipeline.storage.files import read_bytes, write_bytes
from data_pipeline.storage.urls import join, name_of

MANIFEST = "manifest.jsonl.gz"
_MAX_MEMBERS = 64


@dataclass(frozen=True)
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
    """Filter columns of the shard and their COLUMN_KINDS."""
    members: tuple[str, ...] = ()
    """Extensions that occur, the most frequent first."""
    apart: int = 0
    """Samples whose members lie apart."""

    @property
    def is_bad(self) -> bool:
        """Whether the shard is no tar; the only problem says why, and there is no index file."""
        return not self.index


def index_name(shard: str) -> str:
    """File name of the index of a shard."""
    digest = hashlib.sha256(shard.encode()).hexdigest()[:10]
    return f"{name_of(shard).removesuffix('.tar')}-{digest}.npz"


def row_of(index: ShardIndex, encoded: bytes) -> ManifestRow:
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
    )


def decode_listed(data: bytes, url: str, checksum: str) -> ShardIndex:
    """The index file at `url`, of the manifest's checksum. Raises DataError for another one."""
    if hashlib.sha256(data).hexdigest() != checksum:
        raise DataError(f"The index {url} does not match its manifest; run `ldm data index` again.")
    return decode_index(data, url)


def bad_row(shard: str, size: int, version: str, why: str) -> ManifestRow:
    """Manifest row of a shard that is no tar."""
    return ManifestRow(shard, size, version, samples=0, bytes=0, index="", checksum="", problems=(why,))


def read_manifest(folder: str) -> dict[str, ManifestRow]:
    """Manifest rows by shard URL; empty when there is none of this version. Raises DataError when damaged."""
    url = join(folder, MANIFEST)
    try:
        raw = read_bytes(url)
    except NotFound:
        return {}
    try:
        lines = gzip.decompress(raw).decode().splitlines()
        head = json.loads(lines[0])
        if head["format"] != VERSION:
            return {}  # an older index is read anew
        body = "\n".join(lines[1:])
        if hashlib.sha256(body.encode()).hexdigest() != head["checksum"]:
            raise ValueError("checksum")
        # Rows name their set of columns by its place in the head: a million shards share a few objects.
        sets = [{str(k): str(v) for k, v in c.items()} for c in head["columns"]]
        members = [tuple(str(e) for e in extensions) for extensions in head["members"]]
        rows = [json.loads(line) for line in lines[1:]]
        for row in rows:
            row["problems"] = tuple(row["problems"])
            row["columns"] = sets[row["columns"]]
            row["members"] = members[row["members"]]
        return {row["shard"]: ManifestRow(**row) for row in rows}
    except DAMAGE as error:
        raise DataError(
            f"The manifest {url} is damaged or of another version ({error}); delete it and run "
            "`ldm data index` again."
        ) from error


def write_manifest(folder: str, rows: dict[str, ManifestRow]) -> None:
    """Write the manifest, with a checksum over its rows."""
    sets: dict[tuple[tuple[str, str], ...], int] = {}
    members: dict[tuple[str, ...], int] = {}
    lines = []
    for shard in sorted(rows):
        changed = {
            "problems": list(rows[shard].problems),
            "columns": sets.setdefault(tuple(sorted(rows[shard].columns.items())), len(sets)),
            "members": members.setdefault(rows[shard].members, len(members)),
        }
        lines.append(json.dumps({**vars(rows[shard]), **changed}))
    body = "\n".join(lines)
    digest = hashlib.sha256(body.encode()).hexdigest()
    head = {"format": VERSION, "shards": len(rows), "checksum": digest}
    head |= {"columns": [dict(s) for s in sets], "members": list(members)}
    data = gzip.compress((json.dumps(head) + "\n" + body).encode(), mtime=0)
    write_bytes(join(folder, MANIFEST), data)
