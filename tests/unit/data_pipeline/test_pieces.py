"""Tars of which nothing is known but their bytes: window by window, each byte once, from any window on."""

from __future__ import annotations

import io
import tarfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.errors import DataError
from data_pipeline.shards.pieces import TarPieces
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
    with pytest.raises(DataError, match=r"sample '00' of .*apart.tar lie apart.*run `ldm data index` once"):
        list(pieces_of(tmp_path / "apart.tar", 3, 1500, Counter()))
    with tarfile.open(tmp_path / "links.tar", "w") as tar:
        for name, content in pictures:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
        link = tarfile.TarInfo("zz.jpg")
        link.type, link.linkname = tarfile.LNKTYPE, "00.jpg"
        tar.addfile(link)
    with pytest.raises(DataError, match=r"links.tar has links .*run `ldm data index` once"):
        list(pieces_of(tmp_path / "links.tar", 3, 1500, Counter()))
