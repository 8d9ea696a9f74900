"""Charts that need no browser: where their points lie, and what is left out."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from trainer.report.chart import COLOURS, HEADER, MARGINS, SIZE, Chart, Point, fidelity_chart, ticks, to_png


def places(png: bytes, colour: str) -> NDArray[np.int64]:
    """[N, 2] (x, y) of the pixels of a colour inside the axes, counted from below the header."""
    pixels = np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))[HEADER:]
    assert pixels.shape == (SIZE[1], SIZE[0], 3)
    wanted = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
    found = np.argwhere((pixels == wanted).all(axis=2))[:, ::-1]
    return found[found[:, 1] >= MARGINS[1]]  # below the legend


def test_a_line_goes_where_its_numbers_go() -> None:
    lines = {"a": [Point(0.0, 0.0), Point(1.0, 10.0)], "b": [Point(0.0, 10.0)]}
    png = to_png(Chart("clip_score", "fid", lines), header="of a network")
    line = places(png, COLOURS[0])
    first, last = line[line[:, 0].argmin()], line[line[:, 0].argmax()]
    left, top, right, bottom = MARGINS
    assert first == pytest.approx((left, SIZE[1] - bottom), abs=5)
    assert last == pytest.approx((SIZE[0] - right, top), abs=5)
    assert places(png, COLOURS[1]).mean(axis=0) == pytest.approx((left, top), abs=3)


@pytest.mark.parametrize(
    ("points", "drawn"),
    [
        ([], False),
        ([Point(math.nan, 1.0, "nothing"), Point(1.0, math.inf, "nothing")], False),
        ([Point(2.0, 5.0, "alone")], True),
        ([Point(2.0, 5.0, "one"), Point(math.nan, math.nan), Point(2.0, 5.0, "the same")], True),
        ([Point(float(i), float(i * i), f"{i}") for i in range(200)], True),
    ],
)
def test_nothing_that_may_be_measured_ends_it(points: Sequence[Point], drawn: bool) -> None:
    png = to_png(Chart("guidance", "fid", {"2 steps": points}), header="")
    assert bool(len(places(png, COLOURS[0]))) == drawn


def test_bars_are_as_long_as_deviations_and_charts_stand_side_by_side() -> None:
    lines = {"x": [Point(0, 0.5, deviation=0.5), Point(1, 0.0)], "y": [Point(0, math.nan)]}
    first, second = Chart("", "", lines, ["a", "b"]), Chart("", "", lines, ["a", "b"], joined=False)
    width = SIZE[0]
    png = to_png(first, second, header="", size=(width // 2, SIZE[1]))
    for chart, joined in ((0, True), (1, False)):
        found = places(png, COLOURS[0])
        found = found[found[:, 0] // (width // 2) == chart]
        _, heights = np.unique(found[:, 0], return_counts=True)
        assert heights.max() == pytest.approx(SIZE[1] - MARGINS[1] - MARGINS[3], abs=3), (
            "0 to 1, the whole axis"
        )
        columns = np.diff(np.unique(found[:, 0]))
        assert (columns.max() == 1) == joined


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0.0, 1.0, [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]),
        (0.13, 0.61, [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7]),
        (2.0, 2.0, [1.0, 1.5, 2.0, 2.5, 3.0]),
        (-3.0, 40.0, [-10.0, 0.0, 10.0, 20.0, 30.0, 40.0]),
    ],
)
def test_ticks_are_round_and_hold_what_is_drawn(low: float, high: float, expected: list[float]) -> None:
    assert ticks(low, high) == pytest.approx(expected)


def test_distance_over_clip_score_where_there_is_one() -> None:
    rows = [
        {"guidance": g, "steps": s, "fid": 10.0 - g, "is": 2.0, "clip_score": 0.1 * g}
        for s in (50.0, 10.0)
        for g in (2.0, 1.0)
    ]
    chart = fidelity_chart(rows)
    assert (chart.across, chart.up) == ("clip_score", "fid")
    assert list(chart.lines) == ["10 steps", "50 steps"]
    assert chart.lines["10 steps"] == [Point(0.1, 9.0, "guidance 1"), Point(0.2, 8.0, "guidance 2")]
    without = fidelity_chart([{k: v for k, v in row.items() if k != "clip_score"} for row in rows])
    assert without.across == "guidance"
    assert without.lines["50 steps"] == [Point(1.0, 9.0), Point(2.0, 8.0)]


def test_names_of_places_stay_apart() -> None:
    """Three that are wider than their room; between two of them nothing is drawn below the axis."""
    names = ["super-resolution", "super-resolution constrained", "super-resolution shuffled"]
    lines = {"x": [Point(float(i), 1.0) for i in range(3)]}
    width = 500
    png = to_png(Chart("", "", lines, names, joined=False), header="", size=(width, SIZE[1]))
    pixels = np.asarray(Image.open(io.BytesIO(png)).convert("L"))
    left, _, right, bottom = MARGINS
    room = (width - left - right) / 3
    below = pixels[HEADER + SIZE[1] - bottom + 3 :]
    assert (below < 128).any()
    for edge in (left + room, left + 2 * room):
        assert (below[:, int(edge) - 2 : int(edge) + 3] == 255).all()
