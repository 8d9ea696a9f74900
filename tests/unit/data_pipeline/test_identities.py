"""Removal lists and samples meet however either writes the same thing: an opt-out is honoured, or refused."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_pipeline.config import DataConfig
from data_pipeline.errors import DataError
from data_pipeline.loader import build_loader
from trainer.__main__ import main

COUNT = 12
GONE = {2, 7}
UUIDS = {i: f"{i:08x}-0000-4000-8000-00000000ABCD" for i in range(COUNT)}


def url_of(i: int) -> str:
    return f"http://x.invalid/{i}.jpg"


def md5_of(i: int) -> str:
    return hashlib.md5(str(i).encode()).hexdigest()


def make_set(
    folder: Path,
    write_tar: Any,
    tiny_picture: Any,
    record: Callable[[int], bytes] | None = None,
    columns: dict[str, Any] | None = None,
) -> str:
    """One shard of img2dataset's layout; `record` gives its json members, `columns` the parquet beside it."""
    members = []
    for i in range(COUNT):
        members.append((f"{i:09d}.jpg", tiny_picture(i)))
        members.append((f"{i:09d}.txt", b"caption"))
        if record is not None:
            members.append((f"{i:09d}.json", record(i)))
    write_tar(folder / "set" / "00000.tar", members)
    if columns is not None:
        table = pa.table({"key": [f"{i:09d}" for i in range(COUNT)], **columns})
        pq.write_table(table, folder / "set" / "00000.parquet")
    return str(folder / "set" / "*.tar")


def removed(url: str, listed: Path, content: bytes, order: str = "indexed") -> set[int]:
    listed.write_bytes(content)
    config = DataConfig(
        shards=url,
        order=order,  # type: ignore[arg-type]
        image_size=16,
        workers=1 if order == "resampled" else 0,
        shuffle_window=4,
        lanes=1,
        removal_lists=(str(listed),),
    )
    with build_loader(config, seed=1, global_batch_size=4) as loader:
        served = {int(key.split("/")[1]) for _ in range(8) for key in next(loader).keys}
    return set(range(COUNT)) - served


LINES = {
    "listing of tar": "./00000000{}.jpg",
    "another member": "00000000{}.json",
    "bullet": "- 00000000{}",
    "star": "* 00000/00000000{}",
    "comment": "00000000{}  # asked by its owner",
    "single quotes": "'00000000{}'",
    "end of a cell": '"00000000{}",',
    "all at once": "- '00000000{}',  # asked",
    "number of a table": "{}",
    "number with a fraction": "{}.0",
    "number behind its shard": "0/{}",
    "URL with a comment": "http://x.invalid/{}.jpg # asked",
    "URL as a cell": '"http://x.invalid/{}.jpg",',
    "URL and semicolon": "http://x.invalid/{}.jpg;",
    "key of YAML": "- key: 00000000{}",
    "key of YAML in quotes": "key: '00000000{}'  # asked",
    "URL of YAML": "- url: http://x.invalid/{}.jpg",
    "key of settings": 'KEY = "00000000{}"',
}


@pytest.mark.parametrize("form", LINES)
def test_lines_of_every_form_remove_their_samples(
    tmp_path: Path, write_tar: Any, tiny_picture: Any, form: str
) -> None:
    url = make_set(tmp_path, write_tar, tiny_picture, lambda i: json.dumps({"url": url_of(i)}).encode())
    content = "".join(LINES[form].format(i) + "\n" for i in sorted(GONE)).encode()
    assert removed(url, tmp_path / "list", content) == GONE


