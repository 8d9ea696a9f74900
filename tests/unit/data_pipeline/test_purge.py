"""`ldm data purge`: what a removal list names is in no part of the cache any more, and the rest still is."""

from __future__ import annotations

import io
import json
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.errors import DataError
from data_pipeline.moments.catalogue import Catalogue
from data_pipeline.moments.entry import (
    IndexedPicture,
    KeptMember,
    Label,
    MomentsCache,
    entry_key,
    pack,
    unpack,
)
from data_pipeline.moments.parts import STAGE, commit_part, part_url, read_table, taken_bytes
from data_pipeline.shards.identities import hash_identity
from trainer.__main__ import main

SHARDS = ("s3://laion/00000.tar", "s3://laion/00001.tar")
CACHE = MomentsCache("", "stage", "fp32", channels=2, downsampling=1)


def label_of(shard: str, number: int) -> Label:
    key = entry_key("stage", IndexedPicture(shard, 1, "etag", 512 * number, 700), (4, 4))
    url = hash_identity(f"http://x.invalid/{number}")
    members = (KeptMember("txt", 512, b"caption"),)
    return Label(key.hex(), shard, f"{number:09d}", 512 * number, (url,), members)


def write_cache(folder: Path, *, parts: int = 3, each: int = 4) -> list[Label]:
    """Parts of a stage, every one with samples of both shards."""
    labels = []
    for part in range(parts):
        entries = []
        for i in range(each):
            label = label_of(SHARDS[i % 2], part * each + i)
            values = np.full((2, 4, 4), part * each + i, np.float32)
            entries.append((label, pack(label, values, "fp32")))
            labels.append(label)
        commit_part(str(folder / "stage"), entries)
    (folder / "stage" / STAGE).write_text("{}")
    return labels


def purge(folder: Path, tmp_path: Path, *entries: str) -> int:
    (tmp_path / "list.txt").write_text("\n".join(entries) + "\n")
    (tmp_path / "run.yaml").write_text(f"first_stage: {{cache: {folder}}}\n")
    return main(
        ["data", "purge", str(tmp_path / "run.yaml"), f"data.removal_lists=[{tmp_path / 'list.txt'}]"]
    )


def readable(folder: Path, labels: list[Label]) -> set[int]:
    """Numbers of the samples that a loader finds, with the right moments."""
    catalogue, found = Catalogue(str(folder / "stage"), 8), set()
    for number, label in enumerate(labels):
        place = catalogue.find(label.shard, bytes.fromhex(label.key))
        if place is None:
            continue
        data = Path(part_url(str(folder / "stage"), place.part)).read_bytes()
        entry = unpack(data[place.offset : place.offset + place.size], label.key, "fp32", (2, 4, 4))
        assert (entry.values == number).all()
        assert place.members == {"txt"}
        assert entry.members["txt"].content == b"caption"
        found.add(number)
    return found


def stored(folder: Path) -> set[str]:
    """Keys of all entries of all tars."""
    names: set[str] = set()
    for tar in folder.glob("stage/parts/*.tar"):
        with tarfile.open(tar) as archive:
            names |= {name.removesuffix(".safetensors") for name in archive.getnames()}
    return names


@pytest.mark.parametrize(
    "named", [("000000001", "000000002"), ("00001/000000001", "http://x.invalid/2"), ("nothing",)]
)
def test_named_samples_are_gone_and_the_others_stay(tmp_path: Path, named: tuple[str, ...]) -> None:
    folder = tmp_path / "cache"
    labels = write_cache(folder)
    gone = set() if named == ("nothing",) else {1, 2}
    for _ in range(2):  # the second time there is nothing to do
        assert purge(folder, tmp_path, *named) == 0
        assert readable(folder, labels) == set(range(12)) - gone
        assert stored(folder) == {label.key for i, label in enumerate(labels) if i not in gone}
    assert len(list(folder.glob("stage/parts/*.tar"))) == 3


