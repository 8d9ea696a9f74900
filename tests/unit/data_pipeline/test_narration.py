"""What the hard files tell about themselves is true: their examples are run."""

from __future__ import annotations

import doctest
import json
import re
from itertools import chain
from pathlib import Path

import pytest

from data_pipeline import batch
from data_pipeline.config import DataConfig
from data_pipeline.feed import lane_walk, reads, share
from data_pipeline.feed.lane_walk import LaneWalk, Walker
from data_pipeline.feed.reads import MemberReads
from data_pipeline.feed.share import ShareStream
from data_pipeline.feed.task import ShareTask
from data_pipeline.loader import Part, build_loader
from data_pipeline.order import buckets, lanes, position
from data_pipeline.order.buckets import Buckets
from data_pipeline.order.position import LaneState, merge_positions
from data_pipeline.pictures import crops
from data_pipeline.shards import filters
from data_pipeline.shards import index as index_module
from data_pipeline.shards.index import ABSENT
from data_pipeline.shards.opening import open_dataset
from data_pipeline.shards.read_index import read_index
from data_pipeline.shards.selection import make_selection
from data_pipeline.shards.view import ShardViews
from data_pipeline.storage import listing
from data_pipeline.storage.listing import list_files
from data_pipeline.storage.ranges import Background, RangeReader


@pytest.mark.parametrize(
    "module", [lanes, buckets, reads, filters, crops, listing, batch], ids=lambda module: module.__name__
)
def test_examples_run(module) -> None:
    failed, tried = doctest.testmod(module)
    assert tried
    assert not failed


@pytest.fixture
def three_shards(tmp_path: Path, write_tar, tiny_picture) -> DataConfig:
    """A, B and C with 6, 4 and 6 samples; C4 has the score 1, all others 0."""
    for name, count in (("A", 6), ("B", 4), ("C", 6)):
        members = []
        for row in range(count):
            key = f"{name}{row}"
            members.append((f"{key}.jpg", tiny_picture(row)))
            members.append((f"{key}.json", json.dumps({"score": int(key == "C4")}).encode()))
        write_tar(tmp_path / f"{name}.tar", members)
    return DataConfig(
        shards=str(tmp_path / "*.tar"),
        image_size=16,
        filter="score < 0.5",
        require_caption=False,
        shuffle_window=3,
        workers=0,
    )


def rows_of_the_table() -> list[tuple[list[str], list[list[object]]]]:
    """(key per lane, state per lane) of each step in the lane walk's example."""
    found = []
    for line in (lane_walk.__doc__ or "").splitlines():
        cells = line.split("|")
        if len(cells) == 4 and cells[0].strip().isdigit():
            keys = f"{cells[1]} {cells[2]}".split()
            found.append((keys, [json.loads(state) for state in re.split(r"\s{2,}", cells[3].strip())]))
    return found


def serve(walk: LaneWalk, failing: set[str]) -> str:
    """What a share does with a lane until one sample is served; those in `failing` cannot be read once."""
    while True:
        visit = walk.next_visit()
        if visit.reason is not None:
            walk.done(visit)
        elif visit.key in failing:
            failing.remove(visit.key)
            walk.defer(visit)
        else:
            assert visit.load()["jpg"]
            walk.done(visit)
            return visit.key


def test_lane_walk_example(three_shards: DataConfig) -> None:
    table = rows_of_the_table()
    assert len(table) == 4
    dataset = open_dataset(three_shards)
    order = dataset.order(three_shards, seed=2, global_batch_size=4)
    square = Buckets(((16, 16),), (order,))
    ranks = [range(0, 2), range(2, 4)]
    walkers = []
    for mine in ranks:
        task = ShareTask(three_shards, dataset, order, mine, square, 0, (LaneState(),) * 2, 1)
        reader = RangeReader(timeout_s=10, tries=1, patience_s=10)
        views = ShardViews(dataset, [make_selection(three_shards)], square, reader, 8)
        walkers.append(Walker(task, views, MemberReads(dataset, reader, Background(2), None, 10**6)))
    walks = [walk for walker in walkers for walk in walker.walks]
    failing = {"A3"}
    for keys, states in table:
        assert [serve(walk, failing) for walk in walks] == keys
        assert [walk.state.as_json() for walk in walks] == states
    for walker in walkers:
        walker.background.close()


