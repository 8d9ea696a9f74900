"""What `ldm data inspect` says of columns, and what the filter language says of other languages' signs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from data_pipeline.errors import DataError
from data_pipeline.shards.filters import Filter
from trainer.__main__ import main

LANGUAGES = ["de"] * 12 + ["en"] * 6 + [None] * 2


def test_texts_and_what_the_index_leaves_out_are_listed(
    tmp_path: Path, write_tar, tiny_picture, capsys
) -> None:
    members = []
    for i, language in enumerate(LANGUAGES):
        record = {
            "LANGUAGE": language,
            "score": i / 20,
            "note": f"a text of its own, number {i}",
            "void": None,
        }
        members += [(f"{i:03d}.jpg", tiny_picture(i)), (f"{i:03d}.caption", b"from a member")]
        members.append((f"{i:03d}.json", json.dumps(record).encode()))
    write_tar(tmp_path / "0.tar", members)
    assert main(["data", "inspect", str(tmp_path), "--sheet", str(tmp_path / "sheet.png")]) == 0
    lines = capsys.readouterr().out.splitlines()
    columns = {line.split()[1]: line for line in lines if line.startswith("column ")}
    assert columns["LANGUAGE"].endswith("2 texts: 'de' (12), 'en' (6); 2 without")
    assert "min 0, median 0.475, max 0.95, 0 missing" in columns["score"]
    assert columns["note"].endswith("long or varied values in 1 shards: not in the index")
    assert "void" not in columns
    assert any("'from a member' (20)" in line for line in lines)


@pytest.mark.parametrize(("text", "word"), [("safe = 1", "=="), ("a > 1 & b > 1", "and"), ("!safe", "not")])
def test_signs_of_other_languages_are_translated(text: str, word: str) -> None:
    with pytest.raises(DataError, match=f"no meaning here; write {word} "):
        Filter(text)


@pytest.mark.parametrize("text", ["safe == True", "safe == true", "safe == TRUE", "safe", "safe == 1"])
@pytest.mark.parametrize("value", [True, 1, "True", "true", "1"])
def test_true_is_one_however_it_is_written(text: str, value: object) -> None:
    assert Filter(text).check({"safe": value}) is None
    assert Filter(text).check({"safe": False}) == f"filter: {text}"
    assert Filter(f"not {text}").check({"safe": "false"}) is None
