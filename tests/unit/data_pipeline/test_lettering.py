"""Captions of any script are told apart on contact sheets and grids, and stay under their picture."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from data_pipeline.tools.inspection import contact_sheet
from data_pipeline.tools.lettering import Lettering
from trainer.__main__ import main
from trainer.metrics.pictures import grid

PAIRS = [
    ("a red circle", "a blue circle"),
    ("\u043a\u0440\u0430\u0441\u043d\u044b\u0439", "\u0437\u0435\u043b\u0435\u043d\u044b\u0439"),  # Russian
    ("\u7d05\u3044\u5186", "\u9752\u3044\u5186"),  # Japanese
    ("\u0623\u062d\u0645\u0631", "\u0623\u0632\u0631\u0642"),  # Arabic
    ("\ub178\ub780 \uc6d0", "\ud30c\ub780 \uc6d0"),  # Korean
]


def sheet(caption: str) -> np.ndarray:
    data = contact_sheet([(np.zeros((160, 160, 3), np.uint8), caption)])
    return np.asarray(Image.open(io.BytesIO(data)))


def gridded(caption: str) -> np.ndarray:
    return np.asarray(grid(torch.zeros(1, 3, 128, 128, dtype=torch.uint8), (caption,), columns=1))


@pytest.mark.parametrize("draw", [sheet, gridded])
@pytest.mark.parametrize(("one", "other"), PAIRS)
def test_captions_of_any_script_are_told_apart(draw, one: str, other: str) -> None:
    first, second = draw(one), draw(other)
    assert first.shape != second.shape or (first != second).any()
    assert first.shape != draw("").shape or (first != draw("")).any()


@pytest.mark.parametrize("text", [" ".join(pair) * 3 for pair in PAIRS] + ["x" * 90, "a" + " b" * 80])
def test_lines_fit_their_width_and_lose_nothing(text: str) -> None:
    lettering = Lettering(12)
    lines = lettering.lines(text, 100, most=1000)
    assert max(map(lettering.width, lines)) <= 100
    assert "".join("".join(lines).split()) == "".join(text.split())
    assert lettering.lines(text, 100, most=2) == lines[:2]


def test_a_letter_without_a_font_is_its_code() -> None:
    lettering = Lettering(12)
    assert lettering.width("\U000e0123x") > 0
    assert lettering.width("\U0010fffd") == lettering.width("[10FFFD]")
    picture = Image.new("RGB", (200, 30), "white")
    lettering.draw(ImageDraw.Draw(picture), 2, 2, "a \U0010fffd b", "black")
    assert np.asarray(picture).min() < 100
    assert lettering.lines("", 100, 3) == []


def test_the_sheet_goes_into_a_folder(tmp_path: Path, write_shards) -> None:
    write_shards(tmp_path, [3])
    (tmp_path / "sheets").mkdir()
    shards = str(tmp_path / "*.tar")
    assert main(["data", "inspect", shards, "--sheet", str(tmp_path / "sheets")]) == 0
    assert main(["data", "inspect", shards, "--sheet", f"{tmp_path}/new/"]) == 0
    for folder in ("sheets", "new"):
        assert Image.open(tmp_path / folder / "contact_sheet.png").width > 100
        assert [path.name for path in (tmp_path / folder).iterdir()] == ["contact_sheet.png"]
