"""Tars of which nothing is known but their bytes: window by window, each byte once, from any window on."""

from __future__ import annotations

import io
import json
import tarfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_pipeline.errors import NotATar
from data_pipeline.shards.index import decode_index
from data_pipeline.shards.pieces import IndexedPieces, TarPieces
from data_pipeline.shards.read_index import read_index
from data_pipeline.storage.listing import ListedFile


def pieces_of(path: Path, window: int, chunk: int, counts: Counter[int], **begin: int) -> Iterator[Any]:
    body = path.read_bytes()

    def read(start: int, stop: int) -> bytes:
        counts.update(range(start, stop))
        return body[start:stop]

    pieces = TarPieces(read, ListedFile(str(path), len(body), "v"), **begin)
    while (piece := pieces.next(window, chunk)) is not None:
        index = piece.index
        places = zip(*index.extents("txt"), strict=True) if "txt" in index.extensions else []
        texts = [piece.read(int(start), int(start + size)) for start, size in places]
        yield piece.first, piece.byte, [key.decode() for key in index.keys], texts


@pytest.mark.parametrize("kind", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_a_tar_is_read_once_and_from_any_window_on(tmp_path: Path, write_tar, kind: int) -> None:
    """Names that need headers of their own, dots in keys, members that come again, joined archives."""
    long = "x" * 120 if kind != tarfile.USTAR_FORMAT else "x" * 90
    names = [f"img.v{i}" for i in range(5)] + [f"{long}{i}" for i in range(4)] + ["k", "z.1", "z.2"]
    members = [
        (f"{name}.{extension}", f"{name} {extension}".encode() * 40)
        for name in names
        for extension in (["jpg", "mask.png", "t5.npy", "txt"] if name == "k" else ["jpg", "txt"])
    ]
    write_tar(tmp_path / "a.tar", members, format=kind)
    write_tar(tmp_path / "b.tar", [("~.jpg", b"p"), ("~.txt", b"t")], format=kind)
    joined = tmp_path / "ab.tar"
    joined.write_bytes((tmp_path / "a.tar").read_bytes() + (tmp_path / "b.tar").read_bytes())
    counts: Counter[int] = Counter()
    whole = list(pieces_of(joined, 3, 1500, counts))
    assert [key for piece in whole for key in piece[2]] == [*names, "~"]
    assert [text for piece in whole for text in piece[3]] == [
        *(f"{name} txt".encode() * 40 for name in names),
        b"t",
    ]
    assert [len(piece[2]) for piece in whole[:-1]] == [3] * (len(whole) - 1)
    assert set(counts.values()) == {1}
    for at, piece in enumerate(whole):
        for chunk in (600, 100_000):
            assert list(pieces_of(joined, 3, chunk, Counter(), first=piece[0], byte=piece[1])) == whole[at:]


def test_what_cannot_be_joined_while_it_is_streamed_is_refused(tmp_path: Path, write_tar) -> None:
    pictures = [(f"{i:02d}.jpg", b"p") for i in range(9)]
    texts = [(f"{i:02d}.txt", b"t") for i in range(9)]
    write_tar(tmp_path / "apart.tar", pictures + texts)
    with pytest.raises(
        NotATar, match=r"sample '00' of .*apart.tar lie apart.*`tar --sort=name`.*begins with"
    ):
        list(pieces_of(tmp_path / "apart.tar", 3, 1500, Counter()))
    with tarfile.open(tmp_path / "links.tar", "w") as tar:
        for name, content in pictures:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
        link = tarfile.TarInfo("zz.jpg")
        link.type, link.linkname = tarfile.LNKTYPE, "00.jpg"
        tar.addfile(link)
    with pytest.raises(NotATar, match=r"links.tar has links .*--hard-dereference`.*begins with an index"):
        list(pieces_of(tmp_path / "links.tar", 3, 1500, Counter()))


ENTRIES = [f"{stem}.{extension}" for stem in "abcd" for extension in ("jpg", "txt", "json", "mask.png")]
ODD = [
    "a.v2.jpg",
    "a.v2.txt",
    "e/a.jpg",
    "e/a.txt",
    "./f.jpg",
    "README",
    ".hidden",
    "e/",
    "g.rgb.jpg",
    "g.d.jpg",
]
ODD += ["symbolic link", "fifo", "c.JPG"]


def write_entries(path: Path, names: list[str], kind: int) -> None:
    """A tar with these members, and other entries where a name says so."""
    with tarfile.open(path, "w", format=kind) as tar:
        for i, name in enumerate(names):
            info = tarfile.TarInfo(name)
            content = f'{{"url": "http://x.invalid/{i}", "n": {i}}}'.encode() * (1 + 200 * (i % 3 == 0))
            if name.endswith("/"):
                info.type = tarfile.DIRTYPE
            elif name == "symbolic link":
                info.type, info.name, info.linkname = tarfile.SYMTYPE, "l.txt", names[0]
            elif name == "fifo":
                info.type = tarfile.FIFOTYPE
            else:
                info.size = len(content)
            if kind == tarfile.PAX_FORMAT:
                info.mtime = i + 0.5  # as webdataset writes them: each member has a header before its own
            tar.addfile(info, io.BytesIO(content))


def windows(pieces: TarPieces | IndexedPieces, size: int) -> Iterator[Any]:
    """What lanes see of each window."""
    while (piece := pieces.next(size, 4000)) is not None:
        index = piece.index
        places = [(name, *index.extents(name)) for name in index.extensions]
        yield (
            (
                piece.first,
                [key.decode() for key in index.keys],
                {
                    (name, row): (o, s)
                    for name, os, ss in places
                    for row, (o, s) in enumerate(zip(os, ss, strict=True))
                    if o >= 0
                },
                index.defects.tolist(),
                index.hashes["url"].tolist() if index.hashes.get("url") is not None else [0] * len(index),
            ),
            piece.byte,
        )


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    names=st.lists(st.sampled_from([*ENTRIES, *ENTRIES, *ODD]), min_size=1, max_size=14, unique=True),
    in_order=st.booleans(),
    kind=st.sampled_from([tarfile.USTAR_FORMAT, tarfile.PAX_FORMAT]),
    window=st.integers(1, 4),
    joined=st.booleans(),
    cut=st.sampled_from([0, 0, 700, 9000, 12000]),
)
def test_an_index_that_says_so_has_the_windows_of_the_tar(
    tmp_path_factory: pytest.TempPathFactory,
    names: list[str],
    in_order: bool,
    kind: int,
    window: int,
    joined: bool,
    cut: int,
) -> None:
    """Each sample in the same window and place; a walk by one goes on by the other, from any window. Joined
    archives and such as end too early among them."""
    path = tmp_path_factory.mktemp("tar") / "a.tar"
    write_entries(path, sorted(names) if in_order else names, kind)
    body = path.read_bytes()
    if joined:
        write_entries(path, ["z/a.jpg", "z/a.txt", "z/b.jpg"], tarfile.GNU_FORMAT)
        body += path.read_bytes()
    body = body[: max(2048, len(body) - cut)]
    path.write_bytes(body)
    shard = ListedFile(str(path), len(body), "v")
    index = decode_index(read_index(shard).encode(), "kept")
    if not index.as_streamed:
        return

    def read(start: int, stop: int) -> bytes:
        return body[start:stop]

    streamed = list(windows(TarPieces(read, shard), window))
    indexed = list(windows(IndexedPieces(read, index), window))
    assert [seen for seen, _ in indexed] == [seen for seen, _ in streamed]
    for at, ((first, *_), byte) in enumerate(indexed):
        rest = windows(TarPieces(read, shard, first=first, byte=byte), window)
        assert [seen for seen, _ in rest] == [seen for seen, _ in streamed[at:]]
        rest = windows(IndexedPieces(read, index, first=first), window)
        assert list(rest) == indexed[at:]