def test_a_part_of_removed_samples_alone_goes_whole(tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    labels = write_cache(folder)
    assert purge(folder, tmp_path, *(label.sample for label in labels)) == 0
    assert [path for path in folder.rglob("*") if path.is_file()] == [folder / "stage" / STAGE]


def test_a_purge_that_was_killed_goes_on(tmp_path: Path) -> None:
    """Both the old and the new part are there: neither holds the sample in the end."""
    folder = tmp_path / "cache"
    labels = write_cache(folder, parts=1)
    (old,) = folder.glob("stage/parts/*.tar")
    kept = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert purge(folder, tmp_path, labels[1].sample) == 0
    for path, data in kept.items():
        path.write_bytes(data)
    assert old.exists()
    assert purge(folder, tmp_path, labels[1].sample) == 0
    assert labels[1].key not in stored(folder)
    assert readable(folder, labels) == {0, 2, 3}


def test_what_was_interrupted_goes_when_it_is_nobodys(tmp_path: Path, capsys) -> None:
    folder = tmp_path / "cache"
    labels = write_cache(folder, parts=1)
    for age_s in (0, 7200):
        name = f"{time.time_ns() - age_s * 10**9:016x}-0123456789ab"
        (folder / "stage" / "parts" / f"{name}.tar").write_bytes(b"torn")
        (folder / "stage" / "parts" / f"{name}.tar.part").write_bytes(
            b"torn"
        )  # as a kill leaves it on a disk
    assert purge(folder, tmp_path, "nothing") == 1  # one may be about to be committed
    assert "run this again later" in capsys.readouterr().out
    assert len(list(folder.glob("stage/parts/*.tar"))) == 2
    assert len(list(folder.glob("stage/parts/*.tar.part"))) == 1
    assert readable(folder, labels) == {0, 1, 2, 3}


def test_a_damaged_table_cannot_vouch_for_its_part(tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    labels = write_cache(folder, parts=2)
    table = sorted(folder.glob("stage/parts/*.json"))[0]
    part = read_table(str(table)).part
    table.write_bytes(table.read_bytes()[:-9])
    with pytest.raises(DataError, match="damaged"):
        read_table(str(table))
    assert purge(folder, tmp_path, "nothing") == 0
    assert not list(folder.rglob(f"{part}*"))
    assert readable(folder, labels) == {4, 5, 6, 7}


def test_a_file_beside_the_stages_is_none_of_the_cache(tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    labels = write_cache(folder, parts=1)
    (folder / "README").write_text("whose cache this is")
    others = [
        folder / name for name in ("laion/parts/00000.tar", "sets/parts/000000.json", "stage/parts/my.tar")
    ]
    others.append(folder / f"unmarked/parts/{time.time_ns() - 7200 * 10**9:016x}-0123456789ab.tar")
    for path in others:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"of somebody else")
    assert taken_bytes(str(folder)) == sum(tar.stat().st_size for tar in folder.glob("stage/parts/*-*.tar"))
    assert purge(folder, tmp_path, labels[0].sample) == 0
    assert readable(folder, labels) == {1, 2, 3}
    assert (folder / "README").exists()
    assert {path.read_bytes() for path in others} == {b"of somebody else"}


@pytest.mark.parametrize("place", ["cash", ".", "cache/stage"])
def test_a_folder_that_is_no_cache_is_a_mistake(tmp_path: Path, capsys, place: str) -> None:
    """Misspelt, above the cache, or inside it: nothing was removed, which must not look like success."""
    folder = tmp_path / "cache"
    labels = write_cache(folder, parts=1)
    assert purge(tmp_path / place, tmp_path, labels[0].sample) == 2
    assert f"{tmp_path / place} is no cache of moments" in capsys.readouterr().err
    assert readable(folder, labels) == {0, 1, 2, 3}


@pytest.mark.parametrize("lacking", ["first_stage.cache=null", "data.removal_lists=[]"])
def test_without_a_cache_or_a_list_it_is_a_mistake(tmp_path: Path, capsys, lacking: str) -> None:
    (tmp_path / "list.txt").write_text("a\n")
    settings = {"first_stage.cache": str(tmp_path), "data.removal_lists": f"[{tmp_path / 'list.txt'}]"}
    name, _, value = lacking.partition("=")
    (tmp_path / "run.yaml").write_text("{}\n")
    words = [f"{key}={each}" for key, each in (settings | {name: value}).items()]
    assert main(["data", "purge", str(tmp_path / "run.yaml"), *words]) == 2
    assert f"{name} is not set" in capsys.readouterr().err


def test_an_entry_says_what_it_is_of(tmp_path: Path) -> None:
    """A tar, and in it JSON with shard and sample: nothing of ours is needed to see whose they are."""
    labels = write_cache(tmp_path, parts=1)
    (tar,) = tmp_path.glob("stage/parts/*.tar")
    told = {}
    with tarfile.open(tar) as archive:
        for member in archive.getmembers():
            data = io.BytesIO(archive.extractfile(member).read())  # type: ignore[union-attr]
            length = int.from_bytes(data.read(8), "little")
            metadata = json.loads(data.read(length))["__metadata__"]
            told[metadata["key"]] = (metadata["shard"], metadata["sample"])
    assert told == {label.key: (label.shard, label.sample) for label in labels}
