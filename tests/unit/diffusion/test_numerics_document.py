"""docs/numerics.md names only tests and files that exist."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[3]


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
        if line.startswith("|") and not line.startswith(("| claim", "|---"))
    ]
    assert rows
    assert [row for row in rows if not re.search(r"`(tests|benchmarks)/[\w/]+\.py", row)] == []
