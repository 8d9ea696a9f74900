"""Collectives over two real gloo ranks."""

from __future__ import annotations

from pathlib import Path

from tests.integration.ranks import run_ranks

FUNCTION = "tests/integration/collective_ranks.py:once"


def test_one_rank_makes_it_and_all_get_it_or_its_error(tmp_path: Path) -> None:
    good = run_ranks(FUNCTION, 2, {"marker": str(tmp_path / "good"), "fails": False})
    assert good == [["made", "0\n"]] * 2
    bad = run_ranks(FUNCTION, 2, {"marker": str(tmp_path / "bad"), "fails": True})
    assert bad == [["nothing there", "0\n"]] * 2
