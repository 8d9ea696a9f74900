"""The doctor on two nodes: a run_dir that they do not share, and one that only one of them can write to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.integration.ranks import run_ranks

RANKS = "tests/integration/doctor_ranks.py:look"
TWO_NODES = {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}


def look(tmp_path: Path, run_dir: str, *, unwritable: bool = False) -> list[dict[str, Any]]:
    folders = [tmp_path / "node0", tmp_path / "node1"]
    for folder in folders:
        folder.mkdir()
    given = {"folders": [str(folder) for folder in folders], "run_dir": run_dir, "unwritable": unwritable}
    return run_ranks(RANKS, 2, given, environ=TWO_NODES)


def test_a_run_dir_that_each_node_has_of_its_own_is_found(tmp_path: Path) -> None:
    """Both can write and read what they wrote; no checkpoint of theirs could ever commit."""
    for found in look(tmp_path, "run"):
        assert not found["passed"]
        assert "does not see in run what rank 0" in found["detail"]
        assert "all nodes share" in found["remedy"]
        assert found["left"] == []


def test_a_shared_one_passes_and_is_left_as_it_was(tmp_path: Path) -> None:
    for found in look(tmp_path, str(tmp_path / "shared")):
        assert found["passed"], found
        assert "MB/s per node" in found["detail"]
        assert found["left"] == []


def test_one_node_that_cannot_write_is_that_machines_fault(tmp_path: Path) -> None:
    for found in look(tmp_path, "run", unwritable=True):
        assert not found["passed"]
        assert found["machine"]
        assert found["detail"].startswith("rank 1 (")
