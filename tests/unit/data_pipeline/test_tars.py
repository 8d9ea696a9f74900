"""Tars of every origin, whole and broken, against the standard library's reading of them."""

from __future__ import annotations

import gc
import io
import shutil
import subprocess
import sys
import tarfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import webdataset as wds

from data_pipeline.errors import NotATar
from data_pipeline.shards.build_index import build_index, index_one
from data_pipeline.shards.grouping import group, split_name
from data_pipeline.shards.index import DEFECTS, decode_index
from data_pipeline.shards.read_index import read_index
from data_pipeline.shards.tars import TarScan, scan
from data_pipeline.storage.files import read_bytes
from data_pipeline.storage.listing import list_files

LONG = "deep/" * 25 + "x" * 60


def scan_bytes(raw: bytes, chunk: int = 1500) -> TarScan:
    return scan(lambda a, b: raw[a:b], len(raw), chunk=chunk)


def by_library(path: Path) -> list[tuple[str, int, int]]:
    with tarfile.open(path) as tar:
        return [(m.name, m.offset_data, m.size) for m in tar.getmembers() if m.isfile()]


@pytest.mark.parametrize("kind", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_python_tars(tmp_path: Path, write_tar, kind: int) -> None:
    names = ["a.jpg", "dir/b.v2.JPG", "c.txt", "empty.json"]
    names += [] if kind == tarfile.USTAR_FORMAT else [f"{LONG}.jpg", "ünïcode-ключ.png"]
    members = [(name, bytes([i]) * (700 * i)) for i, name in enumerate(names)]
    write_tar(tmp_path / "t.tar", members, format=kind)
    found = scan_bytes((tmp_path / "t.tar").read_bytes())
    assert [(m.name, m.offset, m.size) for m in found.members] == by_library(tmp_path / "t.tar")
    assert [m.name for m in found.members] == names
    assert found.problems == []


@pytest.mark.parametrize("kind", ["ustar", "pax", "gnu", "v7"])
def test_gnu_tar(tmp_path: Path, kind: str) -> None:
    if shutil.which("tar") is None:
        pytest.skip("no tar program")
    names = ["0001.jpg", "0001.txt", "sub/0002.jpg"] + ([f"{LONG}.jpg"] if kind in ("pax", "gnu") else [])
    for name in names:
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_bytes(name.encode() * 50)
    subprocess.run(
        ["tar", f"--format={kind}", "-cf", tmp_path / "t.tar", "-C", tmp_path / "in", "."], check=True
    )
    found = scan_bytes((tmp_path / "t.tar").read_bytes())
    assert [(m.name, m.offset, m.size) for m in found.members] == by_library(tmp_path / "t.tar")
    assert len(found.members) == len(names)


def test_webdataset_writer(tmp_path: Path, tiny_picture) -> None:
    with wds.ShardWriter(str(tmp_path / "%05d.tar"), maxcount=5, verbose=0) as writer:
        for i in range(12):
            writer.write({"__key__": f"dir/sample.{i:04d}", "jpg": tiny_picture(i), "txt": f"text {i}"})
    shards = list_files(str(tmp_path / "*.tar"))
    report = build_index(shards, str(tmp_path / "_index"))
    assert [r.samples for r in report.rows.values()] == [5, 5, 2]
    index = read_index(shards[0])
    assert [k.decode() for k in index.keys] == [f"dir/sample.{i:04d}" for i in range(5)]


@pytest.mark.parametrize(
    ("name", "key", "extension"),
    [
        ("000010005.jpg", "000010005", "jpg"),
        ("a/b.v2.JPG", "a/b.v2", "jpg"),
        ("x.seg.png", "x", "seg.png"),
        ("x.y.depth.PNG", "x.y", "depth.png"),
        ("dir.with.dots/k.txt", "dir.with.dots/k", "txt"),
        ("k.left.mat.gz", "k", "left.mat.gz"),
        ("noextension", "noextension", ""),
        (".jpg", "", "jpg"),
    ],
)
def test_names(name: str, key: str, extension: str) -> None:
    assert split_name(name) == (key, extension)


def test_truncated_everywhere(tmp_path: Path, write_tar) -> None:
    """At every cut: no exception, and exactly the members that are whole."""
    write_tar(tmp_path / "t.tar", [(f"{i}.jpg", b"x" * (300 * i)) for i in range(1, 6)])
    raw = (tmp_path / "t.tar").read_bytes()
    whole = by_library(tmp_path / "t.tar")
    for cut in range(0, len(raw), 97):
        found = scan_bytes(raw[:cut])
        assert [(m.name, m.offset, m.size) for m in found.members] == [m for m in whole if m[1] + m[2] <= cut]
        if whole[0][1] < cut < whole[-1][1] + whole[-1][2]:
            assert found.problems


def test_concatenated_with_padding_between(tmp_path: Path, write_tar) -> None:
    """`cat a.tar b.tar` is read on behind the first end mark, and behind a stray zero block."""
    write_tar(tmp_path / "a.tar", [("a.jpg", b"1" * 600)])
    write_tar(tmp_path / "b.tar", [("b.jpg", b"2" * 600)])
    a, b = (tmp_path / "a.tar").read_bytes(), (tmp_path / "b.tar").read_bytes()
    assert [m.name for m in scan_bytes(a + b).members] == ["a.jpg", "b.jpg"]
    assert scan_bytes(a + b).problems == []
    body = a[: 512 + 1024]
    assert [m.name for m in scan_bytes(body + b"\0" * 512 + b).members] == ["a.jpg", "b.jpg"]


def test_large_members_are_jumped_over(tmp_path: Path, write_tar) -> None:
    write_tar(tmp_path / "t.tar", [("a.jpg", b"x" * 3_000_000), ("b.jpg", b"y" * 100)])
    raw = (tmp_path / "t.tar").read_bytes()
    read = 0

    def ranged(start: int, stop: int) -> bytes:
        nonlocal read
        read += stop - start
        return raw[start:stop]

    assert len(scan(ranged, len(raw), chunk=10_000).members) == 2
    assert read < 40_000


def test_defects_and_rows_without_members(tmp_path: Path, write_tar, tiny_picture) -> None:
    picture = tiny_picture(1)
    members = [
        ("1.jpg", picture), ("1.txt", b"one"), ("2.txt", b"no picture"),
        ("3.jpg", picture), ("3.jpg", picture), ("1.jpg", picture), ("._4.jpg", b"mac"),
    ]  # fmt: skip
    write_tar(tmp_path / "t.tar", members)
    index = read_index(list_files(str(tmp_path / "t.tar"))[0])
    assert [(k.decode(), DEFECTS[d]) for k, d in zip(index.keys, index.defects, strict=True)] == [
        ("1", ""), ("2", "no_image"), ("3", ""), ("1", "duplicate_key"),
    ]  # fmt: skip
    assert any("duplicate key '1'" in p for p in index.problems)
    assert any("duplicate member '3.jpg'" in p for p in index.problems)


def test_index_is_incremental_resumable_and_checked(make_shards, tmp_path: Path) -> None:
    url, _ = make_shards([10, 20])
    folder = str(tmp_path / "index")
    shards = list_files(url)
    assert build_index(shards, folder).read == 2
    assert build_index(shards, folder).read == 0
    make_shards([10, 20, 5])
    Path(shards[0].url).touch()
    report = build_index(list_files(url), folder)
    assert sorted(r.samples for r in report.rows.values()) == [5, 10, 20]
    row = index_one(shards[1], folder)
    index = decode_index(read_bytes(f"{folder}/{row.index}"), "here")
    assert len(index) == row.samples == 20
    assert index.column("score").tolist() == pytest.approx([(i * 7 % 10) / 10 for i in range(20)])
    manifest = tmp_path / "index" / "manifest.jsonl.gz"
    manifest.write_bytes(manifest.read_bytes()[:-20])
    with pytest.raises(ValueError, match="is damaged"):
        build_index(shards, folder)


def test_names_that_are_no_paths_are_left_out(tmp_path: Path, write_tar, tiny_picture) -> None:
    """Keys take the room of the longest: one name of a megabyte would make gigabytes of ten thousand."""
    names = ["a.jpg", f"{'b' * 4093}.jpg", f"{'c' * 4092}.jpg", f"{'ü' * 2047}.jpg"]
    write_tar(tmp_path / "0.tar", [(n, tiny_picture(1)) for n in names], format=tarfile.PAX_FORMAT)
    index = read_index(list_files(str(tmp_path))[0])
    assert [key.decode() for key in index.keys] == ["a", "c" * 4092]
    assert [problem[:52] for problem in index.problems] == [
        "name of more than 4,096 bytes is left out: 'bbbbbbbb"[:52]
    ] + ["name of more than 4,096 bytes is left out: 'üüüüüüüü"[:52]]


def test_not_a_tar(tmp_path: Path) -> None:
    for name, body in [
        ("zip.tar", b"PK\3\4" + b"z" * 3000),
        ("empty.tar", b""),
        ("html.tar", b"<html>" * 400),
    ]:
        (tmp_path / name).write_bytes(body)
        with pytest.raises(NotATar, match=r"is not a tar archive .* remove it"):
            read_index(list_files(str(tmp_path / name))[0])


def test_an_empty_tar_is_a_tar(tmp_path: Path) -> None:
    with tarfile.open(fileobj=(buffer := io.BytesIO()), mode="w"):
        pass
    (tmp_path / "e.tar").write_bytes(buffer.getvalue())
    assert len(read_index(list_files(str(tmp_path / "e.tar"))[0])) == 0


def test_samples_group_by_key() -> None:
    samples = group(scan_bytes(_three()).members).samples
    assert [(s.key, sorted(s.members)) for s in samples] == [("a", ["jpg", "txt"]), ("b", ["jpg"])]


def _three() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name in ("a.jpg", "a.txt", "b.jpg"):
            tar.addfile(tarfile.TarInfo(name), io.BytesIO())
    return buffer.getvalue()


def test_indexes_are_decoded_in_many_threads(make_shards) -> None:
    """A collection that runs Python code hands the interpreter to another thread in the middle of a parse."""
    url, keys = make_shards([40])
    encoded = read_index(list_files(url)[0]).encode()

    def callback(phase: str, info: dict[str, int]) -> None:
        time.sleep(0)

    interval, threshold = sys.getswitchinterval(), gc.get_threshold()
    sys.setswitchinterval(1e-6)
    gc.set_threshold(20)
    gc.callbacks.append(callback)
    try:
        with ThreadPoolExecutor(8) as pool:
            found = list(pool.map(lambda i: len(decode_index(encoded, f"{i}")), range(400)))
    finally:
        gc.callbacks.remove(callback)
        gc.set_threshold(*threshold)
        sys.setswitchinterval(interval)
    assert found == [len(keys)] * 400
