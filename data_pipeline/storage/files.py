"""Files at any URL, whole or by range: read, written so that no torn one is seen, listed, removed."""

from __future__ import annotations

import errno
import io
import os
import re
import shutil
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, cast

from data_pipeline.errors import DataError, NotFound
from data_pipeline.storage.client import filesystem
from data_pipeline.storage.editions import Edition, EditionReader
from data_pipeline.storage.retry import (
    PATIENT_TRIES,
    QUICK_TRIES,
    TRIES,
    ShortBody,
    guarded,
    guarded_change,
    require_range,
    with_retries,
)
from data_pipeline.storage.urls import is_local, is_s3, join, name_of

_CHECK_TRIES = 4
_WHOLE_S = 300.0
"""What a small file may take to come; what does not answer is given up by the client."""
_OBJECTS_PER_REQUEST = 1000  # S3's limit
_ONE_BY_ONE = re.compile(
    r"NotImplemented|not implemented|MethodNotAllowed|\b501\b|\b405\b|not answered|time(d |-)?out",
    re.IGNORECASE,
)
"""Google's and some older servers know no bulk; others never answer one."""
_REMOVALS = 16
"""Requests at a time where files are removed one by one."""
_BLOCK_BYTES = 65_536


def read_bytes(url: str, *, timeout_s: float = 30.0, tries: int = TRIES) -> bytes:
    """Whole content of a small file.

    Raises:
        NotFound, AccessDenied, Unreachable, ...: see `retry.explain`.
    """
    fs, path = filesystem(url, timeout_s=timeout_s)
    return bytes(guarded(lambda: fs.cat_file(path), url, tries=tries))


def read_with_edition(url: str, *, timeout_s: float = 30.0, tries: int = TRIES) -> tuple[bytes, Edition]:
    """The same, and which edition it is of."""
    fs, path = filesystem(url, timeout_s=timeout_s)
    reader, deadline_s = EditionReader(), max(timeout_s, _WHOLE_S)
    return guarded(lambda: reader.begin(fs, path, -1, deadline_s=deadline_s), url, tries=tries)


def read_text(url: str) -> str:
    """The same as UTF-8; line ends as Python's text files give them, no byte-order mark.

    Raises DataError for other bytes, and for zeros, which a text in UTF-16 has between its letters.
    """
    data = read_bytes(url)
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        kind = "in UTF-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else f"not in UTF-8 ({error})"
        raise DataError(f"{url} is a text {kind}; save it as UTF-8.") from error
    if "\0" in text:
        raise DataError(f"{url} holds zero bytes, so it is no text, or one in UTF-16; save it as UTF-8.")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def read_range(url: str, start: int, stop: int, *, timeout_s: float = 30.0, tries: int = TRIES) -> bytes:
    """Bytes [start, stop), all of them."""
    fs, path = filesystem(url, timeout_s=timeout_s)

    def once() -> bytes:
        data = bytes(fs.cat_file(path, start=start, end=stop))
        require_range(url, len(data), stop - start)
        if len(data) != stop - start:
            raise ShortBody(f"short body: {len(data)} of {stop - start} bytes of {url}")
        return data

    return guarded(once, url, tries=tries)


def read_head(url: str, num_bytes: int) -> bytes:
    """The first bytes of a file, all of a shorter one."""
    fs, path = filesystem(url)
    return bytes(guarded(lambda: fs.cat_file(path, start=0, end=num_bytes), url))


def read_tail(url: str, num_bytes: int) -> bytes:
    """The last bytes of a file, all of a shorter one."""
    fs, path = filesystem(url)

    def once() -> bytes:
        return bytes(fs.cat_file(path, start=max(0, int(fs.size(path)) - num_bytes)))

    return guarded(once, url)


def open_stream(url: str, *, timeout_s: float = 30.0) -> BinaryIO:
    """A file to be read from its beginning to its end, larger than memory may be."""
    fs, path = filesystem(url, timeout_s=timeout_s)
    return cast(BinaryIO, guarded(lambda: fs.open(path, "rb"), url, tries=TRIES))


def write_bytes(url: str, data: bytes, *, tries: int = TRIES) -> None:
    """Write a small file, its folder too; on a local disk it appears under its name when it is whole."""
    fs, path = filesystem(url)

    def once() -> None:
        if not is_local(url):
            fs.pipe_file(path, data)
            return
        if os.path.isdir(path):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
        temporary = f"{path}.{os.getpid()}.{threading.get_ident()}.part"
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        with open(temporary, "wb") as file:
            file.write(data)
        os.replace(temporary, path)

    guarded_change(once, url, done="written", tries=tries)


def exists(url: str) -> bool:
    """Whether a file is there."""
    fs, path = filesystem(url)
    return bool(guarded(lambda: fs.exists(path), url))


def modified_at(url: str) -> float:
    """When a file was written, in seconds since 1970 by the storage's clock. Raises as `read_bytes`."""
    fs, path = filesystem(url)
    return float(guarded(lambda: fs.modified(path), url).timestamp())


def list_names(url: str, *, tries: int = QUICK_TRIES) -> list[str]:
    """Names directly inside a folder, sorted; none when there is no folder."""
    fs, path = filesystem(url)
    try:
        found = guarded(lambda: fs.ls(path, detail=False), url, tries=tries)
    except NotFound:
        return []
    return sorted(name_of(name) for name in found if name.rstrip("/") != path)


def list_sizes(url: str, *, tries: int = QUICK_TRIES) -> dict[str, int]:
    """Bytes of every file directly inside a folder, by name; none when there is no folder."""
    fs, path = filesystem(url)
    try:
        found = guarded(lambda: fs.ls(path, detail=True), url, tries=tries)
    except NotFound:
        return {}
    return {name_of(info["name"]): int(info["size"] or 0) for info in found if info["type"] == "file"}


