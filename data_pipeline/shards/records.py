"""What json and text members hold: fields by name, and captions.

A half of a surrogate pair (`"\\ud83d"`, left where a text was cut) is valid in json and in no encoding. In
the name of a field it is written as its escape, since names are printed and stored everywhere; captions lose
it, and identifiers are compared as they are.
"""

from __future__ import annotations

import json
import unicodedata
from typing import Any

MAX_JSON = 4_000_000
_MAX_CHARACTERS = 4000
_READ_CHARACTERS = 4 * _MAX_CHARACTERS
TEXT_BYTES = 4 * _READ_CHARACTERS
"""Bytes of a text member that can be of its caption: UTF-8 has at most four a character."""
_LOOK = 64
_UTF_16 = (b"\xff\xfe", b"\xfe\xff")


def parse_record(body: bytes | None) -> dict[str, Any] | None:
    """The json member as a dict; None when absent or not an object. Bad JSON counts as absent."""
    if body is None or len(body) > MAX_JSON:
        return None
    try:
        value = json.loads(body)
    except (ValueError, RecursionError):
        return None
    return {printable(name): item for name, item in value.items()} if isinstance(value, dict) else None


def printable(text: str) -> str:
    """The same text with halves of surrogate pairs as escapes."""
    return text if text.isascii() else text.encode("utf-8", "backslashreplace").decode("utf-8")


def clean(text: str) -> str:
    """NFC, no control characters, single spaces; at most 4000 characters."""
    text = unicodedata.normalize("NFC", text[:_READ_CHARACTERS])
    text = "".join(c if unicodedata.category(c)[0] != "C" or c in "\u200d" else " " for c in text)
    return " ".join(text.split())[:_MAX_CHARACTERS]


def text_of(body: bytes) -> str:
    """Content of a text member: UTF-8, or UTF-16 that begins with its mark."""
    return body.decode("utf-16" if body.startswith(_UTF_16) else "utf-8", "replace")


def is_damaged(body: bytes) -> bool:
    """Whether the first TEXT_BYTES of a text member hold bytes that are no text, which `text_of` replaces."""
    if body.startswith(_UTF_16):
        return False
    if b"\0" in body:  # UTF-16 without its mark, which is UTF-8 as well
        return True
    try:
        body.decode("utf-8")
    except UnicodeDecodeError as error:
        cut = error.reason == "unexpected end of data" and len(body) == TEXT_BYTES
        return not cut
    return False


def is_blank(body: bytes) -> bool:
    """Whether the first TEXT_BYTES of a text member are no caption: nothing is left when it is cleaned."""
    text = text_of(body)
    return not any(c.isalnum() for c in text[:_LOOK]) and not clean(text)
