"""Charts as a PNG, drawn by Pillow: lines through points, with error bars, where no page is wanted.

plotly's own pictures need a browser; this needs what is installed anyway.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont

SIZE = (1000, 640)
MARGINS = (80, 60, 25, 65)
"""Left, top, right and bottom of the axes; the legend stands in the one at the top."""
HEADER = 30
COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#8c564b", "#17becf")
GRID, INK = "#dddddd", "#222222"
TICKS = 5
LABELLED = 12
"""Points of a line that all bear their labels; of more of them the first and the last, to be read at all."""
APART = 5
"""Pixels from line to line at a named place, so that their bars do not hide each other."""


class Point(NamedTuple):
    """Place across, value, what is written beside it, and how far its bar reaches to both sides."""

    x: float
    y: float
    label: str = ""
    deviation: float = 0.0


@dataclass(frozen=True)
class Chart:
    """Named lines over one axis."""

    across: str
    up: str
    lines: Mapping[str, Sequence[Point]]
    places: Sequence[str] = ()
    """Names of the places 0, 1, ... across, which stand at equal distances; none: they are numbers."""
    joined: bool = True
    """Whether lines join their points."""


def fidelity_chart(points: Sequence[Mapping[str, float]]) -> Chart:
    """The first distance over CLIP score, or over guidance where there is none.

    Args:
        points: `guidance`, `steps` and figures by name; a line for each number of steps.
    """
    names = [
        name for name in dict.fromkeys(n for p in points for n in p) if name not in ("guidance", "steps")
    ]
    across = "clip_score" if "clip_score" in names and len(names) > 1 else "guidance"
    up = next(name for name in names if name != across)
    lines: dict[str, list[Point]] = {}
    for point in sorted(points, key=lambda point: (point["steps"], point["guidance"])):
        label = f"guidance {point['guidance']:g}" if across != "guidance" else ""
        place = Point(point.get(across, math.nan), point.get(up, math.nan), label)
        lines.setdefault(f"{point['steps']:g} steps", []).append(place)
    return Chart(across, up, lines)


def ticks(low: float, high: float) -> list[float]:
    """Round numbers from at or below `low` to at or above `high`, about `TICKS` of them."""
    if high <= low:
        low, high = low - 0.5 * (abs(low) or 1.0), high + 0.5 * (abs(high) or 1.0)
    rough = (high - low) / TICKS
    power = 10.0 ** math.floor(math.log10(rough))
    step = power * next(factor for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [number * step for number in range(first, last + 1)]


def to_png(*charts: Chart, header: str, size: tuple[int, int] = SIZE) -> bytes:
    """The charts side by side, each of `size` pixels; points that are no numbers are left out, and lines go
    past them."""
    width, height = size
    image = Image.new("RGB", (width * len(charts), HEADER + height), "white")
    pen = ImageDraw.Draw(image)
    pen.text((12, 8), header, fill=INK, font=_font(13))
    left, top, right, bottom = MARGINS
    for number, chart in enumerate(charts):
        x = number * width
        _Axes(pen, chart, (x + left, HEADER + top, x + width - right, HEADER + height - bottom)).draw()
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()


class _Axes:
    """One chart, whose axes are the left and lower side of a box."""

    def __init__(self, pen: ImageDraw.ImageDraw, chart: Chart, box: tuple[int, int, int, int]) -> None:
        self._pen, self._chart, self._box = pen, chart, box
        self._lines = {
            name: [point for point in points if math.isfinite(point.x) and math.isfinite(point.y)]
            for name, points in chart.lines.items()
        }
        found = [point for points in self._lines.values() for point in points]
        lows, highs = [p.y - p.deviation for p in found], [p.y + p.deviation for p in found]
        self._up = ticks(min(lows, default=0.0), max(highs, default=1.0))
        self._high = (self._up[0], self._up[-1])
        places = [point.x for point in found]
        numbers = ticks(min(places, default=0.0), max(places, default=1.0))
        self._wide = (-0.5, len(chart.places) - 0.5) if chart.places else (numbers[0], numbers[-1])
        self._across: dict[float, str] = {tick: f"{tick:.5g}" for tick in numbers}
        if chart.places:
            self._across = dict(enumerate(chart.places))

    def draw(self) -> None:
        """Grid, lines, legend."""
        self._grid()
        x, y = float(self._box[0]), self._box[1] - 14
        for number, (name, points) in enumerate(self._lines.items()):
            colour = COLOURS[number % len(COLOURS)]
            shift = APART * (number - (len(self._lines) - 1) / 2) if self._chart.places else 0.0
            self._line(points, colour, shift)
            self._pen.line([(x, y), (x + 16, y)], fill=colour, width=3)
            self._pen.text((x + 20, y), name, fill=INK, font=_font(13), anchor="lm")
            x += 34 + _font(13).getlength(name)

    def _grid(self) -> None:
        """Lines and numbers of both axes, and what they are."""
        left, top, right, bottom = self._box
        small = _font(13)
        for tick in self._up:
            y = self._y(tick)
            self._pen.line([(left, y), (right, y)], fill=GRID)
            self._pen.text((left - 8, y), f"{tick:.5g}", fill=INK, font=small, anchor="rm")
        for place, name in self._across.items():
            x = self._x(place)
            self._pen.line([(x, top), (x, bottom)], fill=GRID)
            self._pen.multiline_text(
                (x, bottom + 6), self._wrapped(name, small), INK, small, "ma", 2, "center"
            )
        self._pen.line([(left, top), (left, bottom), (right, bottom)], fill=INK)
        middle = (left + right) / 2
        self._pen.text((middle, bottom + 38), self._chart.across, fill=INK, font=_font(15), anchor="ma")
        self._pen.text((left, top - 50), self._chart.up, fill=INK, font=_font(15))

    def _wrapped(self, name: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
        """The name, its last word in a line of its own where it would reach into its neighbours'."""
        room = (self._box[2] - self._box[0]) / len(self._across) - 8
        return name if font.getlength(name) <= room else "\n".join(name.rsplit(maxsplit=1))

    def _line(self, points: Sequence[Point], colour: str, shift: float) -> None:
        """One line, its points, their bars and labels."""
        places = [(self._x(point.x) + shift, self._y(point.y)) for point in points]
        if self._chart.joined:
            self._pen.line(places, fill=colour, width=2)
        labelled = range(len(points)) if len(points) <= LABELLED else (0, len(points) - 1)
        for number, ((x, y), point) in enumerate(zip(places, points, strict=True)):
            if point.deviation:
                ends = [self._y(point.y + point.deviation), self._y(point.y - point.deviation)]
                self._pen.line([(x, ends[0]), (x, ends[1])], fill=colour, width=1)
                for end in ends:
                    self._pen.line([(x - 4, end), (x + 4, end)], fill=colour, width=1)
            self._pen.ellipse([(x - 3, y - 3), (x + 3, y + 3)], fill=colour)
            if number in labelled:
                self._pen.text((x, y - 8), point.label, fill=colour, font=_font(12), anchor="ms")

    def _x(self, value: float) -> float:
        low, high = self._wide
        return self._box[0] + (value - low) / (high - low) * (self._box[2] - self._box[0])

    def _y(self, value: float) -> float:
        low, high = self._high
        return self._box[3] - (value - low) / (high - low) * (self._box[3] - self._box[1])


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size=size)
