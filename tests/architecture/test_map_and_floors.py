"""What docs/architecture.md says about the house holds of the house."""

from __future__ import annotations

import configparser
import inspect
import re
from pathlib import Path

from trainer.stages.stage import Stage

ROOT = Path(__file__).parents[2]
DOCUMENT = (ROOT / "docs/architecture.md").read_text()


def test_the_map_is_the_tree() -> None:
    drawn = DOCUMENT.split("## The map")[1].split("```")[1]
    for package in ("data_pipeline", "trainer"):
        text = drawn.split(f"{package}/")[1].split("\ntrainer/")[0]
        folders = {path.name for path in (ROOT / package).iterdir() if (path / "__init__.py").exists()}
        assert set(re.findall(r"(\w+)/(?=[\s])", text)) == folders, package
        for name in re.findall(r"\b(\w+\.py)\b", text):
            assert (ROOT / package / name).exists(), name


def test_every_module_at_the_top_is_on_the_map() -> None:
    drawn = DOCUMENT.split("## The map")[1].split("```")[1]
    for package in ("data_pipeline", "trainer"):
        text = drawn.split(f"{package}/")[1].split("\ntrainer/")[0]
        modules = {path.stem for path in (ROOT / package).glob("*.py")} - {"__init__"}
        assert modules <= set(re.findall(r"\w+", text)), package


def test_imports_go_the_way_that_is_written() -> None:
    written = DOCUMENT.split("## Imports go one way")[1].split("```")[1]
    contract = configparser.ConfigParser()
    contract.read(ROOT / ".importlinter")
    floors = contract["importlinter:contract:trainer"]["layers"].split("\n")
    assert [set(floor.split(" | ")) for floor in map(str.strip, written.split(">"))] == [
        *(set(floor.split(" | ")) for floor in floors if floor),
        {"data_pipeline"},
    ]


def test_paths_exist() -> None:
    for path in set(re.findall(r"`((?:trainer|data_pipeline|docs|tests)/[\w./]+?)(?::\w+)?`", DOCUMENT)):
        assert (ROOT / path).exists(), path


def test_a_stage_has_the_methods_that_are_counted() -> None:
    methods = [name for name, _ in inspect.getmembers(Stage, inspect.isfunction) if not name.startswith("_")]
    named = re.findall(r"`(\w+)`", DOCUMENT.split("`Stage` of six methods:")[1].split(". The")[0])
    assert sorted(methods) == sorted(named)
    assert len(methods) == 6
