"""Shards that nobody has indexed: one global order at any layout and restart, each sample once per epoch."""

from __future__ import annotations

import io
import itertools
import json
import queue
import tarfile
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_pipeline.config import DataConfig, HeldOutConfig, SourceConfig
from data_pipeline.errors import AccessDenied, DataError, NoShards, NotATar
from data_pipeline.feed.learned import LearnedShards
from data_pipeline.loader import build_loader, check_layout, open_dataset
from data_pipeline.order.turns import MAX_SAMPLES, Turns
from data_pipeline.shards import recorder
from data_pipeline.shards.beside import JsonCheck
from data_pipeline.shards.build_index import build_index
from data_pipeline.shards.identities import hash_identity
from data_pipeline.shards.index import ShardIndex
from data_pipeline.shards.manifest import read_manifest
from data_pipeline.storage.editions import Edition
from data_pipeline.storage.listing import ListedFile, list_files

BATCH = 12
LANES = 6
Run = Callable[..., Any]


def config_for(url: str, **changes: Any) -> DataConfig:
    given = {"image_size": 16, "workers": 0, "shuffle_window": 5, "order": "streamed", "lanes": LANES}
    return DataConfig(**{"shards": url, **given, **changes})


@settings(max_examples=6, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    counts=st.lists(st.integers(0, 15), min_size=6, max_size=9).filter(lambda c: sum(c) >= 24),
    layouts=st.lists(st.integers(1, 8), min_size=1, max_size=4),
    stop=st.integers(1, 3),
    seed=st.integers(0, 99),
    corrupt=st.sets(st.integers(0, 30), max_size=6),
    filtered=st.booleans(),
    window=st.integers(1, 9),
)
def test_order_survives_layouts_restarts_filters_and_corruption(
    run: Run, tmp_path_factory, write_shards, counts, layouts, stop, seed, corrupt, filtered, window
) -> None:
    folder = tmp_path_factory.mktemp("shards")
    names = [f"{s:05d}/{s:05d}{i:04d}" for s, n in enumerate(counts) for i in range(n)]
    write_shards(folder, counts, corrupt=frozenset(names[i] for i in corrupt if i < len(names)))
    config = config_for(
        str(folder / "*.tar"), shuffle_window=window, filter="score < 0.85" if filtered else ""
    )
    whole, _, _ = run(config, stop * len(layouts), seed=seed)
    parts, position = [], None
    for ranks in layouts:  # killed after so many steps, again and again, at other numbers of ranks
        some, position, _ = run(config, stop, ranks=ranks, position=position, seed=seed)
        parts += some
    assert parts == whole


