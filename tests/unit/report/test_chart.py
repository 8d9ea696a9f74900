"""Charts that need no browser: where their points lie, and what is left out."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from trainer.report.chart import COLOURS, MARGINS, SIZE, Chart, Point, fidelity_chart, to_png


def places(png: bytes, colour: str) -> NDArray[np.int64]:
    """[N, 2] (x, y) of the pixels of a colour inside the axes."""
    pixels = np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))
    assert pixels.shape == (SIZE[1], SIZE[0], 3)
    wanted = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
    found = np.argwhere((pixels == wanted).all(axis=2))[:, ::-1]
    return found[found[:, 1] >= MARGINS[1]]  # below the legend


def test_a_line_goes_where_its_numbers_go() -> None:
    chart = Chart("clip_score", "fid", {"a": [(0.0, 0.0, ""), (1.0, 10.0, "")], "b": [(0.0, 10.0, "")]})
    png = to_png(chart)
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
        ([(math.nan, 1.0, "nothing"), (1.0, math.inf, "nothing")], False),
        ([(2.0, 5.0, "alone")], True),
        ([(2.0, 5.0, "one"), (math.nan, math.nan, ""), (2.0, 5.0, "the same")], True),
        ([(float(i), float(i * i), f"{i}") for i in range(200)], True),
    ],
)
def test_nothing_that_may_be_measured_ends_it(points: Sequence[Point], drawn: bool) -> None:
    assert bool(len(places(to_png(Chart("guidance", "fid", {"2 steps": points})), COLOURS[0]))) == drawn


def test_distance_over_clip_score_where_there_is_one() -> None:
    rows = [
        {"guidance": g, "steps": s, "fid": 10.0 - g, "is": 2.0, "clip_score": 0.1 * g}
        for s in (50.0, 10.0)
        for g in (2.0, 1.0)
    ]
    chart = fidelity_chart(rows, "of a network")
    assert (chart.across, chart.up, chart.title) == ("clip_score", "fid", "of a network")
    assert list(chart.lines) == ["10 steps", "50 steps"]
    assert chart.lines["10 steps"] == [(0.1, 9.0, "guidance 1"), (0.2, 8.0, "guidance 2")]
    without = fidelity_chart([{k: v for k, v in row.items() if k != "clip_score"} for row in rows], "")
    assert without.across == "guidance"
    assert without.lines["50 steps"] == [(1.0, 9.0, ""), (2.0, 8.0, "")]
