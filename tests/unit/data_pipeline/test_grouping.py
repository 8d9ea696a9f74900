"""Members become samples: by key as webdataset groups, through links, joined archives and unsorted ones."""

from __future__ import annotations

import gzip
import io
import json
import lzma
import random
import shutil
import subprocess
import tarfile
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.config import DataConfig
from data_pipeline.errors import DataError, NotATar
from data_pipeline.loader import build_loader
from data_pipeline.shards.grouping import group
from data_pipeline.shards.opening import open_dataset
from data_pipeline.shards.read_index import read_index
from data_pipeline.shards.tars import TarMember
from data_pipeline.storage.listing import list_files
from data_pipeline.tools.inspection import inspect_shards, look_at_head
from trainer.__main__ import main


def samples(*names: str) -> dict[str, list[str]]:
    """Extensions of every key, with what they would hold left out."""
    members = [TarMember(name, 512 * i, 1) for i, name in enumerate(names)]
    found = group(members)
    return {sample.key: list(sample.members) for sample in found.samples}


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ("k.jpg k.mask.png k.txt", {"k": ["jpg", "mask.png", "txt"]}),
        ("k.mask.png k.jpg k.txt k.t5.npy", {"k": ["mask.png", "jpg", "txt", "t5.npy"]}),
        ("k.original.jpg k.txt", {"k": ["original.jpg", "txt"]}),
        ("./k.JPG .//k.TXT", {"k": ["jpg", "txt"]}),
        ("a/./b/k.jpg a/b/k.txt", {"a/b/k": ["jpg", "txt"]}),
        ("v1.2/k.jpg v1.2/k.txt", {"v1.2/k": ["jpg", "txt"]}),
        ("i.v2.jpg i.v2.txt i.v2.mask.png", {"i.v2": ["jpg", "txt", "mask.png"]}),
        ("i.1.jpg i.1.txt i.2.txt i.3.jpg", {"i.1": ["jpg", "txt"], "i.2": ["txt"], "i.3": ["jpg"]}),
        ("i.1.jpg i.2.jpg", {"i.1": ["jpg"], "i.2": ["jpg"]}),
        ("k.rgb.jpg k.cap.txt", {"k": ["rgb.jpg", "cap.txt"]}),
        ("k.left.mat.gz k.right.mat.gz", {"k": ["left.mat.gz", "right.mat.gz"]}),
        ("x.seg.png x.jpg y.seg.png", {"x": ["seg.png", "jpg"], "y": ["seg.png"]}),
        ("._a.jpg .DS_Store __meta__ __meta__/a.jpg d/ README __a.jpg", {"__a": ["jpg"]}),
    ],
)
def test_keys(names: str, expected: dict[str, list[str]]) -> None:
    assert samples(*names.split()) == expected


def test_members_without_an_extension_are_told() -> None:
    found = group([TarMember("README", 512, 1), TarMember("a.jpg", 1536, 1)])
    assert found.problems == ["1 members without an extension belong to no sample: 'README'"]


def write_sets(write_tar, tiny_picture, folder: Path, count: int = 6, name: str = "0.tar") -> None:
    """Samples with a large and a small picture, of other shapes, and a mask."""
    members = []
    for i in range(count):
        members += [
            (f"{i}.jpg", tiny_picture(i, size=(20, 16))),
            (f"{i}.mask.png", tiny_picture(i + 7, size=(20, 16), kind="PNG")),
            (f"{i}.original.jpg", tiny_picture(i + 40, size=(24, 48))),
            (f"{i}.t5.npy", b"array"),
            (f"{i}.txt", f"text {i}".encode()),
        ]
    write_tar(folder / name, members)


def first_batch(config: DataConfig, size: int = 6):
    with build_loader(config, seed=1, global_batch_size=size) as loader:
        return next(loader)


def config_for(folder: Path, **changes: object) -> DataConfig:
    return DataConfig(shards=str(folder / "*.tar"), image_size=16, workers=0, **changes)  # type: ignore[arg-type]


