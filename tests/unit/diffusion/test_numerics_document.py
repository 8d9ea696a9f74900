"""docs/numerics.md names only tests and files that exist."""

from __future__ import annotations

import re
from pathlib import Path

from data_pipeline.order.draws import Draw
from trainer.rng import Purpose

ROOT = Path(__file__).parents[3]
PURPOSES = ("| `Draw.", "| `Purpose.")


def test_every_named_test_exists():
    text = (ROOT / "docs" / "numerics.md").read_text()
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", text)
    assert len(named) > 40
    missing = [
        f"{path}::{name}"
        for path, name in named
        if not (ROOT / path).is_file() or f"def {name}(" not in (ROOT / path).read_text()
    ]
    assert missing == []


def test_every_row_of_a_table_names_its_proof():
    rows = [
        line
        for line in (ROOT / "docs" / "numerics.md").read_text().splitlines()
        if line.startswith("|") and not line.startswith(("| claim", "|---", "| purpose", *PURPOSES))
    ]
    assert rows
    assert [row for row in rows if not re.search(r"`(tests|benchmarks)/[\w/]+\.py", row)] == []


def test_every_random_purpose_is_listed_where_it_is_drawn():
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in (ROOT / "docs" / "numerics.md").read_text().splitlines()
        if line.startswith(PURPOSES)
    ]
    members = {f"`{type(member).__name__}.{member.name}`": member.value for member in (*Draw, *Purpose)}
    assert {row[0]: int(row[1]) for row in rows} == members
    for name, _, _, _, files in rows:
        for file in files.split(", "):
            assert re.search(rf"\b{name.strip('`')}\b", (ROOT / file.strip("`")).read_text()), (name, file)
