"""A start without an index, counted: what any number of ranks ask of storage until the first batch."""

from __future__ import annotations

import io
import os
import tarfile
from collections import Counter
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_pipeline.config import DataConfig
from data_pipeline.loader import Part, build_loader, open_dataset
from data_pipeline.storage.urls import spelled_out
from tests.integration.data.fault_proxy import FaultProxy

BATCH = LANES = 8
SHARDS = 200
RANKS = (1, 2, 4)
NAMES = f"{{00000..{SHARDS - 1:05d}}}.tar"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A set for each number of ranks: one shard of twelve samples, a request's worth, under many names."""
    root = tmp_path_factory.mktemp("buckets")
    (root / "bucket").mkdir()
    with tarfile.open(root / "bucket" / "one.tar", "w") as tar:
        for i in range(12):
            out = io.BytesIO()
            Image.fromarray(np.full((16, 16, 3), 9 * i, np.uint8)).save(out, "JPEG")
            for name, content in (("jpg", out.getvalue()), ("txt", b"caption")):
                info = tarfile.TarInfo(f"{i:04d}.{name}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    for ranks in RANKS:
        (root / "bucket" / f"of{ranks}").mkdir(parents=True)
        for shard in range(SHARDS):
            os.link(root / "bucket" / "one.tar", root / "bucket" / f"of{ranks}" / f"{shard:05d}.tar")
    return root


@pytest.mark.parametrize("ranks", RANKS)
def test_a_lane_begins_with_one_request_at_any_number_of_ranks(
    server: FaultProxy, ranks: int, caplog: pytest.LogCaptureFixture
) -> None:
    """The set is opened once, lanes are shared out, and no shard is looked up before it is read."""
    config = DataConfig(
        shards=f"s3://bucket/of{ranks}/{NAMES}", image_size=16, workers=0, order="streamed", lanes=LANES
    )
    dataset = open_dataset(config, at_once=True)
    asked = requests(server, ranks)
    assert {path for _, path in asked if path.endswith(".tar")} == {"00000.tar"}
    assert sum(asked.values()) <= 2 + 2 * 8  # that shard, and what may stand beside eight
    server.traffic.clear()
    keys: list[str] = []
    with ExitStack() as stack:
        loaders = [
            build_loader(config, seed=3, global_batch_size=BATCH, part=Part(rank, ranks), dataset=dataset)
            for rank in range(ranks)
        ]
        for loader in loaders:
            keys += next(stack.enter_context(loader)).keys
        asked = {pair: count for pair, count in requests(server, ranks).items() if pair[1].endswith(".tar")}
    assert "left out: " not in caplog.text  # what is read when the loaders are closed
    assert {method for method, _ in asked} == {"GET"}
    assert set(asked.values()) == {1}
    first = {f"{key.split('/')[0]}.tar" for key in keys}
    assert len(first) == LANES
    assert first <= {name for _, name in asked}


def requests(server: FaultProxy, ranks: int) -> Counter[tuple[str, str]]:
    """Of (method, name of the object) in this set; the last of another may end behind its loaders."""
    traffic = [(method, path.partition("?")[0]) for method, path, _ in list(server.traffic)]
    return Counter((method, path.rpartition("/")[2]) for method, path in traffic if f"of{ranks}" in path)


def test_the_names_of_a_large_set_are_spelled_out_once(tmp_path: Path, folder: Path) -> None:
    """Whether they are indexed, what they are, and how many lanes they fill ask for the same names."""
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "00000.tar").symlink_to(folder / "bucket" / "one.tar")
    spelled_out.cache_clear()
    for _ in range(2):  # the doctor, and the run
        dataset = open_dataset(DataConfig(shards=f"{tmp_path}/set/{{00000..09999}}.tar"), at_once=True)
        assert len(dataset.urls) == 10_000
    assert spelled_out.cache_info().misses == 1
