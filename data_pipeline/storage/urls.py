"""Files at any fsspec URL: filesystems from the environment, listing, ranges, clear errors."""

from __future__ import annotations

import itertools
import os
import re
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import fsspec

from data_pipeline.errors import (
    AccessDenied,
    DataError,
    MissingBucket,
    NoShards,
    Unreachable,
)
from data_pipeline.storage.retry import is_transient, with_retries

_SCHEMES = ("file", "s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "http", "https", "memory")
_MAX_EXPANSION = 10_000_000
_CONNECT_TIMEOUT_S = 5.0
_CONNECTIONS = 64
_CONNECTING = threading.Lock()
_S3_ENVIRONMENT = (
    "AWS_ENDPOINT_URL_S3",
    "AWS_ENDPOINT_URL",
    "AWS_REGION",
    "AWS_DEFAULT_REGION",
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
)


@dataclass(frozen=True)
class StoredFile:
    """One object as listed."""

    url: str
    """Full URL."""
    size: int
    """Bytes."""
    version: str
    """ETag or modification time: changes when the content does."""


def scheme_of(url: str) -> str:
    """Scheme of a URL, `file` for a plain path. Raises DataError for those we refuse.

    `pipe:` and other URLs that would start a program are never opened.
    """
    match = re.match(r"^([A-Za-z][A-Za-z0-9+.-]+):", url)
    scheme = match.group(1).lower() if match else "file"
    if scheme not in _SCHEMES or "|" in url or "::" in url:
        raise DataError(
            f"{url!r} is not a URL this project opens; use a path or one of "
            f"{', '.join(s + '://' for s in _SCHEMES)}."
        )
    return scheme


def filesystem(url: str, *, timeout_s: float = 30.0) -> tuple[Any, str]:
    """fsspec filesystem of a URL and the path inside it; connections are shared per process.

    S3 reads AWS_ENDPOINT_URL, AWS_REGION (or AWS_DEFAULT_REGION) and the credentials from the
    environment. Retries are ours (see `with_retries`), not those of the client library.
    """
    scheme = scheme_of(url)
    if scheme in ("s3", "s3a"):
        environment = tuple(os.environ.get(name) for name in _S3_ENVIRONMENT)
        with _CONNECTING:
            fs = _s3_filesystem(environment, timeout_s, os.getpid())
        return fs, fs._strip_protocol(url)
    if scheme == "file":
        fs = fsspec.filesystem("file", auto_mkdir=True)
        return fs, fs._strip_protocol(os.path.expanduser(url))
    return fsspec.core.url_to_fs(url)


@lru_cache(maxsize=8)
def _s3_filesystem(environment: tuple[str | None, ...], timeout_s: float, process: int) -> Any:
    """One client for all threads of a process; fsspec's own cache would make one per thread."""
    del process
    service_endpoint, endpoint, region, default_region, key, secret, token = environment
    fs = fsspec.filesystem(
        "s3",
        endpoint_url=service_endpoint or endpoint,
        key=key,
        secret=secret,
        token=token,
        client_kwargs={"region_name": region or default_region} if region or default_region else {},
        config_kwargs={
            "connect_timeout": _CONNECT_TIMEOUT_S,
            "read_timeout": timeout_s,
            "max_pool_connections": _CONNECTIONS,
            "retries": {"max_attempts": 0},
            # some servers send the whole object's checksum with a range of it
            "response_checksum_validation": "when_required",
            "request_checksum_calculation": "when_required",
        },
        use_listings_cache=False,
    )
    fs.retries = 1
    # create the client here, once: s3fs would do it in every request that finds none yet
    fs.connect()
    return fs


def join(folder: str, *names: str) -> str:
    """URL of a name inside a folder URL."""
    return "/".join([folder.rstrip("/"), *names])


def parent(url: str) -> str:
    """URL of the folder that holds `url`."""
    head = url.rstrip("/").rpartition("/")[0]
    return head or "."


def name_of(url: str) -> str:
    """Last part of a URL."""
    return url.rstrip("/").rpartition("/")[2]


def distinguishing_depth(urls: Sequence[str]) -> int:
    """How many last parts tell these URLs apart: 1 unless two folders hold files of the same name."""
    distinct = [url.split("/") for url in set(urls)]
    depth = 1
    while len({tuple(parts[-depth:]) for parts in distinct}) < len(distinct):
        depth += 1
    return depth


def shard_name(url: str, depth: int) -> str:
    """The last `depth` parts of a shard's URL, without `.tar`."""
    return "/".join(url.split("/")[-depth:]).removesuffix(".tar")


def shard_names(url: str) -> list[str]:
    """Every name that some set of shards may give this one (see `distinguishing_depth`), shortest first."""
    return [shard_name(url, depth) for depth in range(1, url.count("/") + 2)]


def expand_braces(url: str) -> list[str]:
    """Expand `{00000..00009}` and `{a,b}`; zero padding is kept. Raises DataError for a bad range."""
    match = re.search(r"\{([^{}]*)\}", url)
    if match is None:
        return [url]
    inner = match.group(1)
    span = re.fullmatch(r"(\d+)\.\.(\d+)", inner)
    if span:
        first, last = int(span.group(1)), int(span.group(2))
        if last < first or last - first > _MAX_EXPANSION:
            raise DataError(f"The range {{{inner}}} in {url!r} is empty or too long; write {{first..last}}.")
        width = len(span.group(1))
        choices = [f"{i:0{width}d}" for i in range(first, last + 1)]
    else:
        choices = inner.split(",")
    head, tails = url[: match.start()], expand_braces(url[match.end() :])
    return [head + choice + tail for choice, tail in itertools.product(choices, tails)]


def list_files(url: str, *, timeout_s: float = 30.0) -> list[StoredFile]:
    """Files behind a URL with braces or wildcards, sorted by URL; a folder means its `*.tar`.

    Raises NoShards, MissingBucket, AccessDenied or Unreachable, within seconds.
    """
    if not url:
        raise NoShards("data.shards is empty; set it to a URL such as s3://bucket/{00000..00099}.tar")
    if "{" in url and not any(c in url for c in "*?["):
        return _list_named(url, expand_braces(url), timeout_s)
    found: list[StoredFile] = []
    for pattern in expand_braces(url):
        if not any(c in pattern for c in "*?[") and not pattern.endswith(".tar"):
            pattern = join(pattern, "*.tar")
        fs, path = filesystem(pattern, timeout_s=timeout_s)
        listing = guarded(lambda fs=fs, path=path: fs.glob(path, detail=True), pattern)
        found += [_stored(pattern, info) for info in listing.values() if info["type"] == "file"]
    if not found:
        _check_bucket(url, timeout_s)
        raise NoShards(f"No shard matches {url}; list the folder, or correct data.shards.")
    return sorted(found, key=lambda f: f.url)


def _list_named(url: str, names: list[str], timeout_s: float) -> list[StoredFile]:
    folders: dict[str, dict[str, StoredFile]] = {}
    for folder in sorted({parent(name) for name in names}):
        fs, path = filesystem(folder, timeout_s=timeout_s)
        try:
            listing = guarded(lambda fs=fs, path=path: fs.ls(path, detail=True), folder)
        except NoShards:
            listing = []
        folders[folder] = {}
        for info in listing:
            stored = _stored(folder, info)
            folders[folder][name_of(stored.url)] = stored
    missing = [name for name in names if name_of(name) not in folders[parent(name)]]
    if missing:
        _check_bucket(url, timeout_s)
        raise NoShards(
            f"{len(missing)} of the {len(names)} shards of {url} do not exist, the first is "
            f"{missing[0]}; correct data.shards or upload them."
        )
    return sorted((folders[parent(n)][name_of(n)] for n in names), key=lambda f: f.url)


def _stored(pattern: str, info: dict[str, Any]) -> StoredFile:
    match = re.match(r"^([A-Za-z][A-Za-z0-9+.-]+)://", pattern)
    path = info["name"]
    url = path if match is None or path.startswith(match.group(0)) else match.group(0) + path
    tag = str(info.get("ETag") or info.get("etag") or "").strip('"')  # some servers send an empty one
    version = tag or info.get("mtime") or info.get("LastModified")
    return StoredFile(url, int(info["size"] or 0), str(version))


def _check_bucket(url: str, timeout_s: float) -> None:
    if scheme_of(url) not in ("s3", "s3a"):
        return
    fs, path = filesystem(url, timeout_s=timeout_s)
    bucket = path.split("/", 1)[0]
    try:
        guarded(lambda: fs.call_s3("list_objects_v2", Bucket=bucket, MaxKeys=1), f"s3://{bucket}")
    except NoShards:
        raise _missing_bucket(bucket) from None


def _missing_bucket(bucket: str) -> MissingBucket:
    return MissingBucket(
        f"The bucket {bucket!r} does not exist at this endpoint; create it or correct the URL "
        "(AWS_ENDPOINT_URL chooses the endpoint)."
    )


def guarded(action: Any, url: str, *, tries: int = 2) -> Any:
    """Run a storage call with a quick retry; translate its failure into a DataError."""
    try:
        return with_retries(action, tries=tries)
    except DataError:
        raise
    except Exception as error:
        raise explain(error, url) from error


def explain(error: BaseException, url: str) -> DataError:
    """The DataError, with its remedy, that a storage library's exception amounts to."""
    text = f"{type(error).__name__}: {error}"
    if "NoSuchBucket" in text or "bucket does not exist" in text:
        return _missing_bucket(url.partition("://")[2].split("/", 1)[0])
    if isinstance(error, PermissionError) or re.search(
        r"NoCredentials|PartialCredentials|InvalidAccessKey|SignatureDoesNotMatch|AccessDenied|Forbidden",
        text,
    ):
        return AccessDenied(
            f"Access to {url} is denied; check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY ({_short(text)})."
        )
    if isinstance(error, FileNotFoundError):
        return NoShards(f"{url} does not exist; check the URL.")
    if is_transient(error):
        return Unreachable(
            f"{url} cannot be reached; check the network and AWS_ENDPOINT_URL ({_short(text)})."
        )
    return DataError(f"{url} cannot be read ({_short(text)}); check the URL and its permissions.")


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 160 else line[:157] + "..."


def read_bytes(url: str, *, timeout_s: float = 30.0, tries: int = 5) -> bytes:
    """Whole content of a small file."""
    fs, path = filesystem(url, timeout_s=timeout_s)
    return bytes(guarded(lambda: fs.cat_file(path), url, tries=tries))


def write_bytes(url: str, data: bytes, *, tries: int = 5) -> None:
    """Write a small file; on a local disk through a temporary name, so that no torn file is seen."""
    fs, path = filesystem(url)
    if scheme_of(url) == "file":
        temporary = f"{path}.{os.getpid()}.part"
        fs.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        with open(temporary, "wb") as f:
            f.write(data)
        os.replace(temporary, path)
        return
    guarded(lambda: fs.pipe_file(path, data), url, tries=tries)


def exists(url: str) -> bool:
    """Whether a file is there."""
    fs, path = filesystem(url)
    return bool(guarded(lambda: fs.exists(path), url))
