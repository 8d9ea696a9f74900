"""Checkpoints on a real S3 server: saved, resumed, damaged, interrupted, refused."""

from __future__ import annotations

import logging
import runpy
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from data_pipeline.errors import AccessDenied, UserError
from data_pipeline.storage import client, files, large, waits
from data_pipeline.storage.local_s3 import LocalS3
from tests.integration.data.fault_proxy import FaultProxy
from tests.integration.ranks import ROOT
from trainer.checkpoint import retirement
from trainer.checkpoint.commands import list_checkpoints, verify
from trainer.checkpoint.export import export
from trainer.exit_codes import classify
from trainer.weights import read_weights

build_small_run: Callable[..., Any] = runpy.run_path(
    str(ROOT / "tests/unit/checkpoint/small_run.py"), run_name="small_run"
)["build_small_run"]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalS3]:
    with LocalS3(tmp_path_factory.mktemp("s3"), buckets=("bucket",)) as running:
        yield running


@pytest.fixture
def s3(server: LocalS3, monkeypatch: pytest.MonkeyPatch) -> LocalS3:
    for name, value in server.env.items():
        monkeypatch.setenv(name, value)
    return server


@pytest.mark.parametrize("asynchronous", [False, True])
def test_saved_and_resumed(s3: LocalS3, asynchronous: bool, tmp_path: Path) -> None:
    url = f"s3://bucket/resumed-{asynchronous}"
    run = build_small_run(url, asynchronous=asynchronous)
    for _ in range(4):  # more than retention keeps
        run.train(1)
        run.save()
    run.manager.close()
    again = build_small_run(url, asynchronous=asynchronous, seed=5)
    handle = again.manager.latest_good()
    assert handle is not None
    again.manager.load(handle, {"unet": again.engine}, again.ema)
    assert all(torch.equal(a, b) for a, b in zip(run.everything(), again.everything(), strict=True))
    assert [row.step for row in list_checkpoints(url)] == [4, 3]
    assert not any(found.problems for found in verify(url))
    made = export(url, "s3://bucket/exported.safetensors", profile="weights")
    tensors, _ = read_weights(made.destination)
    assert torch.equal(tensors["0.weight"].flatten(), run.engine.fragments()[0].master)
    again.manager.close()