@pytest.mark.parametrize("order", ["indexed", "resampled"])
@pytest.mark.parametrize("field", ["URL", "Md5", "uid"])
def test_fields_in_any_case_and_spelling(
    tmp_path: Path, write_tar: Any, tiny_picture: Any, field: str, order: str
) -> None:
    values = {"URL": url_of, "Md5": md5_of, "uid": lambda i: UUIDS[i]}[field]
    url = make_set(tmp_path, write_tar, tiny_picture, lambda i: json.dumps({field: values(i)}).encode())
    spelled = {
        "URL": url_of,
        "Md5": lambda i: ":".join(md5_of(i)[k : k + 2] for k in range(0, 32, 2)).upper(),
        "uid": lambda i: UUIDS[i].replace("-", "").lower(),
    }[field]
    content = "".join(spelled(i) + "\n" for i in sorted(GONE)).encode()
    assert removed(url, tmp_path / "list", content, order) >= GONE
    assert len(removed(url, tmp_path / "list", content, order)) < COUNT


COLUMNS: dict[str, tuple[dict[str, Any], Callable[[int], str]]] = {
    "binary URL": ({"URL": pa.array([url_of(i).encode() for i in range(COUNT)], pa.binary())}, url_of),
    "binary digest": ({"md5": pa.array([bytes.fromhex(md5_of(i)) for i in range(COUNT)])}, md5_of),
    "whole numbers as floats": (
        {"hash": pa.array([None, *(float(i + 100) for i in range(1, COUNT))])},
        lambda i: json.dumps({"hash": i + 100}),
    ),
}


@pytest.mark.parametrize("name", COLUMNS)
def test_columns_of_every_type(tmp_path: Path, write_tar: Any, tiny_picture: Any, name: str) -> None:
    columns, spelled = COLUMNS[name]
    url = make_set(tmp_path, write_tar, tiny_picture, columns=columns)
    content = "".join(spelled(i) + "\n" for i in sorted(GONE)).encode()
    assert removed(url, tmp_path / "list", content) == GONE


def test_a_hash_that_is_a_number_is_not_a_key(tmp_path: Path, write_tar: Any, tiny_picture: Any) -> None:
    url = make_set(tmp_path, write_tar, tiny_picture, lambda i: json.dumps({"hash": i + 3}).encode())
    assert removed(url, tmp_path / "list", b'{"hash": 5}\n{"hash": 10}\n') == GONE


def test_two_columns_of_one_name_both_count(tmp_path: Path, write_tar: Any, tiny_picture: Any) -> None:
    url = make_set(tmp_path, write_tar, tiny_picture, lambda i: json.dumps({"url": url_of(i)}).encode())
    assert removed(url, tmp_path / "list", f"url,URL\n{url_of(2)},{url_of(7)}\n".encode()) == GONE
    out = io.BytesIO()
    pq.write_table(pa.table([[url_of(2)], [url_of(7)]], names=["url", "url"]), out)
    assert removed(url, tmp_path / "list", out.getvalue()) == GONE


@pytest.mark.parametrize(
    "content",
    [b"http://x.invalid/*\n", b"*.x.invalid\n", b"https://*.x.invalid/a\n", b"Obj\x01\x04\x16avro\n"],
)
def test_patterns_and_other_formats_are_refused(
    tmp_path: Path, write_tar: Any, tiny_picture: Any, content: bytes
) -> None:
    url = make_set(tmp_path, write_tar, tiny_picture)
    with pytest.raises(DataError, match=r"line 1: .*(patterns are not read; name each URL|it is not a text)"):
        removed(url, tmp_path / "list", content)


def test_large_jsons_are_read_and_unreadable_ones_told(
    tmp_path: Path, write_tar: Any, tiny_picture: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    large = lambda i: json.dumps({"exif": "x" * 1_100_000, "url": url_of(i)}).encode()  # noqa: E731
    url = make_set(tmp_path / "large", write_tar, tiny_picture, large)
    assert removed(url, tmp_path / "list", f"{url_of(2)}\n{url_of(7)}\n".encode()) == GONE
    latin = lambda i: b'{"url": "http://x.invalid/caf\xe9"}' if i in GONE else b"{}"  # noqa: E731
    url = make_set(tmp_path / "latin", write_tar, tiny_picture, latin)
    assert main(["data", "index", url, "--workers", "0"]) == 0
    said = capsys.readouterr().out
    assert (
        "00000.tar: 2 json members, first '000000002.json', are no JSON objects in UTF-8 of at most 4" in said
    )
