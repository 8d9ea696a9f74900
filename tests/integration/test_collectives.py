"""Collectives over two real gloo ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from data_pipeline.errors import DataError, NoShards
from tests.integration.ranks import run_ranks
from trainer.distributed import collectives

FUNCTION = "tests/integration/test_collectives.py:once"


def once(env: Any, marker: str, fails: bool) -> list[str]:
    """What `from_main_rank` gives on this rank, and how often anybody made it."""

    def make() -> str:
        with Path(marker).open("a") as file:
            file.write(f"{env.rank}\n")
        if fails:
            raise NoShards("nothing there")
        return "made"

    try:
        found = collectives.from_main_rank(make, raises=DataError)
    except NoShards as error:
        found = str(error)
    collectives.barrier()
    return [found, Path(marker).read_text()]


def test_one_rank_makes_it_and_all_get_it_or_its_error(tmp_path: Path) -> None:
    good = run_ranks(FUNCTION, 2, {"marker": str(tmp_path / "good"), "fails": False})
    assert good == [["made", "0\n"]] * 2
    bad = run_ranks(FUNCTION, 2, {"marker": str(tmp_path / "bad"), "fails": True})
    assert bad == [["nothing there", "0\n"]] * 2
