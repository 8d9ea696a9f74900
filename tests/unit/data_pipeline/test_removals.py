"""Removal lists: every form in which people keep them removes exactly its samples, or is refused."""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_pipeline.config import DataConfig
from data_pipeline.errors import DataError
from data_pipeline.loader import build_loader
from data_pipeline.shards import removal_entries
from trainer.__main__ import main

HASHES = ("md5", "sha1", "sha256", "sha512")
FIELDS = ("key", "url", *HASHES)
COUNT = 12
GONE = (2, 7)


def sample(i: int) -> dict[str, str]:
    """What identifies the i-th sample; sha1 is in the parquet alone, md5 in upper case."""
    key = f"{i:09d}"
    digests = {name: hashlib.new(name, key.encode()).hexdigest() for name in HASHES}
    return {"key": key, "url": f"http://x.invalid/a,b/{key}.jpg?w=1;h=2", **digests}


@pytest.fixture(name="shards")
def shards_fixture(tmp_path: Path, write_tar: Any, tiny_picture: Any) -> str:
    """A set of img2dataset: a tar and the parquet beside it."""
    members = []
    for i in range(COUNT):
        record = sample(i)
        record.pop("sha1")
        record["md5"] = record["md5"].upper()
        whole = {**record, "hash": i - 5, "uid": "\ud800"}  # numbers as LAION has them; half a character
        members += [
            (f"{record['key']}.jpg", tiny_picture(i)),
            (f"{record['key']}.json", json.dumps(whole).encode()),
            (f"{record['key']}.txt", b"caption"),
        ]
    write_tar(tmp_path / "set" / "00000.tar", members)
    table = pa.table({name: [sample(i)[name] for i in range(COUNT)] for name in ("key", "sha1")})
    pq.write_table(table, tmp_path / "set" / "00000.parquet")
    return str(tmp_path / "set" / "*.tar")


def served(url: str, *lists: Path, order: str = "indexed") -> tuple[set[int], Counter[str]]:
    config = DataConfig(
        shards=url,
        order=order,  # type: ignore[arg-type]
        image_size=16,
        workers=1 if order == "resampled" else 0,
        shuffle_window=4,
        lanes=1,
        removal_lists=tuple(map(str, lists)),
    )
    with build_loader(config, seed=1, global_batch_size=4) as loader:
        keys = {int(key.split("/")[1]) for _ in range(12) for key in next(loader).keys}
        return keys, loader.rejected


def write_csv(rows: Sequence[Mapping[str, str]], header: bool, delimiter: str = ",") -> bytes:
    out = io.StringIO()
    writer = csv.DictWriter(out, list(rows[0]), delimiter=delimiter)
    if header:
        writer.writeheader()
    writer.writerows(rows)
    return out.getvalue().encode()


def write_parquet(rows: Sequence[Mapping[str, str]]) -> bytes:
    out = io.BytesIO()
    pq.write_table(pa.Table.from_pylist([dict(row) for row in rows]), out)
    return out.getvalue()


def _plain(rows: Sequence[Mapping[str, str]], end: str = "\n") -> bytes:
    return "".join(value + end for row in rows for value in row.values()).encode()


FORMS: dict[str, Callable[[Sequence[Mapping[str, str]]], bytes]] = {
    "plain": _plain,
    "plain of Windows": lambda rows: b"\xef\xbb\xbf" + _plain(rows, "\r\n"),
    "plain of an old Mac": lambda rows: _plain(rows, "\r"),
    "csv": lambda rows: write_csv(rows, True),
    "csv of Excel": lambda rows: b"\xef\xbb\xbf" + write_csv(rows, True, ";").upper(),
    "csv of pandas": lambda rows: write_csv([{"": "0", **row, "caption": 'a "b", c'} for row in rows], True),
    "csv without header": lambda rows: write_csv(rows, False),
    "tsv": lambda rows: write_csv([{"": "", **row, "note": ""} for row in rows], True, "\t"),
    "tsv without header": lambda rows: write_csv(rows, False, "\t"),
    "json lines": lambda rows: "\n".join(json.dumps({"width": 3, **row}) for row in rows).encode(),
    "json array": lambda rows: json.dumps(list(rows), indent=1).encode(),
    "json array of texts": lambda rows: json.dumps([v for row in rows for v in row.values()]).encode(),
    "parquet": write_parquet,
}


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_each_form_removes_its_samples_by_each_identifier(
    shards: str, tmp_path: Path, form: str, zipped: bool
) -> None:
    for field in FIELDS:
        if form == "csv of Excel" and field == "url":
            continue  # `upper` would change it
        content = FORMS[form]([{field: sample(i)[field]} for i in GONE])
        listed = tmp_path / "list"  # no ending: what counts is the content
        listed.write_bytes(gzip.compress(content) if zipped else content)
        keys, rejected = served(shards, listed)
        assert keys == set(range(COUNT)) - set(GONE), field
        assert rejected["removed: list"] >= len(GONE)