def test_a_member_without_a_place_in_the_index_ends_no_window(tmp_path: Path) -> None:
    info = tarfile.TarInfo("a.npy")
    info.size = 1 << 32
    with (tmp_path / "a.tar").open("wb") as file:
        file.write(info.tobuf())
        file.seek(info.size, io.SEEK_CUR)  # a hole
        file.write(tarfile.TarInfo("b.jpg").tobuf() + bytes(1024))
        size = file.tell()
    index = read_index(ListedFile(str(tmp_path / "a.tar"), size, "v"))
    assert [key.decode() for key in index.keys] == ["a", "b"]
    assert index.as_streamed is False


PLAIN = ["a.jpg", "a.txt", "b.jpg", "b.txt", "b.json"]


@pytest.mark.parametrize("kind", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize(
    ("names", "as_streamed"),
    [
        (PLAIN, True),
        (["e/", "e/a.jpg", "e/a.txt", "./b.jpg", "./b.txt", ".hidden"], True),
        (["a.b.jpg", "a.b.txt", "c.mask.png", "c.jpg"], True),
        ([*PLAIN, "README"], False),
        (["a.jpg", "b.jpg", "a.txt", "b.txt"], False),
        (["a.v2.jpg", "a.v2.txt", "a.v3.txt"], False),
        (["a.jpg", "a.txt", "b.jpg", "a.jpg"], False),
        (["g.rgb.jpg", "g.d.jpg", "g.jpg"], False),
        ([*PLAIN, "symbolic link"], False),
        ([*PLAIN, "fifo"], False),
    ],
)
def test_what_an_index_says_of_windows(
    tmp_path: Path, kind: int, names: list[str], as_streamed: bool
) -> None:
    write_entries(tmp_path / "a.tar", names, kind)
    size = (tmp_path / "a.tar").stat().st_size
    assert read_index(ListedFile(str(tmp_path / "a.tar"), size, "v")).as_streamed is as_streamed


@pytest.mark.parametrize(
    ("column", "as_streamed"),
    [
        ({"key": ["b"]}, True),
        ({"key": ["b"], "url": ["http://x.invalid/4"]}, True),
        ({"key": ["b"], "error_message": [None]}, True),
        ({"key": ["b"], "sha256": ["0" * 64]}, False),
        (None, True),
        ("a list", False),
    ],
)
def test_what_windows_cannot_tell_is_said(tmp_path: Path, column: Any, as_streamed: bool) -> None:
    """A parquet that has more than the json, and a size before storing that some window might keep."""
    fields = {
        "key": "b",
        "url": "u",
        "error_message": None,
        "original_width": 5 if column != "a list" else [5],
    }
    members = {"a.jpg": b"p", "b.jpg": b"p", "b.json": json.dumps(fields).encode()}
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    if isinstance(column, dict):
        pq.write_table(pa.table(column), tmp_path / "a.parquet")
    size = (tmp_path / "a.tar").stat().st_size
    assert read_index(ListedFile(str(tmp_path / "a.tar"), size, "v")).as_streamed is as_streamed
