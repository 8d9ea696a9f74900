"""Parts of the cache: ordinary tars of entries, written whole, each with the table that commits it.

    CACHE/<stage>/stage.json                         what the first stage was, and that all this is ours
    CACHE/<stage>/parts/<part>.tar                   some hundred entries, neighbours of a shard side by side
    CACHE/<stage>/parts/<part>.json                  what it holds: the commit
    CACHE/<stage>/shards/<shard>/<part>.json         the rows of one source shard, which a lane reads at once
    CACHE/<stage>/shards/<shard>/<part>.bad          they were found damaged: never looked at again

They are written in this order. A tar without its table was interrupted and is nobody's; a row that is not
below `shards/` is not found, and its picture is encoded again. Names of parts begin with the time and end at
random, so any number of ranks and runs may write. Tables carry their own checksum and that of every entry.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import tarfile
import time
import uuid
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from data_pipeline.errors import DataError, NotFound
from data_pipeline.moments.entry import SUFFIX, Label, digest
from data_pipeline.storage.files import exists, list_names, list_sizes, read_bytes, write_bytes
from data_pipeline.storage.large import write_stream
from data_pipeline.storage.urls import join

logger = logging.getLogger(__name__)

FORMAT = 1
STAGE, PARTS, SHARDS = "stage.json", "parts", "shards"
_TRIES = 5
_NAME = re.compile(r"[0-9a-f]{16}-[0-9a-f]{12}")


class DamagedTable(DataError):
    """A table is not what was written."""


@dataclass(frozen=True)
class Row:
    """One entry of a part."""

    key: str
    offset: int
    """First byte of the entry in the tar."""
    size: int
    check: int
    sample: str
    identities: tuple[int, ...] = ()
    members: tuple[str, ...] = ()
    """Extensions of what the entry holds beside the moments."""


@dataclass(frozen=True)
class Table:
    """What a part holds, all of it or what is of one source shard."""

    part: str
    size: int
    """Bytes of the tar."""
    rows: dict[str, tuple[Row, ...]]
    """By URL of the source shard."""

    def encode(self) -> bytes:
        """A line with the checksum of the rest, then JSON."""
        rows = {shard: [asdict(row) for row in rows] for shard, rows in self.rows.items()}
        told = {"format": FORMAT, "part": self.part, "size": self.size, "rows": rows}
        body = json.dumps(told).encode()
        return hashlib.sha256(body).hexdigest().encode() + b"\n" + body


def read_table(url: str) -> Table:
    """A table as it was written. Raises DamagedTable for anything else, and what reading raises."""
    head, _, body = read_bytes(url).partition(b"\n")
    try:
        if hashlib.sha256(body).hexdigest().encode() != head:
            raise ValueError("its checksum differs")
        told = json.loads(body)
        if told["format"] != FORMAT:
            raise ValueError(f"format {told['format']}")
        return Table(
            told["part"],
            told["size"],
            {shard: tuple(_row(row) for row in rows) for shard, rows in told["rows"].items()},
        )
    except (ValueError, LookupError, TypeError) as error:
        raise DamagedTable(f"The table {url} is damaged ({error}).") from error


def whole_table(url: str) -> Table | None:
    """The same; None where it is gone, or damaged, which is said."""
    try:
        return read_table(url)
    except NotFound:
        return None
    except DamagedTable as error:
        logger.warning("%s What it tells of is encoded again.", error)
        return None


def _row(told: dict[str, Any]) -> Row:
    return Row(**{**told, "identities": tuple(told["identities"]), "members": tuple(told["members"])})


def part_url(folder: str, part: str) -> str:
    """The tar of a part."""
    return join(folder, PARTS, f"{part}.tar")


def shard_folder(folder: str, shard: str) -> str:
    """Where the rows of one source shard are told."""
    return join(folder, SHARDS, hashlib.blake2b(shard.encode(), digest_size=10).hexdigest())


def new_part() -> str:
    """A name that nobody else has; later ones sort behind earlier ones."""
    return f"{time.time_ns():016x}-{uuid.uuid4().hex[:12]}"


def part_of(name: str) -> str | None:
    """The part that a file below `parts/` is of, whole or cut short; None for one that is not ours."""
    part = name.partition(".")[0]
    return part if _NAME.fullmatch(part) else None


def written_s(part: str) -> float:
    """When a part was named, in seconds since 1970."""
    return int(part.partition("-")[0], 16) / 1e9


def stage_folders(cache: str) -> list[str]:
    """URLs of what a cache folder holds for each first stage; anything else in it is not ours."""
    folders = [join(cache, name) for name in list_names(cache)]
    return [folder for folder in folders if exists(join(folder, STAGE))]


def taken_bytes(cache: str) -> int:
    """Size of the tars of all stages in a cache folder."""
    listed = [list_sizes(join(folder, PARTS)) for folder in stage_folders(cache)]
    ours = {name: size for sizes in listed for name, size in sizes.items() if part_of(name)}
    return sum(size for name, size in ours.items() if name.endswith(".tar"))


def commit_part(folder: str, entries: Sequence[tuple[Label, bytes]], *, tries: int = _TRIES) -> Table:
    """Write entries as one part, complete or not at all.

    Raises:
        UserError, RetryableFault: storage does not take it; what of it may lie there is nobody's.
    """
    part = new_part()
    ordered = sorted(entries, key=lambda entry: (entry[0].shard, entry[0].first, entry[0].key))
    pieces: list[bytes] = []
    rows: dict[str, list[Row]] = {}
    place = 0  # in the tar
    for label, data in ordered:
        header = _header(label.key + SUFFIX, len(data))
        place += len(header)
        rows.setdefault(label.shard, []).append(
            Row(
                *(label.key, place, len(data), digest(data), label.sample, label.identities),
                tuple(member.extension for member in label.members),
            )
        )
        padding = bytes(-len(data) % tarfile.BLOCKSIZE)
        pieces += [header, data, padding]
        place += len(data) + len(padding)
    pieces.append(bytes(2 * tarfile.BLOCKSIZE))
    table = Table(part, place + 2 * tarfile.BLOCKSIZE, {shard: tuple(each) for shard, each in rows.items()})
    joined = b"".join(pieces)
    write_stream(part_url(folder, part), lambda: [memoryview(joined)], tries=tries)
    write_bytes(join(folder, PARTS, f"{part}.json"), table.encode(), tries=tries)
    for shard, each in table.rows.items():
        told = Table(part, table.size, {shard: each})
        write_bytes(join(shard_folder(folder, shard), f"{part}.json"), told.encode(), tries=tries)
    return table


def _header(name: str, size: int) -> bytes:
    info = tarfile.TarInfo(name)
    info.size = size
    return info.tobuf(tarfile.USTAR_FORMAT)
