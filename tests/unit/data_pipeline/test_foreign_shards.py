"""Shards as other programs leave them: tars, texts, parquets, names of columns."""

from __future__ import annotations

import io
import subprocess
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_pipeline.config import DataConfig
from data_pipeline.errors import DataError
from data_pipeline.loader import build_loader
from data_pipeline.storage.urls import expand_braces
from trainer.__main__ import main

COUNT = 8
SCORES = [i / 10 for i in range(COUNT)]


def make_tar(path: Path, write_tar: Any, tiny_picture: Any, text: Any = lambda i: b"caption") -> None:
    members = []
    for i in range(COUNT):
        members += [(f"{i:09d}.jpg", tiny_picture(i)), (f"{i:09d}.txt", text(i))]
    write_tar(path, members)


def served(url: str, **changes: Any) -> dict[int, str]:
    """Captions by key of all that is served."""
    config = DataConfig(
        shards=url, image_size=16, workers=0, shuffle_window=4, lanes=1, max_rejected_share=1.0, **changes
    )
    with build_loader(config, seed=1, global_batch_size=4) as loader:
        batches = [next(loader) for _ in range(6)]
    return {
        int(key.split("/")[1]): caption
        for batch in batches
        for key, caption in zip(batch.keys, batch.captions, strict=True)
    }


