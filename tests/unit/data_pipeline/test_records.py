"""Texts that no encoding can write: halves of surrogate pairs, names in Latin-1, fields with any name."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_pipeline.config import DataConfig
from data_pipeline.feed.captions import choose_caption
from data_pipeline.loader import build_loader
from data_pipeline.shards.build_index import build_index
from data_pipeline.shards.manifest import read_manifest
from data_pipeline.shards.read_index import read_index
from data_pipeline.shards.records import clean, is_blank, parse_record
from data_pipeline.storage.listing import list_files
from trainer.__main__ import main

HALF = "\ud83d"
FIELDS = [f"cut {HALF}", "a\0b", "a", "x" * 70_000, "n/a:1", "\u2028"]


def write_set(folder: Path, write_tar, tiny_picture, **options: object) -> None:
    """Six samples whose urls, hashes, captions and field names hold halves."""
    members = []
    for i in range(6):
        record = {name: i + place / 10 for place, name in enumerate(FIELDS)}
        record |= {"url": f"http://x.invalid/{i}{HALF}", "hash": f"{HALF}{i}", "status": f"ok{HALF}"}
        record |= {"caption": f"a cat {HALF} {i}", "nested": {HALF: [HALF]}, "pair": "\U0001f600"}
        members += [(f"{i}.jpg", tiny_picture(i)), (f"{i}.json", json.dumps(record).encode())]
        members.append((f"{i}.txt", f"text {i}".encode() + b"\xed\xa0\xbd"))
    write_tar(folder / "0.tar", members, **options)


@pytest.mark.parametrize("order", ["indexed", "resampled"])
def test_every_command_takes_them(
    tmp_path: Path, write_tar, tiny_picture, order: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write_set(tmp_path, write_tar, tiny_picture)
    (tmp_path / "gone.jsonl").write_text(json.dumps({"url": f"http://x.invalid/2{HALF}"}))
    config = DataConfig(
        shards=str(tmp_path / "*.tar"),
        order=order,  # type: ignore[arg-type]
        image_size=16,
        workers=0,
        captions=("caption",),
        filter="a >= 1",
        removal_lists=(str(tmp_path / "gone.jsonl"),),
        reject_file=str(tmp_path / "rejects"),
    )
    with build_loader(config, seed=1, global_batch_size=2) as loader:
        served = {
            key: caption
            for _ in range(12)
            for batch in [next(loader)]
            for key, caption in zip(batch.keys, batch.captions, strict=True)
        }
        assert served == {f"0/{i}": f"a cat {i}" for i in (1, 3, 4, 5)}
        assert {"removed: gone.jsonl", "filter: a >= 1"} <= set(loader.rejected)
    assert main(["data", "inspect", str(tmp_path), "--sheet", str(tmp_path / "sheet.png")]) == 0
    assert "column cut \\ud83d" in capsys.readouterr().out
    assert main(["data", "index", str(tmp_path), "--workers", "1"]) == 0


def test_fields_with_any_name_are_columns_of_their_own(tmp_path: Path, write_tar, tiny_picture) -> None:
    write_set(tmp_path, write_tar, tiny_picture)
    shards = list_files(str(tmp_path))
    build_index(shards, str(tmp_path / "_index"))
    (row,) = read_manifest(str(tmp_path / "_index")).values()
    expected = [name.replace(HALF, "\\ud83d") for name in FIELDS]
    assert {*expected, "status", "pair"} <= set(row.columns)
    index = read_index(shards[0])
    for place, name in enumerate(expected):
        assert index.column(name).tolist() == pytest.approx([i + place / 10 for i in range(6)])


def test_parquet_with_bytes_that_are_no_utf8(tmp_path: Path, write_tar, tiny_picture) -> None:
    """One such value makes neither its column nor the others unreadable."""
    write_tar(tmp_path / "0.tar", [(f"{i}.jpg", tiny_picture(i)) for i in range(3)])
    texts = pa.array([b"caf\xe9", b"plain", None]).cast(pa.binary())
    damaged = pa.Array.from_buffers(pa.string(), 3, texts.buffers(), null_count=1)
    table = pa.table({"key": ["0", "1", "2"], "place": damaged, "score": [0.1, 0.2, 0.3]})
    pq.write_table(table, tmp_path / "0.parquet")
    index = read_index(list_files(str(tmp_path))[0])
    assert index.problems == ()
    assert index.column("score").tolist() == [0.1, 0.2, 0.3]
    assert index.column("place").tolist() == ["caf\ufffd", "plain", None]


def write_latin(path: Path, picture: bytes) -> None:
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT, encoding="latin-1") as tar:
        for name, content in (
            *(("caf\xe9.jpg", picture), ("caf\xe9.txt", b"acute")),
            *(("caf\xe8.jpg", picture), ("caf\xe8.txt", b"grave")),
        ):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


@pytest.mark.parametrize("order", ["indexed", "resampled"])
def test_names_in_latin_1_stay_different(tmp_path: Path, tiny_picture, order: str) -> None:
    write_latin(tmp_path / "0.tar", tiny_picture(1))
    url = str(tmp_path / "*.tar")
    config = DataConfig(shards=url, order=order, image_size=16, workers=0)  # type: ignore[arg-type]
    with build_loader(config, seed=1, global_batch_size=2) as loader:
        found = {
            k: c for _ in range(8) for b in [next(loader)] for k, c in zip(b.keys, b.captions, strict=True)
        }
    assert found == {"0/caf\\xe9": "acute", "0/caf\\xe8": "grave"}


@pytest.mark.parametrize("body", [b"", b" \n", b"\0\x01", "\u200b\u00a0\ufeff".encode(), b"\xed\xa0\xbd"])
def test_blank_is_what_leaves_no_caption(body: bytes) -> None:
    caption = choose_caption(["txt"], {"txt": body}, {}, require=False, seed=0, ordinal=0)
    assert is_blank(body) == (caption == "")
    assert not is_blank(body + b"a")
    assert not is_blank(b" " * 100 + "\u732b".encode())


def test_records_keep_their_values() -> None:
    record = parse_record(json.dumps({"a": HALF, "b": "\U0001f600", "\u00e9": 1}).encode())
    assert record == {"a": HALF, "b": "\U0001f600", "\u00e9": 1}
    assert clean(f"x {HALF} y") == "x y"
    assert parse_record(json.dumps({"k": 1}).encode("utf-16")) == {"k": 1}
    assert parse_record(b'["no object"]') is None
