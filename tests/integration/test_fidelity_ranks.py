"""Fidelity over real gloo ranks: the same figures, bit for bit, and one rank's mistake ends all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.integration.ranks import run_ranks
from trainer.__main__ import main

RANKS = "tests/integration/fidelity_ranks.py:evaluate"


def folder_of(path: Path, first: int, count: int) -> Path:
    path.mkdir()
    for seed in range(first, first + count):
        coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((24, 24), Image.Resampling.BICUBIC).save(path / f"{seed:04d}.png")
    return path


@pytest.fixture
def arguments(tmp_path: Path) -> list[str]:
    made, real = folder_of(tmp_path / "made", 0, 45), folder_of(tmp_path / "real", 100, 70)
    options = ["--features", "random", "--batch-size", "8", "--out", str(tmp_path / "figures.json")]
    return ["fidelity", str(made), "--reference", str(real), *options]


@pytest.mark.parametrize("world_size", [2, 3])
def test_any_number_of_ranks_gives_the_same_bits(
    tmp_path: Path, arguments: list[str], world_size: int
) -> None:
    assert main(["evaluate", *arguments]) == 0
    alone: dict[str, Any] = json.loads((tmp_path / "figures.json").read_text())
    (tmp_path / "figures.json").unlink()
    assert run_ranks(RANKS, world_size, {"arguments": arguments}) == [[0, []]] * world_size
    assert json.loads((tmp_path / "figures.json").read_text()) == alone


def test_a_picture_that_one_rank_cannot_read_ends_all_with_its_name(
    tmp_path: Path, arguments: list[str]
) -> None:
    (tmp_path / "made" / "9999.png").write_bytes(b"no picture")
    found = run_ranks(RANKS, 2, {"arguments": arguments})
    assert [code for code, _ in found] == [2, 2]
    assert all("9999.png cannot be measured" in said[0] for _, said in found)