def test_damage_behind_the_server_is_noticed(s3: LocalS3) -> None:
    run = build_small_run("s3://bucket/damaged")
    run.train(1)
    run.save()
    run.train(1)
    run.save()
    shard = next((s3.folder / "bucket/damaged/checkpoints/step_000000002").glob("rank_*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    handle = run.manager.latest_good()
    assert handle is not None
    assert handle.step == 1


def test_large_files_go_up_in_parts_and_come_back_by_range(
    s3: LocalS3, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(large, "_PART_BYTES", 5 << 20)
    data = torch.arange(3 << 20, dtype=torch.float32).numpy().tobytes()  # 12 MiB: three parts
    size, checksum = large.write_whole("s3://bucket/large", b"head", data)
    assert large.measure("s3://bucket/large", size) == (size, checksum)
    assert size == len(data) + 4
    ranges = [(4 + i * 1000, 4 + i * 1000 + 40) for i in range(20)]
    read = list(large.read_ranges("s3://bucket/large", ranges))
    assert read == [data[first - 4 : last - 4] for first, last in ranges]


def test_an_interrupted_upload_leaves_nothing(s3: LocalS3, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(large, "_PART_BYTES", 5 << 20)

    def parts() -> Iterator[memoryview]:
        yield memoryview(bytes(6 << 20))  # the first part is on its way
        raise RuntimeError("killed here")

    with pytest.raises(Exception, match="killed here"):
        large.write_stream("s3://bucket/interrupted", parts)
    assert "interrupted" not in files.list_names("s3://bucket")


def test_mistakes_are_one_sentence(s3: LocalS3, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="does not exist"):
        build_small_run("s3://nobody-made-this/run")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(UserError, match="AWS_SECRET_ACCESS_KEY"):
        build_small_run("s3://bucket/denied")


def test_removal_takes_names_as_they_are(s3: LocalS3) -> None:
    for name in ("run[1]x", "run1x", "run1"):
        for i in range(3):
            files.write_bytes(f"s3://bucket/removal/{name}/deep/{i}", b"a")
    files.remove("s3://bucket/removal/run[1]x")
    files.remove("S3://bucket/removal/run1/deep/1")
    files.remove_file("s3://bucket/removal/run1/deep/2")
    files.remove("s3://bucket/removal/absent")
    files.remove_file("s3://bucket/removal/absent")
    assert files.list_names("s3://bucket/removal") == ["run1", "run1x"]
    assert files.list_names("s3://bucket/removal/run1/deep") == ["0"]
    assert files.list_names("s3://bucket/removal/run1x/deep") == ["0", "1", "2"]


def test_a_refused_removal_is_said(s3: LocalS3, monkeypatch: pytest.MonkeyPatch) -> None:
    files.write_bytes("s3://bucket/kept/a", b"a")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(
        AccessDenied, match=r"s3://bucket/kept cannot be removed: access is denied.*s3:DeleteObject"
    ):
        files.remove("s3://bucket/kept")


@pytest.fixture
def proxy(s3: LocalS3, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    with FaultProxy(s3.port) as between:
        monkeypatch.setenv("AWS_ENDPOINT_URL", between.environment({})["AWS_ENDPOINT_URL"])
        yield between


def test_without_permission_to_delete_a_run_does_not_begin(proxy: FaultProxy) -> None:
    proxy.deletes = 403
    with pytest.raises(AccessDenied, match=r"cannot be removed: access is denied.*s3:DeleteObject") as caught:
        build_small_run("s3://bucket/keep-all")
    assert classify(caught.value) == 2


@pytest.mark.parametrize("asynchronous", [False, True])
def test_failing_removals_go_on_beside_training(
    proxy: FaultProxy, asynchronous: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(retirement, "_GRACE_S", 0.1)
    url = f"s3://bucket/slow-{asynchronous}"
    run = build_small_run(url, asynchronous=asynchronous, keep_last=1)
    proxy.deletes = 503
    for _ in range(3):
        run.train(1)
        run.save()  # committed, whatever becomes of the old ones
    assert [row.step for row in list_checkpoints(url)] == [3, 2, 1]
    proxy.deletes = 0
    deadline = time.monotonic() + 60
    while len(list_checkpoints(url)) > 1 and time.monotonic() < deadline:
        time.sleep(0.1)
    assert [(row.step, row.complete) for row in list_checkpoints(url)] == [(3, True)]
    assert not any(found.problems for found in verify(url))
    run.manager.close()
    if not asynchronous:
        told = [r.getMessage() for r in caplog.records if "tried again beside training" in r.getMessage()]
        assert len(told) == 2  # of the commits of steps 2 and 3


def test_refused_removals_are_said_and_harm_nothing(
    proxy: FaultProxy, caplog: pytest.LogCaptureFixture
) -> None:
    run = build_small_run("s3://bucket/refused", keep_last=1)
    proxy.deletes = 403
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            run.train(1)
            run.save()
    assert [row.step for row in list_checkpoints("s3://bucket/refused")] == [2, 1]
    assert "stay where they are" in caplog.text
    assert "s3:DeleteObject" in caplog.text


def test_a_removal_under_way_spares_what_is_saved_again_at_the_same_step(
    proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rewound run saves step 1 anew while the old step 1 is still to be removed."""
    monkeypatch.setattr(retirement, "_GRACE_S", 0.1)
    url = "s3://bucket/rewound"
    run = build_small_run(url, keep_last=1)
    run.train(1)
    run.save()
    proxy.deletes = 503
    run.train(1)
    run.save()  # from now on step 1 is to go
    proxy.deletes = 0
    run.manager.save(1, {"unet": run.engine}, run.ema, state={}, tensors={"a": torch.ones(1)}, loss=None)
    run.manager.wait()
    run.manager.close()
    assert 1 in [row.step for row in list_checkpoints(url) if row.complete]
    assert not any(found.problems for found in verify(url))


def test_removals_in_bulk_that_are_never_answered_go_one_by_one(
    proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    made = client._s3_filesystem
    monkeypatch.setattr(client, "_s3_filesystem", lambda given, timeout_s, pid: made(given, 3.0, pid))
    proxy.silent_bulk = True
    monkeypatch.setattr(waits, "_QUIET_S", 0.5)
    monkeypatch.setattr(files, "_OBJECTS_PER_REQUEST", 3)
    for name in "abcdefg":
        files.write_bytes(f"s3://bucket/hung/{name}", b"a")
    files.remove_names("s3://bucket/hung", "abcdef", tries=1)
    assert files.list_tree("s3://bucket/hung") == ["g"]
    files.remove("s3://bucket/hung", tries=1)
    assert files.list_tree("s3://bucket/hung") == []
    assert proxy.counts["silent"] == 2, "the second three were not asked for in bulk"
    assert "storage has not answered delete_objects of s3://bucket/hung/a and 2 more for" in caplog.text


def test_a_removal_that_hangs_holds_no_commit_up(proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retirement, "_GRACE_S", 0.1)
    run = build_small_run("s3://bucket/hanging", keep_last=1)
    proxy.silent_bulk = True
    for _ in range(3):
        run.train(1)
        run.save()
    run.manager.close()
    assert proxy.counts["silent"] > 0
    assert proxy.counts["given up"] == 0, "nothing has waited for a removal to end"
    assert [row.step for row in list_checkpoints("s3://bucket/hanging") if row.complete] == [3, 2, 1]


@pytest.mark.parametrize("no_bulk", [False, True])
def test_a_folder_s_own_name_is_never_deleted(proxy: FaultProxy, no_bulk: bool) -> None:
    proxy.no_bulk = no_bulk
    for name in ("tree/a", "tree/deep/b", "tree2/a"):
        files.write_bytes(f"s3://bucket/{name}", b"a")
    assert files.list_tree("s3://bucket/tree") == ["a", "deep/b"]
    proxy.deleted.clear()
    files.remove("s3://bucket/tree")
    files.remove("s3://bucket/tree")
    files.remove("s3://bucket/tree2/a")
    asked = {name.partition("bucket/")[2] or name for name in proxy.deleted}
    assert asked == {"tree/a", "tree/deep/b", "tree2/a"}
    assert files.list_tree("s3://bucket/tree") == []
