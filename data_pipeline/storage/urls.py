"""URLs as texts: which are opened, their parts, braces, and the names of shards. Touches no storage."""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Sequence
from functools import lru_cache

from data_pipeline.errors import DataError

_SCHEMES = ("file", "s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "hf", "http", "https", "memory")
_S3 = ("s3", "s3a")
_MAX_EXPANSION = 10_000_000
_LOGIN = re.compile(
    r"(?<=http://)[^/\s@?#'\"]+@|(?<=https://)[^/\s@?#'\"]+@|(?<=://)[^/:\s@?#'\"]*:[^/\s@?#'\"]+@", re.I
)
"""A container of Azure's stands before an `@`, too, without a password."""
_SIGNED = re.compile(
    r"([?&;](?:[\w.-]*(?:sign|token|secret|credential|password|passwd|key)[\w.-]*|sig|auth)=)[^&;#\s'\"\],}]+",
    re.I,
)
_PROTECTED = {chr(0xE000 + i): character for i, character in enumerate("[]*?{}")}  # private use: in no name
_NAMED = str.maketrans(_PROTECTED)


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


def is_local(url: str) -> bool:
    """Whether a URL is a path on this machine."""
    return scheme_of(url) == "file"


def is_s3(url: str) -> bool:
    """Whether a URL is an object of S3 or of a server that speaks like it."""
    return scheme_of(url) in _S3


def is_http(url: str) -> bool:
    """Whether a URL is a file of a web server, which has no listing that programs can rely on."""
    return scheme_of(url) in ("http", "https")


def local_path(url: str) -> str:
    """The path behind a local URL; a leading `~` is the home folder. Raises DataError for another."""
    if not is_local(url):
        raise DataError(f"{url} is not on this machine, and this has to be; name a path.")
    return os.path.expanduser(re.sub(r"^file:(//)?", "", url, flags=re.IGNORECASE))


def join(folder: str, *names: str) -> str:
    """URL of a name inside a folder URL. Raises DataError for no folder, which would become the root."""
    if not folder:
        raise DataError("An empty path names no folder; write . for the one that this runs in.")
    return "/".join([folder.rstrip("/"), *names])


def parent(url: str) -> str:
    """URL of the folder that holds `url`."""
    head = url.rstrip("/").rpartition("/")[0]
    return head or "."


def name_of(url: str) -> str:
    """Last part of a URL."""
    return url.rstrip("/").rpartition("/")[2]


def without_secrets(text: str) -> str:
    """A text for people to read: what URLs in it carry to be let in, passwords and signatures, as `***`.

    >>> without_secrets("https://me:pass@host/a.tar?X-Amz-Signature=1f2e&part=3")
    'https://***@host/a.tar?X-Amz-Signature=***&part=3'
    """
    return _SIGNED.sub(r"\1***", _LOGIN.sub("***@", text))


def distinguishing_depth(urls: Sequence[str]) -> int:
    """How many last parts tell these URLs apart: 1 unless two folders hold files of the same name."""
    names, depth = set(urls), 1
    while len({tuple(name.rsplit("/", depth)[-depth:]) for name in names}) < len(names):
        depth += 1
    return depth


def shard_name(url: str, depth: int) -> str:
    """The last `depth` parts of a shard's URL, without `.tar`."""
    return "/".join(url.split("/")[-depth:]).removesuffix(".tar")


def shard_names(url: str) -> list[str]:
    """Every name that some set of shards may give this one (see `distinguishing_depth`), shortest first."""
    return [shard_name(url, depth) for depth in range(1, url.count("/") + 2)]


def literal(pattern: str) -> str | None:
    """The one name that a pattern without wildcards stands for; None where only a listing can tell.

    A character of the pattern language that belongs to a name is put in brackets: `run[[]1]`, `a[*]b`.
    """
    protected = _protect(pattern)
    if "*" in protected or "?" in protected or "[" in protected:
        return None
    return _named(protected)


def mistakable(pattern: str) -> tuple[str, str] | None:
    """The leading part of a pattern that would be a name but for `[` or `?`, and how that name is written.

    >>> mistakable("/data/set[1]/*.tar")
    ('/data/set[1]', '/data/set[[]1]')
    """
    parts = _protect(pattern).split("/")
    for count, part in enumerate(parts, 1):
        if "*" in part:
            break
        if "[" in part or "?" in part:
            name = _named("/".join(parts[:count]))
            return name, re.sub(r"[\[*?{}]", lambda found: f"[{found.group()}]", name)
    return None


def expand_braces(url: str) -> list[str]:
    """Expand `{00000..00009}` and `{a,b}`; zero padding is kept. Raises DataError for a bad range."""
    return [_unprotect(found) for found in _expand(_protect(url))]


@lru_cache(maxsize=64)  # a start asks several times, and 200,000 names take a while
def spelled_out(url: str) -> tuple[str, ...] | None:
    """All shards of a URL that names each of them by braces, sorted; None where only a listing can tell."""
    patterns = expand_braces(url)
    names = [name for pattern in patterns if (name := literal(pattern)) is not None]
    whole = len(names) == len(patterns) > 1 and all(name.endswith(".tar") for name in names)
    return tuple(sorted(names)) if whole else None


def folder_before_patterns(url: str) -> str:
    """The folder that holds all that a URL with braces and wildcards can stand for."""
    return _named(re.split(r"[{*?\[]", _protect(url))[0].rpartition("/")[0])


def _expand(url: str) -> list[str]:
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
    elif ".." in inner and "," not in inner and "/" not in inner:
        raise DataError(
            f"{{{inner}}} in {url!r} is no range of numbers; write {{first..last}}, or {{a,b}} for names."
        )
    else:
        choices = inner.split(",")
    head, tails = url[: match.start()], _expand(url[match.end() :])
    return [head + choice + tail for choice, tail in itertools.product(choices, tails)]


def _protect(pattern: str) -> str:
    """Each bracketed special character as one character that no name has."""
    if "[" not in pattern:  # as in each of 200,000 names
        return pattern
    for stand_in, character in _PROTECTED.items():
        pattern = pattern.replace(f"[{character}]", stand_in)
    return pattern


def _unprotect(pattern: str) -> str:
    if pattern.isascii():
        return pattern
    for stand_in, character in _PROTECTED.items():
        pattern = pattern.replace(stand_in, f"[{character}]")
    return pattern


def _named(pattern: str) -> str:
    return pattern if pattern.isascii() else pattern.translate(_NAMED)