def test_the_picture_is_a_setting(tmp_path: Path, write_tar, tiny_picture) -> None:
    """Which member is decoded, its size, the filter on it and the bucket follow data.picture."""
    write_sets(write_tar, tiny_picture, tmp_path)
    usual = first_batch(config_for(tmp_path))
    assert sorted(usual.captions) == [f"text {i}" for i in range(6)]
    assert usual.conditions["size"][:, :2].tolist() == [[16, 20]] * 6
    other = first_batch(config_for(tmp_path, picture=(".original.JPG",), filter="picture_height == 48"))
    assert sorted(other.captions) == sorted(usual.captions)
    assert other.conditions["size"][:, :2].tolist() == [[48, 24]] * 6
    assert (usual.pixels != other.pixels).any()
    tall = config_for(tmp_path, picture=("original.jpg",), buckets=True, bucket_step=4)
    accepted = open_dataset(tall).accepted
    assert accepted is not None
    assert accepted.aspects.sum() == 6
    height, width = first_batch(tall).pixels.shape[2:]
    assert height > width
    with pytest.raises(DataError, match="Every sample"):
        first_batch(config_for(tmp_path, filter="picture_height == 48"))


def test_a_picture_that_no_sample_has_is_refused(tmp_path: Path, write_tar, tiny_picture) -> None:
    write_tar(tmp_path / "0.tar", [("a.raw.jpg", tiny_picture(1)), ("a.txt", b"a")])
    with pytest.raises(DataError, match=r"data\.picture=\[raw\.jpg\]"):
        open_dataset(config_for(tmp_path))
    assert first_batch(config_for(tmp_path, picture=("raw.jpg",)), 1).captions == ("a",)
    with pytest.raises(DataError, match="name the extensions"):
        open_dataset(config_for(tmp_path, picture=()))


def test_the_command_shows_the_picture_that_is_named(
    tmp_path: Path, write_tar, tiny_picture, capsys: pytest.CaptureFixture[str]
) -> None:
    write_sets(write_tar, tiny_picture, tmp_path)
    sheet = ["--sheet", str(tmp_path / "sheet.png")]
    assert main(["data", "inspect", str(tmp_path), *sheet, "--picture", "original.jpg"]) == 0
    told = capsys.readouterr().out
    assert "height            min 48, median 48, max 48" in told
    assert "mask.png 6" in told
    look = look_at_head(list_files(str(tmp_path))[0], config_for(tmp_path, picture=("original.jpg",)))
    assert (look.pictures, look.defects) == (6, [])


