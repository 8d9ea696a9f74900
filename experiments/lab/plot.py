"""Curves with error bars as a PNG, drawn by Pillow: the project needs no plotting library for this alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from trainer.report.chart import COLOURS, GRID, INK, ticks

WIDTH, HEIGHT = 620, 400
"""Of a panel, pixels."""
LEFT, RIGHT, TOP, BOTTOM = 70, 20, 46, 60
"""Margins of a panel around its axes; the legend stands in the one at the top."""
HEADER = 30

Spread = tuple[float, float] | None
"""Mean and deviation; None where nothing was measured."""


@dataclass(frozen=True)
class Curve:
    """One line: a spread per place of the axis."""

    name: str
    points: Sequence[Spread]


@dataclass(frozen=True)
class Panel:
    """One pair of axes; the places of the lower one stand at equal distances."""

    title: str
    axis: str
    places: Sequence[str]
    curves: Sequence[Curve]
    joined: bool = True
    """Whether lines join the points of a curve."""


def draw(path: Path, title: str, panels: Sequence[Panel]) -> None:
    """Write the panels side by side under one title."""
    image = Image.new("RGB", (WIDTH * len(panels), HEIGHT + HEADER), "white")
    pen = ImageDraw.Draw(image)
    pen.text((10, 8), title, fill=INK, font=_font(13))
    for number, panel in enumerate(panels):
        _Axes(pen, number * WIDTH, HEADER, panel).draw()
    image.save(path)


class _Axes:
    """Draws one panel."""

    def __init__(self, pen: ImageDraw.ImageDraw, x: int, y: int, panel: Panel) -> None:
        self._pen, self._panel = pen, panel
        self._left, self._right = x + LEFT, x + WIDTH - RIGHT
        self._top, self._bottom = y + TOP, y + HEIGHT - BOTTOM
        found = [p for curve in panel.curves for p in curve.points if p is not None]
        lows, highs = [m - d for m, d in found] or [0.0], [m + d for m, d in found] or [1.0]
        self._ticks = ticks(min(lows), max(highs))

    def draw(self) -> None:
        """Grid, labels, curves, legend."""
        self._grid()
        for number, curve in enumerate(self._panel.curves):
            self._curve(curve, COLOURS[number % len(COLOURS)], number - (len(self._panel.curves) - 1) / 2)
        self._legend()

    def _x(self, number: float) -> float:
        return self._left + (number + 0.5) * (self._right - self._left) / len(self._panel.places)

    def _y(self, value: float) -> float:
        low, high = self._ticks[0], self._ticks[-1]
        return self._bottom - (value - low) / (high - low) * (self._bottom - self._top)

    def _grid(self) -> None:
        small, panel = _font(12), self._panel
        for tick in self._ticks:
            y = self._y(tick)
            self._pen.line([(self._left, y), (self._right, y)], fill=GRID)
            self._pen.text((self._left - 6, y), f"{tick:.5g}", fill=INK, font=small, anchor="rm")
        for number, place in enumerate(panel.places):
            x = self._x(number)
            self._pen.line([(x, self._bottom), (x, self._bottom + 4)], fill=INK)
            self._pen.text((x, self._bottom + 8), place, fill=INK, font=small, anchor="ma")
        self._pen.line([(self._left, self._bottom), (self._right, self._bottom)], fill=INK)
        middle = (self._left + self._right) / 2
        self._pen.text((middle, self._bottom + 32), panel.axis, fill=INK, font=_font(13), anchor="ma")
        self._pen.text((self._left, self._top - 40), panel.title, fill=INK, font=_font(15))

    def _curve(self, curve: Curve, colour: str, shift: float) -> None:
        """`shift` moves curves apart by some pixels, so that their bars do not hide each other."""
        drawn = [
            (self._x(number) + 5 * shift, *point)
            for number, point in enumerate(curve.points)
            if point is not None
        ]
        if self._panel.joined:
            self._pen.line([(x, self._y(mean)) for x, mean, _ in drawn], fill=colour, width=2)
        for x, mean, deviation in drawn:
            low, high = self._y(mean - deviation), self._y(mean + deviation)
            self._pen.line([(x, low), (x, high)], fill=colour, width=1)
            for end in (low, high):
                self._pen.line([(x - 4, end), (x + 4, end)], fill=colour, width=1)
            y = self._y(mean)
            self._pen.ellipse([(x - 3, y - 3), (x + 3, y + 3)], fill=colour)

    def _legend(self) -> None:
        x, y, font = float(self._left), self._top - 12, _font(12)
        for number, curve in enumerate(self._panel.curves):
            colour = COLOURS[number % len(COLOURS)]
            self._pen.line([(x, y), (x + 16, y)], fill=colour, width=3)
            self._pen.text((x + 20, y), curve.name, fill=INK, font=font, anchor="lm")
            x += 34 + font.getlength(curve.name)


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size=size)
