"""Files among the shards that are no tars, and names of a range that are not there."""

from __future__ import annotations

import gzip
import logging
from dataclasses import replace
from pathlib import Path

import pytest

from data_pipeline.config import DataConfig
from data_pipeline.errors import NoShards, NotATar, UserError
from data_pipeline.loader import build_loader
from data_pipeline.shards import opening
from data_pipeline.shards.build_index import build_index
from data_pipeline.shards.opening import index_folder, open_dataset
from data_pipeline.storage.listing import list_files
from trainer.__main__ import main

BODIES = {
    "empty": b"",
    "html": b"<!DOCTYPE html><html><body>503 Slow Down</body></html>" * 40,
    "gzip": gzip.compress(bytes(range(256)) * 99),
    "short": b"x" * 100,
}


@pytest.fixture(params=BODIES)
def spoiled(request, make_shards) -> tuple[DataConfig, list[str], Path]:
    """(configuration, good keys, the bad shard): the second of four shards is no tar."""
    url, keys = make_shards([6, 6, 6, 6])
    bad = Path(url).parent / "00001.tar"
    good = bad.read_bytes()
    bad.write_bytes(BODIES[request.param])
    bad.with_suffix(".good").write_bytes(good)
    config = DataConfig(shards=url, image_size=16, workers=0, max_bad_shards=0.25)
    return config, [key for key in keys if not key.startswith("00001/")], bad


def served(config: DataConfig, steps: int = 3) -> list[str]:
    with build_loader(config, seed=1, global_batch_size=6) as loader:
        return sorted(key for _ in range(steps) for key in next(loader).keys)


def test_it_is_named_and_passed_up_to_the_limit(spoiled, caplog) -> None:
    config, keys, bad = spoiled
    for _ in range(2):  # also when the manifest has it already
        caplog.clear()
        assert served(config) == keys
        assert [r.levelno for r in caplog.records if str(bad) in r.message] == [logging.WARNING]
    with pytest.raises(
        NotATar, match=rf"{bad} is not a tar .* data.max_bad_shards=0.25 trains without it, 1 of"
    ):
        served(replace(config, max_bad_shards=0.2))
    assert issubclass(NotATar, UserError)
    with pytest.raises(NotATar, match="max_bad_shards"):
        served(DataConfig(shards=config.shards, image_size=16, workers=0))


def test_all_of_them_are_named(make_shards) -> None:
    url, _ = make_shards([2] * 7)
    for i in (1, 2, 3, 6):
        (Path(url).parent / f"{i:05d}.tar").write_bytes(b"")
    with pytest.raises(
        NotATar,
        match=r"00001.tar is not .* Nor are 00002.tar to 00003.tar, 00006.tar. .*=0.572 .* them, 4 of",
    ):
        open_dataset(DataConfig(shards=url))


def test_a_mended_shard_is_read_again(spoiled) -> None:
    config, keys, bad = spoiled
    assert served(config) == keys
    bad.write_bytes(bad.with_suffix(".good").read_bytes())
    assert len(served(config, steps=4)) == len(keys) + 6
    assert int(open_dataset(config).counts.sum()) == 24


@pytest.mark.parametrize("name", ["*.tar", "{00000..00003}.tar"])
def test_a_large_set_passes_what_its_index_says(spoiled, name: str, monkeypatch, caplog) -> None:
    config, keys, bad = spoiled
    monkeypatch.setattr(opening, "_SMALL", 3)  # those above are not read at the start
    config = replace(config, shards=str(bad.parent / name))
    assert main(["data", "index", config.shards, "--workers", "0"]) == 1
    assert served(config) == keys
    assert any(str(bad) in r.message for r in caplog.records)
    with pytest.raises(NotATar, match=r"data\.max_bad_shards=0\.25"):
        served(replace(config, max_bad_shards=0.0))


def test_every_missing_name_of_a_range_is_told_at_once(make_shards, monkeypatch) -> None:
    url, _ = make_shards([1] * 9)
    folder = Path(url).parent
    named = f"{folder}/{{00000..00009}}.tar"
    for i in (2, 5, 6):
        (folder / f"{i:05d}.tar").unlink()
    with pytest.raises(
        NoShards, match=r"^4 of the 10 .* not exist: 00002.tar, 00005.tar to 00006.tar, 00009.tar; "
    ):
        open_dataset(DataConfig(shards=named))
    with pytest.raises(NoShards, match=rf"not exist: {folder}/a/0.tar to {folder}/b/1.tar; "):
        list_files(f"{folder}/{{a,b}}/{{0,1}}.tar")
    monkeypatch.setattr(opening, "_SMALL", 3)
    build_index(list_files(url), index_folder(DataConfig(), named))
    with pytest.raises(
        UserError,
        match=r"have no index \(00002.tar, 00005.tar to 00006.tar, 00009.tar\); run `ldm data index",
    ):
        open_dataset(DataConfig(shards=named))
