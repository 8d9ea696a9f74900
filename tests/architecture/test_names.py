"""Names say one thing: no two classes share one, and a file of tests does not repeat its folder.

Classes: across both packages, private and nested ones alike (`_Window` beside `Window` would be a pair),
since a reader of a traceback or of a type in a signature does not see the import. Names that the papers'
codes share between networks (Downsample, Attention) are told apart too; state dicts are keyed by
attributes, which keep theirs.
"""

from __future__ import annotations

import ast
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGES = ("trainer", "data_pipeline")


def test_no_two_classes_share_a_name() -> None:
    places: dict[str, list[str]] = defaultdict(list)
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.ClassDef):
                    places[node.name.lstrip("_")].append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert {"Order", "Batch", "UNet", "Engine"} <= places.keys()  # the walk has seen both packages
    assert {name: found for name, found in places.items() if len(found) > 1} == {}


def test_no_file_of_tests_repeats_its_folder() -> None:
    found = sorted((ROOT / "tests").rglob("test_*.py"))
    assert Path(__file__) in found
    told_twice = [path for path in found if set(_words(path.stem)[1:2]) & set(_words(path.parent.name))]
    assert [str(path.relative_to(ROOT)) for path in told_twice] == []


def _words(name: str) -> list[str]:
    return [word.removesuffix("s") for word in name.split("_")]
