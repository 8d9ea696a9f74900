"""A chart as a PNG, drawn by Pillow: lines through points at numbers, where no page is wanted.

plotly's own pictures need a browser; this needs what is installed anyway.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

SIZE = (1000, 640)
MARGINS = (90, 60, 30, 70)
"""Left, top, right and bottom of the axes; the legend stands in the one at the top."""
COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#8c564b", "#17becf")
GRID, INK = "#dddddd", "#222222"
TICKS = 5
LABELLED = 12
"""Points of a line that all bear their labels; of more of them the first and the last, to be read at all."""

Point = tuple[float, float, str]
"""Place across, value, and what is written beside it."""


@dataclass(frozen=True)
class Chart:
    """Named lines over one axis."""

    across: str
    up: str
    lines: Mapping[str, Sequence[Point]]
    title: str = ""


def fidelity_chart(points: Sequence[Mapping[str, float]], networks: str) -> Chart:
    """The first distance over CLIP score, or over guidance where there is none.

    Args:
        points: `guidance`, `steps` and figures by name; a line for each number of steps.
        networks: what has measured them.
    """
    names = [
        name for name in dict.fromkeys(n for p in points for n in p) if name not in ("guidance", "steps")
    ]
    across = "clip_score" if "clip_score" in names and len(names) > 1 else "guidance"
    up = next(name for name in names if name != across)
    lines: dict[str, list[Point]] = {}
    for point in sorted(points, key=lambda point: (point["steps"], point["guidance"])):
        label = f"guidance {point['guidance']:g}" if across != "guidance" else ""
        place = (point.get(across, math.nan), point.get(up, math.nan), label)
        lines.setdefault(f"{point['steps']:g} steps", []).append(place)
    return Chart(across, up, lines, networks)


def ticks(low: float, high: float) -> list[float]:
    """Round numbers from at or below `low` to at or above `high`, about `TICKS` of them."""
    if high <= low:
        low, high = low - 0.5 * (abs(low) or 1.0), high + 0.5 * (abs(high) or 1.0)
    rough = (high - low) / TICKS
    power = 10.0 ** math.floor(math.log10(rough))
    step = power * next(factor for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [number * step for number in range(first, last + 1)]


def to_png(chart: Chart) -> bytes:
    """The chart; points that are no numbers are left out, and the line goes past them."""
    image = Image.new("RGB", SIZE, "white")
    pen = ImageDraw.Draw(image)
    lines = {
        name: [(x, y, label) for x, y, label in points if math.isfinite(x) and math.isfinite(y)]
        for name, points in chart.lines.items()
    }
    axes = _Axes(pen, [point for points in lines.values() for point in points])
    axes.grid(chart.across, chart.up)
    pen.text((SIZE[0] - MARGINS[2], 12), chart.title, fill=INK, font=_font(12), anchor="ra")
    x = float(MARGINS[0])
    for number, (name, points) in enumerate(lines.items()):
        colour = COLOURS[number % len(COLOURS)]
        axes.line(points, colour)
        pen.line([(x, MARGINS[1] - 14), (x + 16, MARGINS[1] - 14)], fill=colour, width=3)
        pen.text((x + 20, MARGINS[1] - 14), name, fill=INK, font=_font(13), anchor="lm")
        x += 34 + _font(13).getlength(name)
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()


class _Axes:
    """Where numbers lie on the picture."""

    def __init__(self, pen: ImageDraw.ImageDraw, points: Sequence[Point]) -> None:
        self._pen = pen
        self._across = ticks(
            min((p[0] for p in points), default=0.0), max((p[0] for p in points), default=1.0)
        )
        self._up = ticks(min((p[1] for p in points), default=0.0), max((p[1] for p in points), default=1.0))
        left, top, right, bottom = MARGINS
        self._box = (left, top, SIZE[0] - right, SIZE[1] - bottom)

    def grid(self, across: str, up: str) -> None:
        """Lines and numbers of both axes, and what they are."""
        left, top, right, bottom = self._box
        small = _font(13)
        for tick in self._up:
            y = self._y(tick)
            self._pen.line([(left, y), (right, y)], fill=GRID)
            self._pen.text((left - 8, y), f"{tick:.5g}", fill=INK, font=small, anchor="rm")
        for tick in self._across:
            x = self._x(tick)
            self._pen.line([(x, top), (x, bottom)], fill=GRID)
            self._pen.text((x, bottom + 8), f"{tick:.5g}", fill=INK, font=small, anchor="ma")
        self._pen.line([(left, top), (left, bottom), (right, bottom)], fill=INK)
        self._pen.text(((left + right) / 2, bottom + 36), across, fill=INK, font=_font(15), anchor="ma")
        self._pen.text((12, 10), up, fill=INK, font=_font(15))

    def line(self, points: Sequence[Point], colour: str) -> None:
        """One line, its points and their labels."""
        places = [(self._x(x), self._y(y)) for x, y, _ in points]
        self._pen.line(places, fill=colour, width=2)
        labelled = range(len(points)) if len(points) <= LABELLED else (0, len(points) - 1)
        for number, (x, y) in enumerate(places):
            self._pen.ellipse([(x - 4, y - 4), (x + 4, y + 4)], fill=colour)
            if number in labelled:
                self._pen.text((x, y - 8), points[number][2], fill=colour, font=_font(12), anchor="ms")

    def _x(self, value: float) -> float:
        low, high = self._across[0], self._across[-1]
        return self._box[0] + (value - low) / (high - low) * (self._box[2] - self._box[0])

    def _y(self, value: float) -> float:
        low, high = self._up[0], self._up[-1]
        return self._box[3] - (value - low) / (high - low) * (self._box[3] - self._box[1])


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size=size)