def remove_file(url: str, *, tries: int = PATIENT_TRIES) -> None:
    """Remove a file; quiet when it is not there."""
    fs, path = filesystem(url)

    def once() -> None:
        with suppress(FileNotFoundError):
            fs.rm_file(path)

    guarded_change(once, url, done="removed", tries=tries)


def remove(url: str, *, tries: int = PATIENT_TRIES) -> None:
    """Remove a folder with what is in it, or a file; quiet when it is not there.

    The name is taken as it is: fsspec's own `rm` would take a `*` or `[` in it for a pattern.
    """
    fs, path = filesystem(url)

    def once() -> None:
        if is_local(url):
            with suppress(FileNotFoundError):
                if os.path.isdir(path) and not os.path.islink(path):
                    shutil.rmtree(path)
                else:
                    os.remove(path)
            return
        names = _tree(fs, url, path)
        _remove_each(fs, url, [f"{path}/{name}" for name in names])
        if not names:
            with suppress(FileNotFoundError):
                if fs.isfile(path):
                    _remove_each(fs, url, [path])

    guarded_change(once, url, done="removed", tries=tries)


def list_tree(folder: str, *, tries: int = QUICK_TRIES) -> list[str]:
    """Names of all files below a folder, at any depth, relative to it; none when there is no folder.

    On S3 an object whose name ends in a slash, by which some tools mark a folder, is one of them.
    """
    fs, path = filesystem(folder)
    return sorted(guarded(lambda: _tree(fs, folder, path), folder, tries=tries))


def remove_names(
    folder: str, names: Sequence[str], *, keep_folder: bool = False, tries: int = PATIENT_TRIES
) -> None:
    """Remove these files of a folder, and the folder when nothing else is in it; quiet about absent ones."""
    fs, path = filesystem(folder)

    def once() -> None:
        if not is_local(folder):
            _remove_each(fs, folder, [f"{path}/{name}" for name in names])
            return
        for name in names:
            with suppress(FileNotFoundError):
                os.remove(os.path.join(path, name))
        for inner, _, _ in [] if keep_folder else list(os.walk(path, topdown=False)):
            if not os.listdir(inner):
                os.rmdir(inner)

    guarded_change(once, folder, done="removed", tries=tries)


def _tree(fs: Any, url: str, path: str) -> list[str]:
    if is_local(url):
        return [os.path.relpath(os.path.join(f, n), path) for f, _, names in os.walk(path) for n in names]
    if not is_s3(url):
        return [str(name)[len(path) + 1 :] for name in fs.find(path)]
    # Not fsspec's `find`: it gives names without the slash that is part of a folder's mark.
    bucket, key, _ = fs.split_path(path)
    prefix, found = (f"{key}/" if key else ""), list[str]()
    after: dict[str, str] = {}
    while True:
        page = fs.call_s3("list_objects_v2", Bucket=bucket, Prefix=prefix, **after)
        found += [entry["Key"][len(prefix) :] for entry in page.get("Contents", [])]
        if not page.get("IsTruncated"):
            return found
        after = {"ContinuationToken": page["NextContinuationToken"]}


def _remove_each(fs: Any, url: str, paths: list[str]) -> None:
    """In bulk on S3 where it answers that, and with what it refused, about which s3fs says nothing."""
    if not is_s3(url):
        for path in paths:
            with suppress(FileNotFoundError):
                fs.rm_file(path)
        return
    bucket = paths[0].partition("/")[0] if paths else ""
    keys = [path.partition("/")[2] for path in paths]
    for first in range(0, len(keys), _OBJECTS_PER_REQUEST):
        wanted = keys[first : first + _OBJECTS_PER_REQUEST]
        try:
            several = {"Objects": [{"Key": key} for key in wanted], "Quiet": True}
            answer = fs.call_s3("delete_objects", Bucket=bucket, Delete=several)
        except Exception as error:
            if not _ONE_BY_ONE.search(f"{type(error).__name__} {error} {error.__cause__}"):
                raise
            _remove_one_by_one(fs, bucket, keys[first:])  # more in bulk would cost a deadline each
            return
        for refused in answer.get("Errors", []):
            if refused.get("Code") != "NoSuchKey":
                raise OSError(f"{refused.get('Code')}: {refused.get('Message')} ({refused.get('Key')})")


def _remove_one_by_one(fs: Any, bucket: str, keys: list[str]) -> None:
    """The same by a request each; a hiccup of one does not begin all of them anew."""

    def one(key: str) -> None:
        with suppress(FileNotFoundError):
            url = f"s3://{bucket}/{key}"
            delete = partial(fs.call_s3, "delete_object", Bucket=bucket, Key=key)
            with_retries(delete, url, done="removed", tries=QUICK_TRIES)

    with ThreadPoolExecutor(_REMOVALS) as pool:
        list(pool.map(one, keys))


def check_writable(folder: str) -> None:
    """Write and remove a small file.

    Raises:
        UserError, RetryableFault: it does not work; better known before the first checkpoint.
    """
    probe = join(folder, f".writable.{os.getpid()}")
    write_bytes(probe, b"ok", tries=_CHECK_TRIES)
    remove_file(probe, tries=_CHECK_TRIES)


def cut_torn_line(path: Path) -> None:
    """Cut what a crash or a full disk left of a local file's last line, so that the next gets its own."""
    if not path.exists():
        return
    with path.open("rb+") as file:
        size = position = file.seek(0, io.SEEK_END)
        tail = b""
        while position and b"\n" not in tail:
            block = min(_BLOCK_BYTES, position)
            position -= block
            file.seek(position)
            tail = file.read(block) + tail
        whole = position + tail.rfind(b"\n") + 1
        if whole < size:
            file.truncate(whole)