def test_both_files_tell_of_the_same_lanes() -> None:
    walked = [line for line in (lanes.__doc__ or "").splitlines() if re.fullmatch(r"([ABC]\d ?){4}", line)]
    told = re.findall(r"lane \d  ((?:[ABC]\d ?){4})", lane_walk.__doc__ or "")
    assert [row.strip() for row in told] == walked
    assert len(walked) == 4


@pytest.mark.parametrize(("ranks", "workers"), [(1, 1), (2, 2), (4, 1), (1, 2)])
def test_share_example(three_shards: DataConfig, ranks: int, workers: int) -> None:
    """Two samples of every lane per step: slots 0 and 1 from lane 0, whatever the layout."""
    dataset = open_dataset(three_shards)
    order = dataset.order(DataConfig(lanes=4, shuffle_window=3), seed=2, global_batch_size=8)
    keys, dealt = [], []
    for mine in chain.from_iterable(lanes.deal(mine, workers) for mine in lanes.deal(range(4), ranks)):
        task = ShareTask(
            three_shards,
            dataset,
            order,
            mine,
            Buckets(((16, 16),), (order,)),
            0,
            (LaneState(),) * len(mine),
            2,
        )
        stream = ShareStream(task)
        filled = stream.fill(memoryview(bytearray(task.layout().bytes)))
        stream.close()
        keys += filled.keys
        dealt.append(list(mine))
    assert keys == ["C/C2", "C/C1", "C/C5", "A/A0", "A/A3", "A/A2", "B/B0", "B/B2"]
    assert dealt[0] == list(range(4 // (ranks * workers)))
    if ranks * workers == 4:
        row = next(line for line in (share.__doc__ or "").splitlines() if line.split()[:1] == ["lane"])
        assert [int(lane) for lane in row.replace("lane", "").split("|")] == [lane for (lane,) in dealt]


def test_the_loader_serves_the_example(three_shards: DataConfig) -> None:
    """Without trouble in storage, two real ranks give the table's samples, A3 in its own place."""
    loaders = [build_loader(three_shards, seed=2, global_batch_size=4, part=Part(r, 2)) for r in (0, 1)]
    steps = [[key.split("/")[1] for loader in loaders for key in next(loader).keys] for _ in range(4)]
    for loader in loaders:
        loader.close()
    told = [keys for keys, _ in rows_of_the_table()]
    assert [step[:2] for step in steps] == [keys[:2] for keys in told]
    assert [step[2] for step in steps] == ["A3", "A2", "A5", "A4"]


def test_position_example() -> None:
    lines = {line.split("  ")[2]: line for line in (position.__doc__ or "").splitlines() if "{" in line}
    told = {name.strip(): re.findall(r"\{[^}]+\}", line) for name, line in lines.items()}
    common = {"lanes": 4, "buckets": [[16, 16]]}
    ranks = [{**common, **json.loads(part)} for part in told["2 ranks, 4 lanes"]]
    assert merge_positions(ranks[::-1]) == {**common, **json.loads(told["merge_positions"][0])}


def test_index_example(tmp_path: Path, write_tar) -> None:
    write_tar(tmp_path / "0.tar", [("a.jpg", b"x" * 700), ("a.txt", b"hello"), ("b.jpg", b"y" * 300)])
    index = read_index(list_files(str(tmp_path / "0.tar"))[0])
    told = [line.split() for line in (index_module.__doc__ or "").splitlines()]
    jpg, txt = (row for row in told if row[:2] == ["offsets", "jpg"] or row[:2] == ["txt", "4"])
    assert [jpg[2:4], txt[1:3]] == [["1", "6"], ["4", "ABSENT"]]
    sizes_jpg, sizes_txt = (row for row in told if row[:2] == ["sizes", "jpg"] or row[:2] == ["txt", "5"])
    assert [sizes_jpg[2:4], sizes_txt[1:3]] == [["700", "300"], ["5", "0"]]
    assert index.extensions == ("jpg", "txt")
    assert index.offsets.tolist() == [[1, 6], [4, int(ABSENT)]]
    assert index.sizes.tolist() == [[700, 300], [5, 0]]
    with (tmp_path / "0.tar").open("rb") as tar:
        tar.seek(512 * 4)
        assert tar.read(5) == b"hello"
