"""Captions of any script under pictures: the first font of this machine that has a letter draws it.

Pillow brings a font for Latin letters. Others come from the machine's font folders, those with many scripts
first: DejaVu (Greek, Cyrillic, Arabic, Hebrew), Noto CJK, Droid, WenQuanYi, Unifont (Chinese, Japanese,
Korean). A letter that no font has is written as its code, [4E2D], so that two captions never look alike.
"""

from __future__ import annotations

import functools
import os
import sys
import unicodedata
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import TypeAlias

from PIL import ImageDraw, ImageFont

_ENDINGS = (".ttf", ".otf", ".ttc")
_WIDE = (
    *("dejavusans.", "notosans-regular.", "notosanscjk-regular.", "notosanscjksc-regular.", "notosanssc-"),
    *("sourcehansans", "droidsansfallback", "wqy-", "arial unicode", "arialuni", "unifont", "freesans."),
)
"""Beginnings of the names of fonts with many scripts, the preferred first."""
_MOST_FONTS = 400
_NOBODY_HAS = "\U0010ffff"


Font: TypeAlias = ImageFont.FreeTypeFont | ImageFont.ImageFont


class Lettering:
    """Text in one size."""

    def __init__(self, size: int) -> None:
        """`size` in pixels from the top to the bottom of a line's letters."""
        self._size = size
        self._latin = ImageFont.load_default(size=size)
        self._width_of = functools.cache(self._measure)

    def lines(self, text: str, width: int, most: int) -> list[str]:
        """At most `most` lines of `width` pixels, broken between words where there are any."""
        lines: list[str] = []
        line = ""
        for word in self._words(text, width):
            longer = line + word
            if line and self.width(longer) > width:
                lines.append(line)
                longer = word.lstrip()
            line = longer
        lines += [line] if line.strip() else []
        return lines[:most]

    def width(self, text: str) -> int:
        """Pixels that a line takes."""
        return sum(self._width_of(run, font) for run, font in self._runs(text))

    def draw(
        self, draw: ImageDraw.ImageDraw, left: int, top: int, line: str, fill: str | tuple[int, ...]
    ) -> None:
        """Draw one line with its letters' top at `top`."""
        for run, font in self._runs(line):
            draw.text((left, top + self._size), run, fill=fill, font=font, anchor="ls")
            left += self._width_of(run, font)

    def _words(self, text: str, width: int) -> Iterator[str]:
        """Words with the space before them; what is too long for a line, letter by letter."""
        for i, word in enumerate(text.split()):
            spaced = f" {word}" if i else word
            if self.width(word) <= width:
                yield spaced
            else:
                yield from spaced

    def _runs(self, line: str) -> Iterator[tuple[str, Font]]:
        """Parts of a line that one font draws; letters without a font are replaced by their codes."""
        letters: list[tuple[str, Font]] = []
        for letter in line:
            kind = unicodedata.category(letter)
            joins = kind[0] in "MZ" or kind == "Cf"  # marks, spaces, joiners: with what they follow
            font = letters[-1][1] if joins and letters else self._latin if joins else self._font_of(letter)
            letters.append((letter, font) if font is not None else (f"[{ord(letter):X}]", self._latin))
        for font, group in groupby(letters, key=lambda item: item[1]):
            yield "".join(letter for letter, _ in group), font

    def _font_of(self, letter: str) -> Font | None:
        if letter.isascii() or _has(self._latin, letter):
            return self._latin
        path = _file_with(letter)
        return None if path is None else _font(path, self._size)

    def _measure(self, run: str, font: Font) -> int:
        return round(font.getlength(run))


@functools.cache
def _file_with(letter: str) -> str | None:
    return next((path for path in _files() if (font := _font(path, 12)) and _has(font, letter)), None)


def _has(font: Font, letter: str) -> bool:
    """Whether a font draws a letter otherwise than one that no font has."""
    try:
        return bytes(font.getmask(letter)) != bytes(font.getmask(_NOBODY_HAS))
    except (OSError, ValueError, UnicodeEncodeError):
        return False


@functools.cache
def _font(path: str, size: int) -> ImageFont.FreeTypeFont | None:
    try:
        return ImageFont.truetype(path, size)
    except (OSError, ValueError):  # damaged, or bitmaps of other sizes
        return None


@functools.cache
def _files() -> tuple[str, ...]:
    """Font files of this machine, those with many scripts first."""
    found: dict[str, str] = {}
    for folder in _folders():
        for where, _, names in os.walk(folder):
            for name in sorted(names):
                if name.lower().endswith(_ENDINGS):
                    found.setdefault(name.lower(), str(Path(where) / name))

    def place(name: str) -> tuple[int, bool, str]:
        wide = next((i for i, start in enumerate(_WIDE) if name.startswith(start)), len(_WIDE))
        return wide, any(style in name for style in ("bold", "italic", "oblique", "mono", "emoji")), name

    return tuple(found[name] for name in sorted(found, key=place))[:_MOST_FONTS]


def _folders() -> list[Path]:
    home = Path.home()
    folders = [home / ".fonts", home / ".local/share/fonts"]
    folders += [Path("/usr/local/share/fonts"), Path("/usr/share/fonts")]
    if sys.platform == "darwin":
        folders += [home / "Library/Fonts", Path("/Library/Fonts"), Path("/System/Library/Fonts")]
    return folders
