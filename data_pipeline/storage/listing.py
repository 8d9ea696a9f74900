"""Which files a URL with braces or wildcards stands for."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from data_pipeline.errors import AccessDenied, Failure, NoShards, NotFound
from data_pipeline.storage.client import filesystem
from data_pipeline.storage.editions import edition_of
from data_pipeline.storage.retry import TRIES, guarded, missing_bucket
from data_pipeline.storage.urls import (
    expand_braces,
    is_http,
    is_s3,
    join,
    literal,
    mistakable,
    name_of,
    parent,
    spelled_out,
)

_MAX_SPANS = 100
_LOOK_UPS = 16
"""Requests at a time where shards are looked up one by one."""
_ARCHIVE = re.compile(r"\.(tar(\.[A-Za-z0-9]+)?|t[gbxz]z2?|tzst)$")
"""How the names of tars end; compressed ones are read in resampled order, and told apart from folders."""


@dataclass(frozen=True)
class ListedFile:
    """One object as listed."""

    url: str
    """Full URL."""
    size: int
    """Bytes."""
    version: str
    """ETag or modification time: changes when the content does."""


def list_files(url: str, *, timeout_s: float = 30.0) -> list[ListedFile]:
    """Files behind a URL with braces or wildcards, sorted by URL; a folder means its `*.tar`.

    Special characters in brackets belong to the name (see `urls.literal`).

    Raises NoShards, MissingBucket, AccessDenied or Unreachable, within seconds.
    """
    if not url:
        raise NoShards("data.shards is empty; set it to a URL such as s3://bucket/{00000..00099}.tar")
    names = spelled_out(url)
    if names is not None:
        return _list_named(url, names, timeout_s)
    found: list[ListedFile] = []
    patterns = expand_braces(url)
    _refuse_mistakable(url, patterns[0], timeout_s)
    for pattern in patterns:
        if literal(pattern) is not None and not _ARCHIVE.search(pattern):
            pattern = join(pattern, "*.tar")
        found += find(pattern, timeout_s=timeout_s)
    if not found:
        _check_bucket(url, timeout_s)
        compressed = find(join(url, "*.t*"), timeout_s=timeout_s) if literal(url) is not None else []
        if compressed and _ARCHIVE.search(compressed[0].url):
            raise NoShards(
                f"No tar is in {url}, but compressed ones are, such as {name_of(compressed[0].url)}; unpack "
                "them (gunzip, unxz, unzstd): places in a compressed archive cannot be read alone."
            )
        brackets = " A [ that belongs to a name is written [[]." if re.search(r"\[[^\]]{2,}\]", url) else ""
        raise NoShards(
            f"No shard matches {url}; list the folder, or correct the name (of a run: data.shards).{brackets}"
        )
    return sorted(found, key=lambda f: f.url)


def find(pattern: str, *, timeout_s: float = 30.0) -> list[ListedFile]:
    """Files that match a pattern with wildcards; none where nothing does."""
    fs, path = filesystem(pattern, timeout_s=timeout_s)
    listing = guarded(lambda: fs.glob(path, detail=True), pattern)
    return [_listed(pattern, info) for info in listing.values() if info["type"] == "file"]


def _refuse_mistakable(url: str, pattern: str, timeout_s: float) -> None:
    """Raise NoShards for a pattern that is also a name: `[1]` would stand for 1, and other shards be read."""
    if (meant := mistakable(pattern)) is None:
        return
    name, written = meant
    fs, path = filesystem(name, timeout_s=timeout_s)
    try:
        there = guarded(lambda: fs.exists(path), name)
    except AccessDenied:  # listing may be allowed all the same
        return
    if there:
        raise NoShards(
            f"In {url} the characters [ and ? are wildcards, but {name} is there by this very name; write "
            f"{written} for it."
        )


def look_up(url: str, *, timeout_s: float = 30.0) -> ListedFile:
    """One file, without a listing. Raises NotFound and the other failures of reading."""

    def once() -> ListedFile:
        fs, path = filesystem(url, timeout_s=timeout_s)
        return _listed(url, fs.info(path))

    return guarded(once, url, tries=TRIES)


def _list_named(url: str, names: Sequence[str], timeout_s: float) -> list[ListedFile]:
    """All of these names, by listings of their folders, or by a request each where there is no listing."""
    if is_http(url):
        return _looked_up(url, names, timeout_s)
    try:
        return _from_listings(url, names, timeout_s)
    except AccessDenied as denied:  # who may read may not always list
        try:
            look_up(names[0], timeout_s=timeout_s)
        except Failure:
            raise denied from None
        return _looked_up(url, names, timeout_s)


def _looked_up(url: str, names: Sequence[str], timeout_s: float) -> list[ListedFile]:
    def one(name: str) -> ListedFile | None:
        try:
            return look_up(name, timeout_s=timeout_s)
        except NotFound:
            return None

    with ThreadPoolExecutor(_LOOK_UPS) as pool:
        found = list(pool.map(one, names))
    missing = [name for name, file in zip(names, found, strict=True) if file is None]
    if missing:
        raise _some_missing(url, missing, names)
    return sorted((file for file in found if file is not None), key=lambda f: f.url)


def _some_missing(url: str, missing: Sequence[str], names: Sequence[str]) -> NoShards:
    return NoShards(
        f"{len(missing)} of the {len(names)} shards of {url} do not exist: {spans(missing, names)}; "
        "correct data.shards or upload them."
    )


def _from_listings(url: str, names: Sequence[str], timeout_s: float) -> list[ListedFile]:
    folders: dict[str, dict[str, ListedFile]] = {}
    for folder in sorted({parent(name) for name in names}):
        folders[folder] = list_folder(folder, timeout_s=timeout_s)
    missing = [name for name in names if name_of(name) not in folders[parent(name)]]
    if missing:
        _check_bucket(url, timeout_s)
        raise _some_missing(url, missing, names)
    return sorted((folders[parent(n)][name_of(n)] for n in names), key=lambda f: f.url)


def list_folder(folder: str, *, timeout_s: float = 30.0) -> dict[str, ListedFile]:
    """What lies directly in a folder, by name; none where there is no folder."""
    fs, path = filesystem(folder, timeout_s=timeout_s)
    try:
        listing = guarded(lambda: fs.ls(path, detail=True), folder)
    except NotFound:
        return {}
    listed = [_listed(folder, info) for info in listing]
    return {name_of(file.url): file for file in listed}


def spans(some: Sequence[str], names: Sequence[str]) -> str:
    """Some of the names, neighbours as one span.

    >>> spans(["s3://b/1.tar", "s3://b/3.tar", "s3://b/4.tar"], [f"s3://b/{i}.tar" for i in range(9)])
    '1.tar, 3.tar to 4.tar'
    """
    place = {name: i for i, name in enumerate(names)}
    runs: list[list[int]] = []  # first and last place of each
    for at in sorted(place[name] for name in some):
        if runs and at == runs[-1][1] + 1:
            runs[-1][1] = at
        else:
            runs.append([at, at])
    short = name_of if len({parent(name) for name in names}) == 1 else str
    told = [" to ".join(short(names[at]) for at in dict.fromkeys(run)) for run in runs[:_MAX_SPANS]]
    return ", ".join(told) + (f" and {len(runs) - _MAX_SPANS} more" if len(runs) > _MAX_SPANS else "")


def _listed(pattern: str, info: dict[str, Any]) -> ListedFile:
    match = re.match(r"^([A-Za-z][A-Za-z0-9+.-]+)://", pattern)
    path = info["name"]
    url = path if match is None or path.startswith(match.group(0)) else match.group(0) + path
    if info.get("islink"):  # listings of folders give the link's own time
        info = {**info, "mtime": os.stat(path).st_mtime}
    edition = edition_of(info, int(info["size"] or 0))
    return ListedFile(url, edition.size, edition.version)


def _check_bucket(url: str, timeout_s: float) -> None:
    if not is_s3(url):
        return
    fs, path = filesystem(url, timeout_s=timeout_s)
    bucket = path.split("/", 1)[0]
    try:
        guarded(lambda: fs.call_s3("list_objects_v2", Bucket=bucket, MaxKeys=1), f"s3://{bucket}")
    except NotFound:
        raise missing_bucket(bucket) from None
