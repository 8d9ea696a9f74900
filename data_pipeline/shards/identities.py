"""What identifies a sample beside its key, and the ways in which people write the same thing.

Removal lists and samples meet by 64-bit hashes, so both sides must spell alike:

    field of a sample        URL, url, Sha256 ...        any case of the names below
    its value                text, bytes, 12, 12.0       `identity_text`
    a digest                 0xAB.., sha256:ab.., AB:CD  `identity`: lower case, digits alone
    a UUID                   with dashes or without      `identity`
    a key as a number        000000012, 12, 12.0         `numbered`, a name of its own

What a line of a list may mean beside what it says (a bullet, a comment behind it) is in `readings`.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from typing import Any

DIGESTS = {"md5": 32, "sha1": 40, "sha224": 56, "sha256": 64, "sha384": 96, "sha512": 128}
"""Hexadecimal digits of the digests that are told from other texts by their looks."""
IDENTITIES = ("url", "uid", "hash", *DIGESTS)
"""Fields of a sample, in any case, that removal lists may name; their hashes are kept."""
_DIGEST = re.compile(
    r"\s*(?:0x|(?:md5|sha-?\d+)[:=])?((?:[0-9a-f]{32}|[0-9a-f]{40}|[0-9a-f]{56}|[0-9a-f]{64}|[0-9a-f]{96}"
    r"|[0-9a-f]{128}))\s*",
    re.IGNORECASE,
)
_PARTED = re.compile(
    r"\s*(?:(?:[0-9a-f]{2}[: ]){15,63}[0-9a-f]{2}|[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12})\s*",
    re.IGNORECASE,
)
"""Pairs of digits with something between them, and UUIDs."""
_SHORTEST = min(DIGESTS.values())
_NUMBER = re.compile(r"(\d{1,39})(?:\.0+)?", re.ASCII)
_BULLET = re.compile(r"[-*+\u2022]\s+(.*)")
_QUOTES = ("'", '"', "`")
_COMMENT = re.compile(r"\s+(?:#|//)(?:\s.*)?$")


def hash_text(text: str) -> int:
    """64-bit hash of a text, never 0."""
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little") or 1


def identity(text: str) -> str:
    """The one spelling of a key, URL or digest: a digest in lower case, its digits alone; UUIDs likewise."""
    if len(text) < _SHORTEST or "/" in text:  # neither, as nearly all names of samples are
        return text.strip()
    if _PARTED.fullmatch(text):
        text = re.sub("[-: ]", "", text.strip())
    found = _DIGEST.fullmatch(text)
    return found.group(1).lower() if found else text.strip()


def hash_identity(text: str) -> int:
    """64-bit hash under which keys, URLs and digests are compared with removal lists."""
    return hash_text(identity(text))


def is_identity(name: str) -> bool:
    """Whether a field or column of a sample is one of IDENTITIES."""
    return name.lower() in IDENTITIES


def identity_text(name: str, value: Any) -> str:
    """The text of a field's value: bytes are a digest or UTF-8, whole numbers have no fraction."""
    if isinstance(value, bytes):
        binary = 2 * len(value) == DIGESTS.get(name.lower())
        return value.hex() if binary else value.decode("utf-8", "replace")
    if isinstance(value, float) and value.is_integer():
        return str(int(value))  # pandas makes these of whole numbers where one is missing
    return str(value)


def numbered(key: str) -> str | None:
    """A key of digits, alone or behind its shard, as the number that tables make of it; None for another.

    >>> numbered("00000/000000012") == numbered("0/12") == numbered("00000/12.0")
    True

    A name of its own: the number 12 is not what a hash of 12 is.
    """
    shard, slash, last = key.rpartition("/")
    found = _NUMBER.fullmatch(last)
    if not found:
        return None
    if shard.isascii() and shard.isdigit():
        shard = shard.lstrip("0") or "0"
    return f"number {shard}{slash}{int(found.group(1))}"


def is_unpadded(key: str) -> bool:
    """Whether a key is a number without leading zeros, as tables write it."""
    last = key.rpartition("/")[2]
    found = _NUMBER.fullmatch(last)
    return found is not None and found.group(1) == str(int(found.group(1)))


def readings(text: str) -> Iterator[str]:
    """What a line of a list may mean beside what it says: without bullet, comment, quotes, end of a cell.

    >>> list(readings("- '000000012',  # asked by A"))
    ["'000000012',  # asked by A", "'000000012',", "'000000012'", '000000012']
    """
    steps = (
        lambda line: _BULLET.sub(r"\1", line) if _BULLET.fullmatch(line) else line,
        lambda line: _COMMENT.sub("", line),
        lambda line: line.rstrip(",;|").rstrip(),
        lambda line: line[1:-1].strip() if line[:1] in _QUOTES and line[-1:] == line[:1] else line,
    )
    for step in steps:
        changed = step(text)
        if changed and changed != text:
            text = changed
            yield text