@pytest.mark.parametrize("filtered", [False, True])
def test_each_sample_comes_once_per_epoch_or_is_counted(
    run: Run, tmp_path: Path, write_shards, filtered: bool
) -> None:
    """Over whole epochs of all lanes, with a kill after every step and other ranks after each."""
    bad = frozenset({"00001/000010003", "00000/000000000"})
    counts = [9, 4, 15, 1, 0, 7, 11]
    keys = write_shards(tmp_path, counts, corrupt=bad)
    rejects = tmp_path / "rejects-{rank}.jsonl"
    config = config_for(
        str(tmp_path / "*.tar"), filter="score < 0.75" if filtered else "", reject_file=str(rejects)
    )
    epochs, visits, position = 3, Counter[tuple[int, str]](), None
    for ranks in itertools.cycle([1, 4, 6, 3]):
        batches, position, _ = run(config, 1, ranks=ranks, position=position)
        for served, ordinals, _ in batches:
            visits.update(
                (ordinal // MAX_SAMPLES // len(counts), key)
                for key, ordinal in zip(served, ordinals, strict=True)
            )
        lanes = [state[0] * LANES + lane for lane, state in enumerate(position["states"])]
        if min(lanes) >= epochs * len(counts):
            break
    records = [json.loads(line) for file in tmp_path.glob("rejects-*") for line in file.open()]
    again = Counter((r["ordinal"], r["key"], r["reason"]) for r in records)
    visits.update((ordinal // MAX_SAMPLES // len(counts), key) for ordinal, key, _ in again)
    assert {reason for _, _, reason in again} == {"not_an_image"} | (
        {"filter: score < 0.75"} if filtered else set()
    )
    for epoch in range(epochs):
        assert {k: visits[epoch, k] for k in keys} == dict.fromkeys(keys, 1)


@settings(max_examples=50, deadline=None)
@given(
    shards=st.integers(1, 40), divisor=st.integers(1, 40), seed=st.integers(0, 9), epochs=st.integers(1, 4)
)
def test_turns_give_each_shard_to_one_lane_in_each_epoch(
    shards: int, divisor: int, seed: int, epochs: int
) -> None:
    lanes = min(shards, divisor)
    turns = Turns(shards, seed, lanes, window=8)
    seen: Counter[tuple[int, int]] = Counter()
    for turn in range(-(-epochs * shards // lanes)):
        for lane in range(lanes):
            seen[turns.epoch(lane, turn), turns.entry(lane, turn)] += 1
    for epoch in range(epochs):
        assert [seen[epoch, entry] for entry in range(shards)] == [1] * shards
    ordinals = [turns.ordinal(turn, lane, 7) for turn in range(5) for lane in range(lanes)]
    assert len({ordinal // MAX_SAMPLES for ordinal in ordinals}) == len(ordinals)


def visited_first(shards: int, lanes: int, seed: int) -> list[int]:
    """The shards that lanes walk first."""
    return [Turns(shards, seed, lanes, window=5).entry(lane, 0) for lane in range(lanes)]


def test_the_first_batches_of_a_large_set_read_the_shards_of_their_lanes_alone(
    run: Run, tmp_path: Path, write_shards, caplog: pytest.LogCaptureFixture
) -> None:
    """Of 5000 shards only those that the lanes walk first exist: nothing asks for the others."""
    first = visited_first(5000, LANES, seed=3)
    for shard in {0, *first}:  # the first tells how large samples are
        write_shards(tmp_path, [150], first=shard)
    url = f"{tmp_path}/{{00000..04999}}.tar"
    config = config_for(url, order="indexed")  # the default: a set of this size is not indexed by itself
    batches, position, rejected = run(config, 5, ranks=2)
    assert Counter(key.split("/")[0] for keys, _, _ in batches for key in keys) == {
        f"{shard:05d}": 10 for shard in first
    }
    assert not rejected
    assert "starting at once, without an index: 5000 of the 5000 shards" in caplog.text
    assert not (tmp_path / "_index").exists()
    rest, _, _ = run(config, 2, ranks=3, position=position)
    assert batches[:3] + batches[3:] + rest == run(config, 7)[0]


def test_a_run_that_began_without_an_index_goes_on_when_there_is_one(
    run: Run, tmp_path: Path, write_shards
) -> None:
    write_shards(tmp_path, [9, 12, 15, 11, 8, 14, 13])
    streamed = config_for(str(tmp_path), shuffle_window=0)
    whole, _, _ = run(streamed, 9)
    some, position, _ = run(streamed, 4, ranks=2)
    indexed = config_for(str(tmp_path), order="indexed", shuffle_window=0)
    assert open_dataset(indexed).counts.tolist() == [9, 12, 15, 11, 8, 14, 13]
    rest, _, _ = run(indexed, 5, ranks=3, position=position)
    assert some + rest == whole
    began, position, _ = run(indexed, 2)  # a new run takes the order of the index
    assert began != whole[:2]
    with pytest.raises(
        DataError, match=r"stopped in the order of an index\. data.order=streamed uses none\. Go on with"
    ):
        run(streamed, 1, position=position)


def served_in_an_epoch(config: DataConfig) -> set[str]:
    """Keys of the first epoch, whichever order they come in."""
    loader = build_loader(config, seed=5, global_batch_size=BATCH)
    dataset = open_dataset(config, at_once=True)
    per_epoch = len(dataset.urls) * MAX_SAMPLES if dataset.unindexed else int(dataset.counts.sum())
    served: set[str] = set()
    with loader:
        while True:
            batch = next(loader)
            ordinals = batch.ordinals.tolist()
            served |= {key for key, o in zip(batch.keys, ordinals, strict=True) if o < per_epoch}
            if min(ordinals) >= per_epoch:  # every lane is in the next epoch
                return served


def test_filters_removals_and_the_held_out_share_decide_as_with_an_index(
    tmp_path: Path, write_shards
) -> None:
    keys = write_shards(tmp_path / "shards", [20, 25, 30, 22, 27, 24, 21])
    gone = [*keys[3:40:9], *(f"http://x.invalid/{key.split('/')[1]}" for key in keys[50:90:11])]
    (tmp_path / "gone.txt").write_text("\n".join(gone))
    choices = {
        "filter": "score < 0.75 and width >= 20 and not missing(url)",
        "removal_lists": (str(tmp_path / "gone.txt"),),
        "validation": HeldOutConfig(share=0.2),
    }
    url = str(tmp_path / "shards")
    streamed = served_in_an_epoch(config_for(url, **choices))
    assert streamed == served_in_an_epoch(config_for(url, order="indexed", **choices))
    assert 40 < len(streamed) < 0.7 * len(keys)
    assert not streamed & set(keys[3:40:9])
    assert not streamed & set(keys[50:90:11])


def test_a_source_with_repeat_comes_so_often(tmp_path: Path, write_shards) -> None:
    rare = [f"a/{key}" for key in write_shards(tmp_path / "a", [5, 4, 3])]
    common = [f"b/{key}" for key in write_shards(tmp_path / "b", [7, 8, 9])]
    sources = (SourceConfig(str(tmp_path / "a"), repeat=3), SourceConfig(str(tmp_path / "b")))
    visits: Counter[str] = Counter()
    with build_loader(config_for("", sources=sources), seed=1, global_batch_size=BATCH) as loader:
        while True:
            batch = next(loader)
            places = [ordinal // MAX_SAMPLES for ordinal in batch.ordinals.tolist()]
            visits.update(key for key, place in zip(batch.keys, places, strict=True) if place < 12)
            if min(places) >= 12:  # twelve entries are an epoch
                break
    assert visits == Counter(dict.fromkeys(rare, 3) | dict.fromkeys(common, 1))


def test_the_first_epoch_leaves_the_index_behind(
    run: Run, tmp_path: Path, write_shards, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `ldm data index` makes it, to the bit, of every shard once."""
    counts = [9, 12, 15, 11, 8, 14, 13]
    write_shards(tmp_path / "shards", counts)
    monkeypatch.setattr(recorder, "_FIRST_S", -1.0)  # rows are written as they come
    config = config_for(str(tmp_path / "shards"))
    shards, index = list_files(str(tmp_path / "shards")), tmp_path / "shards" / "_index"
    serve_until(config, lambda: len(read_manifest(str(index))) == len(counts))
    report = build_index(shards, str(index))
    assert report.read == 0  # nothing is left to be read
    assert [row.samples for row in report.rows.values()] == counts
    built = build_index(shards, str(tmp_path / "built"))
    assert built.rows == report.rows  # checksums among them
    for row in built.rows.values():
        assert (index / row.index).read_bytes() == (tmp_path / "built" / row.index).read_bytes()
    # What is there is not written again, and where nothing can be written training goes on.
    before = {path: path.stat().st_mtime_ns for path in index.rglob("*.npz")}
    (tmp_path / "file").write_text("no folder")
    elsewhere = config_for(str(tmp_path / "shards"), index=str(tmp_path / "file" / "index"))
    serve_until(elsewhere, lambda: "what shards hold is not kept for an index" in caplog.text)
    run(config, 2 * sum(counts) // BATCH)
    assert {path: path.stat().st_mtime_ns for path in index.rglob("*.npz")} == before


def test_learning_waits_for_no_lane_and_holds_few_shards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However busy the threads are that read; what is dropped of a shard is asked for at its next visit."""
    number, asked = 20, queue.Queue[str]()
    go_on = threading.Event()

    def exists(url: str) -> bool:
        go_on.wait(30.0)
        return False

    monkeypatch.setattr(recorder, "exists", exists)
    monkeypatch.setattr(
        recorder.Recorder, "difference", lambda self, url, samples, read: asked.put(url) or ""
    )
    urls = [f"s3://b/{i:05d}.tar" for i in range(number)]
    dataset: Any = SimpleNamespace(urls=urls, index_urls=(), folders=((0, str(tmp_path)),), record_in="")
    reader: Any = SimpleNamespace(
        begin=lambda url, num_bytes: (ListedFile(url, 0, "e"), b""), read=pytest.fail, read_if_there=None
    )
    shards = LearnedShards(dataset, reader)
    met = []
    for shard in range(number):
        pieces, question = shards.open(shard, None, 1)
        met.append(pieces)
        shards.learn(shard, pieces, question, 0)
    assert [pieces.keeps for pieces in met] == [False] * 12 + [True] * 8
    go_on.set()
    assert [asked.get(timeout=30.0) for _ in range(number)] == urls
    shards.close()


def test_where_nothing_may_be_written_the_run_keeps_the_index(
    tmp_path: Path, write_shards, caplog: pytest.LogCaptureFixture
) -> None:
    counts = [9, 12, 15, 11, 8, 14, 13]
    write_shards(tmp_path / "shards", counts)
    (tmp_path / "file").write_text("no folder")  # beneath which nobody can write, root neither
    own = tmp_path / "run" / "index"
    config = config_for(str(tmp_path / "shards"), index=str(tmp_path / "file" / "index"))
    dataset = replace(open_dataset(config, at_once=True), record_in=str(own))
    with build_loader(config, seed=3, global_batch_size=BATCH, dataset=dataset) as loader:
        for _ in range(2 * sum(counts) // BATCH):
            next(loader)
        while len([*own.glob("*.npz")]) < len(counts):
            next(loader)
    assert caplog.text.count(f"later runs have it with data.index={own}") == 1
    assert "is not kept" not in caplog.text
    report = build_index(list_files(str(tmp_path / "shards")), str(own))
    assert report.read <= 1  # the row of the shard whose file was just written may not have been made
    later = config_for(str(tmp_path / "shards"), index=str(own), order="indexed")
    assert open_dataset(later).counts.tolist() == counts


def test_what_loader_processes_have_learned_is_kept_when_they_are_closed(
    tmp_path: Path, write_shards
) -> None:
    counts = [9, 12, 15, 11, 8, 14, 13]
    write_shards(tmp_path, counts)
    index = tmp_path / "_index"
    serve_until(config_for(str(tmp_path), workers=2), lambda: len([*index.glob("*.npz")]) == len(counts))
    # Of each process the row of the shard whose file was just written may not have been made.
    assert len(read_manifest(str(index))) >= len(counts) - 2


def serve_until(config: DataConfig, is_enough: Callable[[], bool]) -> None:
    """Take batches until something has happened."""
    with build_loader(config, seed=5, global_batch_size=BATCH) as loader:
        while not is_enough():
            next(loader)


def test_the_first_batch_waits_for_no_large_window(tmp_path: Path, write_shards) -> None:
    """However large the windows, a lane begins with a few samples; later ones are as large as is set."""
    turns = Turns(9, seed=1, lanes=3, window=2048)
    for lane, sizes in enumerate([[4, 4, 8, 16], [3, 4, 7, 14], [2, 4, 6, 12]]):
        first = [0]
        while first[-1] < 40_000:
            first.append(first[-1] + turns.window_size(lane, first[-1]))
        steps = [after - before for before, after in itertools.pairwise(first)]
        assert steps[:4] == sizes
        assert set(steps[12:]) == {2048}
        assert sum(sizes) == first[4]
    assert [Turns(9, 1, 3, window=2).window_size(lane, 0) for lane in range(3)] == [2, 2, 1]
    write_shards(tmp_path, [400] * 6)
    loader = build_loader(config_for(str(tmp_path), shuffle_window=400), seed=3, global_batch_size=BATCH)
    with loader:
        next(loader)
        assert loader.counts["bytes"] < 0.5 * sum(path.stat().st_size for path in tmp_path.glob("*.tar"))


def shards_with(tmp_path: Path, write_shards, counts: Sequence[int]) -> str:
    write_shards(tmp_path / "shards", list(counts))
    return f"{tmp_path}/shards/{{00000..{len(counts) - 1:05d}}}.tar"


def test_shards_that_cannot_be_used_are_left_out_and_told(
    run: Run, tmp_path: Path, write_shards, caplog: pytest.LogCaptureFixture
) -> None:
    url = shards_with(tmp_path, write_shards, [9] * 10)
    (tmp_path / "shards" / "00003.tar").write_bytes(b"<html>moved</html>")
    (tmp_path / "shards" / "00007.tar").unlink()
    config = config_for(url, max_bad_shards=0.2, reject_file=str(tmp_path / "rejects.jsonl"))
    batches, _, rejected = run(config, 8)  # more than the eight shards hold
    served = {key.split("/")[0] for keys, _, _ in batches for key in keys}
    assert served == {f"{i:05d}" for i in range(10)} - {"00003", "00007"}
    assert rejected["bad_shard"] >= 2
    assert "00003.tar is not a tar archive (it is a web page)" in caplog.text
    told = [json.loads(line) for line in (tmp_path / "rejects.jsonl").open()]
    assert {"00003/*", "00007/*"} <= {record["key"] for record in told}
    assert run(config, 3)[0] + run(config, 5, ranks=3, position=run(config, 3)[1])[0] == batches
    with pytest.raises(NotATar, match=r"2 of the 10 shards cannot be used so far.*data.max_bad_shards"):
        run(config_for(url, max_bad_shards=0.1), 8)
    with pytest.raises(NoShards, match=r"None of the first 8 shards, from .*nowhere"):
        open_dataset(config_for(f"{tmp_path}/nowhere/{{00000..00009}}.tar"), at_once=True)


@pytest.mark.parametrize("what", ["apart", "link"])
def test_a_shard_whose_members_cannot_be_joined_is_left_like_one_that_is_no_tar(
    run: Run, tmp_path: Path, write_shards, what: str
) -> None:
    url = shards_with(tmp_path, write_shards, [20] * 8)
    with tarfile.open(tmp_path / "shards" / "00003.tar", "a") as tar:
        if what == "apart":
            info = tarfile.TarInfo("000030000.caption")
            info.size = 3
            tar.addfile(info, io.BytesIO(b"abc"))
        else:
            info = tarfile.TarInfo("zz.jpg")
            info.type, info.linkname = tarfile.LNKTYPE, "000030000.jpg"
            tar.addfile(info)
    config = config_for(url, max_bad_shards=0.125, lanes=4)
    batches, _, rejected = run(config, 14)
    assert rejected == {"bad_shard": rejected["bad_shard"]}
    served = Counter(key for keys, _, _ in batches for key in keys)
    assert {key for key in served if not key.startswith("00003/")} == {
        f"{shard:05d}/{shard:05d}{i:04d}" for shard in range(8) if shard != 3 for i in range(20)
    }
    assert 0 < sum(key.startswith("00003/") for key in served) <= 20  # up to the window that it ends in
    assert run(config, 14, ranks=3)[0] == batches
    with pytest.raises(NotATar, match=r"00003.tar.* 1 of the 8 shards cannot be used.*data.max_bad_shards"):
        run(config_for(url), 14)


def test_a_shard_that_was_replaced_is_not_read_on_at_the_old_place(
    run: Run, tmp_path: Path, write_shards
) -> None:
    url = shards_with(tmp_path, write_shards, [30] * 6)
    config = config_for(url)
    whole, _, _ = run(config, 20)
    _, position, _ = run(config, 2)
    lane = 1
    shard = visited_first(6, LANES, seed=3)[lane]
    write_shards(tmp_path / "shards", [31], first=shard)
    rest, _, rejected = run(config, 3, position=position)
    assert rejected == {"shard_replaced": 1}
    for before, now in zip(whole[2:5], rest, strict=True):
        for slot in range(BATCH):
            is_its = slot // (BATCH // LANES) == lane
            assert (before[0][slot] == now[0][slot]) != is_its
            assert is_its == (now[0][slot].split("/")[0] != f"{shard:05d}" != before[0][slot] and is_its)


def test_an_opt_out_that_stands_in_the_parquet_alone_is_not_passed_over(
    run: Run, tmp_path: Path, write_shards
) -> None:
    url = shards_with(tmp_path, write_shards, [9] * 6)
    (tmp_path / "gone.txt").write_text("0" * 64)
    keys = [f"00000{i:04d}" for i in range(9)]
    for shard in range(6):
        table = {"key": [k.replace("00000", f"{shard:05d}", 1) for k in keys], "url": ["u"] * 9}
        pq.write_table(pa.table(table), tmp_path / "shards" / f"{shard:05d}.parquet")
    config = config_for(url, removal_lists=(str(tmp_path / "gone.txt"),))
    (tmp_path / "shards" / "00002.parquet").write_bytes(b"PAR1")
    run(config, 1)  # what the parquet has, the json has
    table |= {"key": [k.replace("00000", "00004", 1) for k in keys], "sha256": ["1" * 64] * 9}
    pq.write_table(pa.table(table), tmp_path / "shards" / "00004.parquet")
    with pytest.raises(DataError, match=r"sha256 of .*00004.tar stand in the parquet .*run `ldm data index`"):
        run(config, 1)
    with pytest.raises(DataError, match=r"sha256 of .*00004.tar stand in the parquet"):
        run(config_for(url, filter="missing(sha256)"), 1)


def parquet_of(table: dict[str, list[Any]]) -> bytes:
    out = io.BytesIO()
    pq.write_table(pa.table(table), out)
    return out.getvalue()


def window_of(keys: Sequence[str], **columns: list[str | None]) -> ShardIndex:
    """Index of samples whose json members have these fields."""
    index = ShardIndex(
        "s3://b/00000.tar", 1, "e", np.asarray([key.encode() for key in keys], np.bytes_), ("jpg", "json"),
        *(np.zeros((2, len(keys)), np.uint32) for _ in "so"), np.zeros(len(keys), np.uint8),
    )  # fmt: skip
    for name, values in columns.items():
        index.hashes[name] = np.asarray([0 if v is None else hash_identity(v) for v in values], np.uint64)
    return index


@pytest.mark.parametrize(
    ("raw", "sentence"),
    [
        (b"", "00000.parquet is not readable"),
        (b"PAR1abcdefgh", "00000.parquet is not readable"),
        (parquet_of({"id": ["1"], "sha256": ["1"]}), "00000.parquet has no column key"),
    ],
    ids=["empty", "cut off", "no keys"],
)
def test_a_parquet_of_no_use_is_told_and_ends_nothing(raw: bytes, sentence: str) -> None:
    told: list[str] = []
    check = JsonCheck("s3://b/00000.tar", {"score"}, True, lambda url: raw, told.append)
    for _ in range(2):
        check(window_of(["0", "1"]))
    assert [sentence in line for line in told] == [True]


def test_a_parquet_that_is_refused_is_not_there() -> None:
    """As S3 answers for what is absent from a bucket that one may not list."""

    def refused(url: str) -> bytes:
        raise AccessDenied(f"Access to {url} is denied.")

    JsonCheck("s3://b/00000.tar", {"score"}, True, refused, pytest.fail)(window_of(["0"]))


def test_only_what_a_sample_has_in_the_parquet_alone_is_missed() -> None:
    """A json may leave out a field that is empty; wherever in the shard one is not, the window says so."""
    table = {"key": ["0", "1", "2", "3"], "url": list("abcd"), "md5": [None, None, "1" * 32, "0" * 32]}
    asked: list[str] = []

    def read(url: str) -> bytes:
        asked.append(url)
        return parquet_of(table)

    check = JsonCheck("s3://b/00000.tar", (), True, read, pytest.fail)
    check(window_of(["0"], url=["a"]))
    check(window_of(["1"], url=["b"], md5=[None]))
    check(window_of(["2"], url=["c"], md5=["1" * 32]))
    assert asked == ["s3://b/00000.parquet"] * 2  # not for a window whose json tells
    with pytest.raises(DataError, match=r"md5 of s3://b/00000.tar stand in the parquet beside it alone"):
        check(window_of(["3"], url=["d"]))


def test_a_parquet_that_the_index_has_seen_is_not_read_again() -> None:
    """A look at its edition is enough, and of none there is nothing to read."""
    now: list[Edition | None] = [Edition(9, "abc")]

    def check(noted: str) -> None:
        read = JsonCheck("s3://b/00000.tar", (), True, refuse, refuse, noted, lambda url: now[0])
        read(window_of(["0"], url=["a"]))

    def refuse(what: str) -> bytes:
        raise AssertionError(what)

    check("9 abc")
    for noted in ("9 abd", "8 abc", "none"):
        with pytest.raises(AssertionError, match=r"00000\.parquet"):
            check(noted)
    now[0] = None
    check("none")
    check("9 abc")  # what the index has read of it stays


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"buckets": True, "bucket_step": 8}, "data.buckets needs an index"),
        ({"lanes": 12}, "data.lanes=12 exceeds the 6 shards"),
        ({"lanes": 5}, "data.lanes=5 does not divide global_batch_size=12; choose one of 1, 2, 3, 4, 6"),
    ],
)
def test_what_needs_an_index_says_so(
    tmp_path: Path, write_shards: Callable[..., Any], changes: dict[str, Any], sentence: str
) -> None:
    config = config_for(shards_with(tmp_path, write_shards, [3] * 6), **changes)
    with pytest.raises(DataError, match=sentence):
        check_layout(config, open_dataset(config, at_once=True), seed=1, global_batch_size=BATCH)


def test_an_index_that_is_there_is_used(tmp_path: Path, write_shards, monkeypatch) -> None:
    """Sets of any size: with a whole index the order is that of the index, as ever."""
    write_shards(tmp_path / "shards", [9, 12, 15])
    monkeypatch.setattr("data_pipeline.shards.opening._SMALL", 2)
    config = config_for(f"{tmp_path}/shards/{{00000..00002}}.tar", order="indexed", lanes=3)
    assert open_dataset(config, at_once=True).unindexed
    with pytest.raises(NoShards, match=r"3 of the 3 shards .* have no index .*run `ldm data index"):
        open_dataset(config)  # who needs the index is told so
    build_index(list_files(str(tmp_path / "shards")), str(tmp_path / "shards" / "_index"))
    dataset = open_dataset(config, at_once=True)
    assert (dataset.unindexed, dataset.counts.tolist()) == ("", [9, 12, 15])