@pytest.mark.parametrize(
    "form", [f for f in FORMS if "plain" not in f and "Excel" not in f and "texts" not in f]
)
def test_every_field_of_a_line_counts(shards: str, tmp_path: Path, form: str) -> None:
    """Of the first row only the URL is known, of the second only the digest."""
    rows = [
        {"key": "unknown", "url": sample(2)["url"], "sha512": "0" * 128},
        {"key": "elsewhere", "url": "http://x.invalid/other", "sha512": sample(7)["sha512"]},
    ]
    (tmp_path / "list").write_bytes(FORMS[form](rows))
    assert served(shards, tmp_path / "list")[0] == set(range(COUNT)) - set(GONE)


def test_digests_in_any_spelling(shards: str, tmp_path: Path) -> None:
    lines = [
        sample(0)["sha512"].upper(),
        "sha256:" + sample(1)["sha256"],
        "0x" + sample(2)["md5"],
        sample(3)["sha1"] + "  some/file of mine.jpg",
        '"' + sample(4)["url"] + '"',
        f"00000/{sample(5)['key']}",
        "# " + sample(6)["key"],
        json.dumps({"SHARD": "00000.tar", "Key": sample(7)["key"]}),
        json.dumps({"shard": "00001.tar", "key": sample(8)["key"]}),
        f"{sample(9)['key']} {sample(10)['url']}",
        f"00000.tar/{sample(11)['key']}.jpg",
        f"00001.tar/{sample(6)['key']}.jpg",
    ]
    (tmp_path / "list").write_text("\n".join(lines))
    assert served(shards, tmp_path / "list")[0] == {6, 8}


def test_numbers_and_half_characters(shards: str, tmp_path: Path) -> None:
    (tmp_path / "list").write_text('{"hash": -3}\n{"hash": 2, "uid": "\\ud801"}\n')
    assert served(shards, tmp_path / "list")[0] == set(range(COUNT)) - set(GONE)


def test_digests_in_binary_columns_of_parquet(shards: str, tmp_path: Path) -> None:
    table = pa.table({"SHA256": [bytes.fromhex(sample(i)["sha256"]) for i in GONE], "width": [1, 2]})
    pq.write_table(table, tmp_path / "list")
    assert served(shards, tmp_path / "list")[0] == set(range(COUNT)) - set(GONE)


def test_resampled_order_honours_every_field(shards: str, tmp_path: Path) -> None:
    lines = [sample(1)["key"], sample(2)["url"], sample(7)["sha512"].upper(), sample(9)["md5"]]
    (tmp_path / "list").write_text("\n".join(lines))
    keys, rejected = served(shards, tmp_path / "list", order="resampled")
    assert not keys & {1, 2, 7, 9}
    assert rejected["removed: list"]