@pytest.mark.skipif(shutil.which("tar") is None, reason="needs the tar program")
@pytest.mark.parametrize("kind", ["gnu", "pax", "ustar"])
def test_a_folder_packed_in_any_order_serves_every_sample(
    tmp_path: Path, tiny_picture, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    """`tar cf x.tar ./`, members in the order of the disk, copies as hard and symbolic links."""
    folder = tmp_path / "in"
    folder.mkdir()
    for i in range(10):
        (folder / f"{i}.jpg").write_bytes(tiny_picture(i))
        (folder / f"{i}.json").write_text(json.dumps({"score": i}))
        (folder / f"{i}.txt").write_text(f"text {i}")
    (folder / "copy.jpg").hardlink_to(folder / "3.jpg")
    (folder / "copy.txt").symlink_to("4.txt")
    names = sorted(f"./{path.name}" for path in folder.iterdir())
    random.Random(3).shuffle(names)
    pack = ["tar", f"--format={kind}", "-C", str(folder)]
    subprocess.run([*pack, "-cf", str(tmp_path / "0.tar"), "./", "--sort=name"], check=True)
    subprocess.run([*pack, "-cf", str(tmp_path / "1.tar"), *names], check=True)
    (sorted_tar, shuffled) = (read_index(shard) for shard in list_files(str(tmp_path / "[01].tar")))
    expected = sorted([*(f"{i}" for i in range(10)), "copy"])
    for index in (sorted_tar, shuffled):
        assert sorted(key.decode() for key in index.keys) == expected
        assert not index.defects.any()
    assert sorted_tar.apart == 0
    assert shuffled.apart > 5
    (tmp_path / "0.tar").unlink()
    batch = first_batch(config_for(tmp_path, filter="missing(score) or score < 99"), 11)
    texts = {key.rpartition("/")[2]: caption for key, caption in zip(batch.keys, batch.captions, strict=True)}
    assert texts == {f"{i}": f"text {i}" for i in range(10)} | {"copy": "text 4"}
    pixels = {key.rpartition("/")[2]: p for key, p in zip(batch.keys, batch.pixels, strict=True)}
    assert np.array_equal(pixels["copy"], pixels["3"])
    assert "tar --sort=name" in caplog.text


def test_too_many_members_apart_are_refused() -> None:
    members = [TarMember(f"{i % 3}.{e}", 512 * i, 1) for i, e in enumerate(["jpg", "jpg", "jpg", "txt"])]
    assert group(members).apart == 1
    with pytest.raises(NotATar, match="tar --sort=name"):
        group(members, most_apart=3)


def test_samples_of_one_key_are_not_mixed(tmp_path: Path, write_tar, tiny_picture) -> None:
    """A later member joins its key; a later sample of that key, with a picture of its own, does not."""
    picture = tiny_picture(1)
    members = [("a.jpg", picture), ("b.jpg", picture), ("a.txt", b"a"), ("b.jpg", picture), ("b.txt", b"b")]
    write_tar(tmp_path / "0.tar", members)
    index = read_index(list_files(str(tmp_path))[0])
    assert [key.decode() for key in index.keys] == ["a", "b", "b"]
    assert index.defects.tolist() == [0, 0, 1]
    assert (index.extents("txt")[0] >= 0).tolist() == [True, False, True]


def test_links_that_lead_nowhere_are_told(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for name, target in (("a.jpg", "/data/a.jpg"), ("b.jpg", "c.jpg"), ("c.jpg", "b.jpg")):
            link = tarfile.TarInfo(name)
            link.type, link.linkname = tarfile.SYMTYPE, target
            tar.addfile(link)
        tar.addfile(tarfile.TarInfo("d.txt"), io.BytesIO())
    found = inspect_shards(str(tmp_path))
    assert any(
        "3 links lead to no member" in problem and "--dereference" in problem for problem in found.problems
    )


def test_rubbish_behind_the_end_is_told(tmp_path: Path, write_tar, tiny_picture) -> None:
    write_tar(tmp_path / "0.tar", [("a.jpg", tiny_picture(1))])
    whole = (tmp_path / "0.tar").read_bytes()
    (tmp_path / "0.tar").write_bytes(whole + b"x" * 1024)
    index = read_index(list_files(str(tmp_path))[0])
    assert len(index) == 1
    assert "after the end of the archive" in index.problems[0]
    (tmp_path / "0.tar").write_bytes(whole + b"\0" * 700_000)
    assert read_index(list_files(str(tmp_path))[0]).problems == ()


@pytest.mark.parametrize(
    ("pack", "told"),
    [
        (gzip.compress, "compressed with gzip.*gunzip"),
        (lambda data: lzma.compress(data), "compressed with xz.*unxz"),
        (lambda data: b"\x28\xb5\x2f\xfd" + data, "compressed with zstd.*unzstd"),
        (lambda data: b"BZh9" + data, "compressed with bzip2.*bunzip2"),
        (lambda data: b"PK\3\4" + data, "a zip archive"),
        (lambda data: b"\n<!DOCTYPE html><html>" + data, "a web page"),
        (lambda data: b"<?xml version='1.0'?><Error/>" + data, "XML"),
        (lambda data: b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
    ],
)
@pytest.mark.parametrize("name", ["0.tar", "0.tar.gz"])
def test_what_is_no_tar_is_named(tmp_path: Path, write_tar, tiny_picture, pack, told: str, name: str) -> None:
    write_tar(tmp_path / "plain", [("a.jpg", tiny_picture(1)), ("a.txt", b"a")])
    (tmp_path / name).write_bytes(pack((tmp_path / "plain").read_bytes()))
    with pytest.raises(NotATar, match=told):
        open_dataset(DataConfig(shards=str(tmp_path / name), workers=0))


def test_compressed_tars_of_a_folder_are_named(tmp_path: Path) -> None:
    (tmp_path / "0.tar.gz").write_bytes(b"")
    with pytest.raises(DataError, match=r"0\.tar\.gz"):
        list_files(str(tmp_path))
