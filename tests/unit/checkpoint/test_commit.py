"""Rank 0's commit of hundreds of ranks: what it writes, and that its work knows only how many they are."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from data_pipeline.storage.files import modified_at
from data_pipeline.storage.large import checksum_bytes
from trainer.checkpoint import catalogue
from trainer.checkpoint.catalogue import Retention, folder_name, open_checkpoint
from trainer.checkpoint.layout import ShardPlan, Span
from trainer.checkpoint.manifest import Manifest, StoredFile, tables_text
from trainer.checkpoint.retirement import Retirement
from trainer.checkpoint.writer import Commit, Job, shard_name, write_commit, write_shard

RANKS = 64
KINDS = {"unet": ("master", "exp_avg"), "frozen": ("master",)}


def plans(spans: int) -> list[ShardPlan]:
    """Of each rank: `spans` parameters of one element each, and a frozen one."""
    return [
        ShardPlan(
            {
                "unet": tuple(Span(f"weight.{i}", rank, 1) for i in range(spans)),
                "frozen": (Span("frozen.weight", rank, 1),),
            },
            KINDS,
        )
        for rank in range(RANKS)
    ]


def commit(
    folder: Path, of_ranks: list[ShardPlan], *, step: int = 1, retirement: Retirement | None = None
) -> Counter[str]:
    """Commit them; calls of functions of `trainer/checkpoint` by name, while it went on."""
    unknown = StoredFile("", 0, "")
    shapes = {
        "unet": {s.name: (RANKS,) for s in of_ranks[0].tables["unet"]},
        "frozen": {"frozen.weight": (RANKS,)},
    }
    commit = Commit(
        Manifest(step, (), unknown, unknown, (), KINDS, shapes, loss=0.5),
        b"[%s]" % b",".join(tables_text(plan.tables) for plan in of_ranks),
        tuple(plan.file_bytes for plan in of_ranks),
        b"{}",
        b"",
        Retention(keep_last=1, keep_every=1, keep_best=1),
        patience_s=0.0,
    )
    jobs = [
        Job(str(folder), step, "00010001", rank, plan, None if rank else commit)
        for rank, plan in enumerate(of_ranks)
    ]
    own, *_ = [write_shard(job, memoryview(bytes(job.plan.data_bytes))) for job in jobs]
    calls: Counter[str] = Counter()

    def count(frame: FrameType, event: str, argument: Any) -> None:
        if event == "call" and "checkpoint" in frame.f_code.co_filename:
            calls[frame.f_code.co_qualname] += 1

    sys.setprofile(count)
    try:
        write_commit(jobs[0], own, retirement or Retirement())
    finally:
        sys.setprofile(None)
    return calls


def test_a_commit_says_where_every_span_lies(tmp_path: Path) -> None:
    of_ranks = plans(3)
    commit(tmp_path, of_ranks)
    handle = open_checkpoint(str(tmp_path / folder_name(1)))
    assert [handle.manifest.plan(rank) for rank in range(RANKS)] == of_ranks
    assert [*handle.manifest.kinds] == ["unet", "frozen"]  # as they lie in the files
    for rank, shard in enumerate(handle.manifest.shards):
        data = (tmp_path / folder_name(1) / shard.name).read_bytes()
        assert (len(data), checksum_bytes(data)) == (shard.size, shard.checksum)
        assert shard.name == shard_name(rank, "00010001", shard.checksum)


def test_its_work_does_not_grow_with_what_ranks_own(tmp_path: Path) -> None:
    """SD2 under ZeRO-3 on 512 ranks has 270,000 spans, and the run waits while rank 0 is at them."""
    few, many = commit(tmp_path / "few", plans(1)), commit(tmp_path / "many", plans(100))
    assert many == few
    assert few["write_commit"] == 1


def test_what_is_known_of_older_ones_is_not_read_again(tmp_path: Path) -> None:
    """Manifests are megabytes under ZeRO-3, and `keep_every` keeps hundreds of them."""
    of_ranks, retirement = plans(1), Retirement()
    for step in (1, 2, 3):
        assert commit(tmp_path, of_ranks, step=step, retirement=retirement)["open_checkpoint"] == 0
    started_again = Retirement()
    assert commit(tmp_path, of_ranks, step=4, retirement=started_again)["open_checkpoint"] == 3
    assert commit(tmp_path, of_ranks, step=5, retirement=started_again)["open_checkpoint"] == 0
    assert len([*tmp_path.iterdir()]) == 5


def test_storage_is_asked_once_about_what_stays_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever waits for the commit, a node that is to go away among them, waits for these requests, too."""
    asked: Counter[str] = Counter()

    def counted(url: str) -> float:
        asked[url.split("/")[-2]] += 1
        return modified_at(url)

    monkeypatch.setattr(catalogue, "modified_at", counted)
    of_ranks, retirement = plans(1), Retirement()
    for step in range(1, 8):
        commit(tmp_path, of_ranks, step=step, retirement=retirement)
    assert asked == {folder_name(step): 1 for step in range(1, 8)}
    asked.clear()
    started_again = Retirement()
    for step in (8, 9, 5):  # the last one after a rewind
        commit(tmp_path, of_ranks, step=step, retirement=started_again)
    assert asked == {folder_name(step): 1 for step in (1, 2, 3, 4, 6, 7, 8, 9)} | {folder_name(5): 2}
