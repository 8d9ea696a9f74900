"""Texts that a person gives become what the same bytes become as captions of a shard."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_pipeline.errors import DataError, NotFound
from data_pipeline.feed.captions import choose_caption
from data_pipeline.tools.given import read_map, read_prompt, read_prompts

LINES = ["a  red\tcircle ", "cafe\u0301", "\u7d05\u3044\u5186", "a\u200bb", "\U0001f469\u200d\U0001f680"]


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_prompts_are_cleaned_as_captions(tmp_path: Path, end: str, mark: bytes) -> None:
    file = tmp_path / "prompts.txt"
    file.write_bytes(mark + end.join([*LINES, "", " \u200b "]).encode())
    captions = [
        choose_caption(["txt"], {"txt": mark + line.encode()}, {}, require=True, seed=0, ordinal=0)
        for line in LINES
    ]
    assert read_prompts(str(file)) == captions
    assert captions[:2] == ["a red circle", "caf\u00e9"]
    assert [read_prompt(line, "--prompt") for line in LINES] == captions


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("caf\u00e9".encode("latin-1"), "not in UTF-8"),
        ("a circle\n".encode("utf-16"), "in UTF-16; save it as UTF-8"),
        ("a circle\n".encode("utf-16-be"), "zero bytes"),
        ("a circle\n".encode("utf-16-le"), "zero bytes"),
        (b"\x89PNG\r\n\x1a\n", "not in UTF-8"),
    ],
)
def test_other_encodings_are_refused(tmp_path: Path, content: bytes, sentence: str) -> None:
    file = tmp_path / "prompts.txt"
    file.write_bytes(content)
    with pytest.raises(DataError, match=sentence):
        read_prompts(str(file))


def test_what_is_no_text_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is a folder"):
        read_prompts(str(tmp_path))
    with pytest.raises(NotFound):
        read_prompts(str(tmp_path / "nowhere.txt"))
    with pytest.raises(DataError, match=r"--prompt 'caf.udce9' is not UTF-8"):
        read_prompt("caf\udce9", "--prompt")


@pytest.mark.parametrize("value", [0.5, -1.0, 256.0, float("nan"), float("inf")])
def test_labels_are_whole_numbers(tmp_path: Path, value: float) -> None:
    """A TIFF of real numbers may hold labels, or levels, which would all be label 0."""
    values = np.arange(16, dtype=np.float32).reshape(4, 4)
    url = str(tmp_path / "map.tiff")
    Image.fromarray(values).save(url)
    assert np.array_equal(read_map(url, 100, labels=True).values, values.astype(np.uint8))
    values[1, 2] = value
    Image.fromarray(values).save(url)
    with pytest.raises(DataError, match="no whole number up to 255"):
        read_map(url, 100, labels=True)