def test_start_says_what_each_list_holds_and_the_loader_what_it_removed(
    shards: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first, second, none = tmp_path / "first.csv", tmp_path / "second.txt", tmp_path / "none.csv"
    first.write_bytes(write_csv([{k: sample(2)[k] for k in ("key", "sha512")}], True))
    second.write_text(f"{sample(2)['key']}\n{sample(7)['url']}\n00000/x\n")
    none.write_text("key,url\n")
    with caplog.at_level(logging.INFO):
        _, rejected = served(shards, first, second, none)
    assert f"removal list {first} holds 1 key, 1 sha512" in caplog.messages
    assert f"removal list {second} holds 1 key, 1 shard/key, 1 url" in caplog.messages
    assert f"removal list {none} holds no entry: nothing is removed by it" in caplog.messages
    # Nearly five epochs of 12: sample 2 counts for the first list that has it.
    assert rejected["removed: first.csv"] >= 4
    assert rejected["removed: second.txt"] >= 4
    assert rejected["removed: none.csv"] == 0


REFUSED = {
    "empty": (b"", "the file is empty; take it out of data.removal_lists"),
    "empty after unpacking": (gzip.compress(b""), "the file is empty"),
    "cut gzip": (gzip.compress(b"a\n" * 9999)[:-20], "cut short or damaged"),
    "gzip twice": (gzip.compress(gzip.compress(b"a")), "compressed twice"),
    "zip": (b"PK\x03\x04 and so on", "a zip file; write it as plain text, CSV, JSON lines or Parquet"),
    "utf-16": ("key\n".encode("utf-16"), "UTF-16"),
    "utf-16 without mark": ("key\n".encode("utf-16-le"), "line 1: it is not a text"),
    "latin-1": (b"a\nb\nc\xe9\n", "line 3: it is no UTF-8"),
    "page": (b"<!DOCTYPE html>", "HTML"),
    "damaged parquet": (b"PAR1 but no more", "the Parquet file is damaged"),
    "json line of no use": (b'k\n{"caption": "x"}\n', "line 2: it names no sample: give one of key"),
    "toml": (b'removed = ["000000001"]\n', "line 1: .* looks like a piece of a program or of settings"),
    "sql": (b"INSERT INTO gone VALUES ('000000001');\n", "line 1: .* looks like a piece of a program"),
    "digest of YAML that is none": (b"md5: 12\n", "line 1: '12' is no md5"),
    "json over lines": (b'{\n "key": "a"\n}\n', "line 1: it is no JSON object.*on one line"),
    "key as number": (b'{"key": 123}\n', "line 1: key is 123, which is no text; write it in quotes"),
    "digest in base64": (
        b'{"sha256": "LPJNul+wow4m6Dsqxbning=="}\n',
        "is no sha256; write it as 64 hexadecimal",
    ),
    "unknown header": (b"id,link\n1,2\n", "line 1: 'id,link' has several columns.*name the columns"),
    "columns without header": (b"a\nb\tc\n", "line 2: .*no header"),
    "cells too many": (b"url,key\nhttp://x/a,b,c\n", "line 2: it has 3 cells and the header 2; put cells"),
    "quotes left open": (b'key,url\n"a,b\n', "line 2: .*put cells in quotes"),
    "array of numbers": (b'["a", 5]', "entry 2: '5' is neither a text nor an object"),
    "broken array": (b'["a", ', "begins like a JSON array and is none"),
    "line without end": (b"a\n" + b"b" * 2_000_000, "line 2: it is longer than 1,048,576 bytes"),
    "cell without end": (b"a," + b"b" * 200_000, "line 1: field larger than field limit"),
    "columns of another name": (
        write_parquet([{"id": "a"}]),
        "its columns are id; one of them must be called key",
    ),
    "keys as numbers": (write_parquet([{"key": 7}]), "row 1: key is 7, which is no text"),  # type: ignore[dict-item]
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_read_with_certainty_is_refused(shards: str, tmp_path: Path, name: str) -> None:
    content, sentence = REFUSED[name]
    listed = tmp_path / "list.txt"
    listed.write_bytes(content)
    with pytest.raises(DataError, match=f"(?s)Removal list {listed}.*{sentence}"):
        served(shards, listed)


@pytest.mark.parametrize("content", [b"0123456789\n" * 2000, json.dumps(["a" * 9] * 2000).encode()])
def test_what_unpacks_without_end_is_refused(
    shards: str, tmp_path: Path, content: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(removal_entries, "_MAX_BYTES", 10_000)
    monkeypatch.setattr(removal_entries, "_MAX_ARRAY", 10_000)
    (tmp_path / "list").write_bytes(gzip.compress(content))
    with pytest.raises(DataError, match="larger than 10,000 bytes when unpacked"):
        served(shards, tmp_path / "list")


def test_inspect_lists_entries_that_match_nothing(
    shards: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text, table = tmp_path / "a.txt", tmp_path / "b"
    text.write_text(f"# opt-outs\n{sample(2)['key']}\nnobody\n\n{sample(7)['sha512']}\n")
    rows = [{"key": "x", "url": sample(3)["url"]}, {"key": "y", "url": "http://y"}]
    table.write_bytes(write_parquet(rows))
    lists = ["--removal-list", str(text), "--removal-list", str(table)]
    assert main(["data", "inspect", shards, "--sheet", str(tmp_path / "sheet.png"), *lists]) == 0
    printed = capsys.readouterr().out
    assert "a.txt: entries 3, samples matched 2, entries without a match 1: line 3\n" in printed
    assert "b: entries 2, samples matched 1, entries without a match 1: row 2\n" in printed


def test_a_list_that_cannot_be_read_ends_with_code_2(shards: str, tmp_path: Path) -> None:
    (tmp_path / "list").write_text("id,link\n1,2\n")
    assert main(["data", "inspect", shards, "--removal-list", str(tmp_path / "list")]) == 2