def told(url: str, capsys: pytest.CaptureFixture[str]) -> str:
    assert main(["data", "index", url, "--workers", "0"]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("version", ["0.0", "0.1", "1.0"])
def test_pieces_of_a_sparse_file_are_no_picture(
    tmp_path: Path, tiny_picture: Any, capsys: pytest.CaptureFixture[str], version: str
) -> None:
    for i in range(2):
        (tmp_path / f"{i}.txt").write_text("caption")
        with (tmp_path / f"{i}.jpg").open("wb") as file:
            file.write(tiny_picture(i))
            file.truncate(1_000_000 * i or None)
    command = ["tar", "-S", "--format=posix", f"--sparse-version={version}", "--sort=name", "-cf", "x.tar"]
    subprocess.run([*command, "0.jpg", "0.txt", "1.jpg", "1.txt"], cwd=tmp_path, check=True)
    said = told(str(tmp_path / "x.tar"), capsys)
    assert "samples           2" in said
    assert "sparse member '1.jpg' is not supported; write it again without `tar --sparse`" in said
    assert _keys(tmp_path) == {"0"}


def _keys(folder: Path) -> set[str]:
    config = DataConfig(
        shards=str(folder / "*.tar"), image_size=16, workers=0, lanes=1, max_rejected_share=1.0
    )
    with build_loader(config, seed=1, global_batch_size=2) as loader:
        return {key.split("/")[1] for _ in range(3) for key in next(loader).keys}


def test_sums_of_signed_bytes(tmp_path: Path, write_tar: Any, tiny_picture: Any) -> None:
    """As SunOS' tar wrote them; GNU tar reads both."""
    write_tar(tmp_path / "x.tar", [("é.jpg", tiny_picture(1)), ("é.txt", b"caption")])
    raw = bytearray((tmp_path / "x.tar").read_bytes())
    for start in (i for i in range(0, len(raw), 512) if raw[i + 257 : i + 262] == b"ustar"):
        header = bytes(raw[start : start + 512])
        total = int(header[148:154], 8) - 256 * sum(b > 127 for b in header)
        raw[start + 148 : start + 154] = f"{total:06o}".encode()
    (tmp_path / "x.tar").write_bytes(raw)
    assert _keys(tmp_path) == {"é"}


@pytest.mark.parametrize("encoding", ["utf-16", "utf-8-sig"])
def test_texts_with_a_mark_are_read(
    tmp_path: Path, write_tar: Any, tiny_picture: Any, encoding: str, capsys: pytest.CaptureFixture[str]
) -> None:
    make_tar(tmp_path / "00000.tar", write_tar, tiny_picture, lambda i: f"a réd {i}".encode(encoding))
    assert served(str(tmp_path / "*.tar")) == {i: f"a réd {i}" for i in range(COUNT)}
    assert "problem" not in told(str(tmp_path / "*.tar"), capsys)


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16-le"])
def test_texts_in_other_encodings_are_told(
    tmp_path: Path, write_tar: Any, tiny_picture: Any, encoding: str, capsys: pytest.CaptureFixture[str]
) -> None:
    text = lambda i: "a réd".encode(encoding if i > 5 else "utf-8")  # noqa: E731
    make_tar(tmp_path / "00000.tar", write_tar, tiny_picture, text)
    assert "2 txt members, first '000000006.txt', are no UTF-8" in told(str(tmp_path / "*.tar"), capsys)


PARQUETS: dict[str, tuple[str, dict[str, Any]]] = {
    "Key": ("Key", {}),
    "__key__": ("__key__", {}),
    "a zone that is unknown": ("key", {"t": pa.array([0] * COUNT, pa.timestamp("us", tz="No/Such"))}),
}


@pytest.mark.parametrize("name", PARQUETS)
def test_parquets_of_others_are_read(tmp_path: Path, write_tar: Any, tiny_picture: Any, name: str) -> None:
    make_tar(tmp_path / "00000.tar", write_tar, tiny_picture)
    key, columns = PARQUETS[name]
    captions = [f"of the table {i}, long enough" for i in range(COUNT)]
    table = {key: [f"{i:09d}" for i in range(COUNT)], **columns, "score": SCORES, "caption": captions}
    pq.write_table(pa.table(table), tmp_path / "00000.parquet")
    found = served(str(tmp_path / "*.tar"), filter="score < 0.25", captions=("caption",))
    assert found == {i: captions[i] for i in range(3)}


def test_a_parquet_of_no_use_is_named_where_its_column_is_missed(
    tmp_path: Path, write_tar: Any, tiny_picture: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    make_tar(tmp_path / "00000.tar", write_tar, tiny_picture)
    pq.write_table(pa.table({"score": SCORES, "caption": ["x"] * COUNT}), tmp_path / "00000.parquet")
    why = "parquet 00000.parquet has no column key that names the samples"
    with pytest.raises(DataError, match=f"the column score.*{why}"):
        served(str(tmp_path / "*.tar"), filter="score < 1")
    with pytest.raises(DataError, match=f"data.captions names caption.*{why}"):
        served(str(tmp_path / "*.tar"), captions=("caption",))
    keys = [f"{i:09d}" for i in range(COUNT)]
    out = io.BytesIO()
    pq.write_table(pa.table([keys, SCORES, SCORES], names=["key", "score", "score"]), out)
    (tmp_path / "00000.parquet").write_bytes(out.getvalue())
    (tmp_path / "_index" / "manifest.jsonl.gz").unlink()
    assert "00000.parquet has two columns score" in told(str(tmp_path / "*.tar"), capsys)
    pq.write_table(pa.table({"key": [*keys, keys[3]], "score": [*SCORES, 0.9]}), tmp_path / "00000.parquet")
    (tmp_path / "_index" / "manifest.jsonl.gz").unlink()
    assert "1 rows of 00000.parquet have the key of another" in told(str(tmp_path / "*.tar"), capsys)


@pytest.mark.parametrize("name", ["clip-similarity", "aesthetic score", "LAION.a", "größe", "and", "2d"])
def test_columns_of_any_name_can_be_written(
    tmp_path: Path, write_tar: Any, tiny_picture: Any, name: str
) -> None:
    make_tar(tmp_path / "00000.tar", write_tar, tiny_picture)
    table = {"key": [f"{i:09d}" for i in range(COUNT)], name: SCORES}
    pq.write_table(pa.table(table), tmp_path / "00000.parquet")
    assert set(served(str(tmp_path / "*.tar"), filter=f"`{name}` < 0.25 and 0 <= `{name}`")) == {0, 1, 2}
    written = name if name == "größe" else f"`{name}`"
    with pytest.raises(DataError, match=f"the nearest is {written} "):
        served(str(tmp_path / "*.tar"), filter=f"`{name}s` < 0.25")


@pytest.mark.parametrize("inner", ["a..c", "00000..00009..2", "0-9..", "..9"])
def test_a_range_that_is_none_is_said(inner: str) -> None:
    with pytest.raises(DataError, match=r"is no range of numbers; write [{]first..last[}]"):
        expand_braces(f"/data/{{{inner}}}.tar")
