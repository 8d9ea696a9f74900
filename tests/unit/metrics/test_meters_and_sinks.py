"""Meters, throughput, grids and the JSONL writer."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from PIL import Image

from data_pipeline.storage.files import write_bytes
from trainer.config.run import Config, ConfigError
from trainer.config.training import LoggingConfig
from trainer.metrics import jsonl
from trainer.metrics import sinks as sinks_module
from trainer.metrics.alerts import Trends
from trainer.metrics.jsonl import JSONLWriter
from trainer.metrics.meters import Meters
from trainer.metrics.pictures import grid
from trainer.metrics.sinks import Sinks
from trainer.metrics.timer import StepTimer, Throughput
from trainer.metrics.wandb_sink import WandbSink

BLOCK = 32768


def test_meters_average_and_reset() -> None:
    meters = Meters()
    for value in (1.0, 2.0, 6.0):
        meters.add({"loss": torch.tensor(value)})
    assert meters.reduce() == {"loss": 3.0}
    assert meters.reduce() == {}


def test_throughput_counts_images_of_the_interval_only() -> None:
    throughput, timer = Throughput(global_batch_size=10), StepTimer(torch.device("cpu"))
    assert "images_per_s" not in throughput.read(0, timer)
    with timer("data"):
        sum(range(100_000))
    record = throughput.read(4, timer)
    assert record["images_per_s"] == pytest.approx(10 / record["step_s"])
    assert 0 < record["data_wait"] <= 1
    assert record["time/data_s"] * 4 == pytest.approx(record["data_wait"] * record["step_s"] * 4)


def test_jsonl_appends_over_restarts(tmp_path: Path) -> None:
    for step in (1, 2):
        writer = JSONLWriter(str(tmp_path))
        writer.write({"step": step})
    lines = (tmp_path / "logs" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2]


def test_jsonl_of_a_full_disk_waits_for_room(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It is the checkpoints, written by all ranks, that say whether a run can go on."""
    file, kept = tmp_path / "logs" / "metrics.jsonl", tmp_path / "kept"
    writer = JSONLWriter(str(tmp_path))
    writer.write({"step": 1})
    file.rename(kept)
    file.symlink_to("/dev/full")
    writer.write({"step": 2})
    writer.write({"step": 3})
    assert [message for message in caplog.messages if "not stored yet" in message] == caplog.messages
    assert len(caplog.messages) == 1
    file.unlink()
    file.write_text(kept.read_text() + '{"st')  # what there was still room for
    writer.write({"step": 4})
    writer.close()
    assert [json.loads(line)["step"] for line in file.read_text().splitlines()] == [1, 2, 3, 4]


def test_remote_jsonl_is_sent_every_minute_and_in_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    run = "memory://jsonl-test/run"
    logs = f"{run}/logs"
    filesystem = fsspec.filesystem("memory")
    monkeypatch.setattr(jsonl, "SEGMENT_BYTES", 40)

    def stored() -> dict[str, list[int]]:
        names = filesystem.glob(f"{logs}/*.jsonl") if filesystem.exists(logs) else []
        texts = {name.rpartition("/")[2]: filesystem.cat_file(name).decode() for name in names}
        return {
            name: [json.loads(line)["step"] for line in text.splitlines()] for name, text in texts.items()
        }

    writer = JSONLWriter(run)
    writer.write({"step": 1})
    assert stored() == {}
    monkeypatch.setattr(jsonl, "SEND_EVERY_S", -1.0)
    with monkeypatch.context() as away:
        away.setattr(type(filesystem), "pipe_file", _fails)
        writer.write({"step": 2})  # nothing is raised, nothing is lost
        assert writer._sending is not None
        assert writer._sending.result() == 0
    assert stored() == {}
    writer.write({"step": 3})
    writer._sending.result()
    begun = writer._begun
    assert stored() == {f"metrics-{begun}-00000001.jsonl": [1, 2, 3]}
    writer.write({"step": 4})  # over 40 bytes: the next record begins an object of its own
    writer._sending.result()
    monkeypatch.setattr(jsonl, "SEND_EVERY_S", 60.0)
    writer.write({"step": 5})
    writer.close()
    first = {f"metrics-{begun}-00000001.jsonl": [1, 2, 3, 4], f"metrics-{begun}-00000005.jsonl": [5]}
    assert stored() == first
    time.sleep(0.002)
    again = JSONLWriter(run)  # a start from the same step keeps what the one before it recorded
    again.write({"step": 5})
    again.close()
    assert stored() == {**first, f"metrics-{again._begun}-00000005.jsonl": [5]}
    filesystem.rm("memory://jsonl-test", recursive=True)


def _fails(*arguments: object, **options: object) -> None:
    raise OSError("storage is away")


def test_grid_holds_every_picture() -> None:
    pixels = torch.zeros(5, 3, 8, 8, dtype=torch.uint8)
    pixels[4, 0] = 255
    sheet = grid(pixels, ("a caption",) * 5, columns=2)
    assert sheet.width == 2 * (128 + 4) + 4
    colours = sheet.convert("RGB").getcolors(maxcolors=1_000_000)
    assert any(colour == (255, 0, 0) for _, colour in colours or [])


def test_a_picture_keeps_nobody_from_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    released = threading.Event()

    def slow(url: str, data: bytes) -> None:
        assert released.wait(60)
        write_bytes(url, data)

    config = Config(run_dir=str(tmp_path), logging=LoggingConfig(wandb="disabled", progress_bar=False))
    sinks = Sinks(config, main_rank=True, resolved={})
    sinks.open(start_step=0, samples_seen=0, run_id=None)
    (tmp_path / "samples").mkdir()
    (tmp_path / "samples" / "preview-00000001.png").mkdir()  # in the way of the first
    monkeypatch.setattr(sinks_module, "write_bytes", slow)
    for step in (1, 2):
        sinks.picture(step, 8 * step, "preview", Image.new("RGB", (4, 4), "red"))
    assert not (tmp_path / "samples" / "preview-00000002.png").exists()
    released.set()
    sinks.close()
    assert Image.open(tmp_path / "samples" / "preview-00000002.png").size == (4, 4)
    assert "a picture is not stored" in caplog.text


@pytest.mark.parametrize("key", [None, "too-short"])
def test_online_without_a_usable_key_is_refused(
    key: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    if key:
        monkeypatch.setenv("WANDB_API_KEY", key)
    with pytest.raises(ConfigError, match="WANDB_API_KEY"):
        WandbSink(LoggingConfig(wandb="online"), str(tmp_path), {}, None)


def wandb_records(path: Path) -> Iterator[Any]:
    """The records of a file that `wandb sync` would send, those of its first block."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, position = path.read_bytes()[:BLOCK], 7
    while position + 7 < len(data):  # each record: checksum, length, kind, content
        length = int.from_bytes(data[position + 4 : position + 6], "little")
        if position + 7 + length > len(data):
            return
        yield Record.FromString(data[position + 7 : position + 7 + length])
        position += 7 + length


def offline_runs(folder: Path) -> list[tuple[str, str]]:
    """(id, group) in the files that `wandb sync` would send, in the order in which the runs began."""
    paths = sorted(folder.glob("wandb/offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime)
    found = [next((r.run for r in wandb_records(path) if r.HasField("run")), None) for path in paths]
    return [(run.run_id, run.run_group) for run in found if run is not None]


def test_who_watches_the_project_is_told_of_faults_and_trends(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = Config(run_dir=str(tmp_path), logging=LoggingConfig(wandb="offline", progress_bar=False))
    sinks = Sinks(config, main_rank=True, resolved={})
    sinks.open(start_step=0, samples_seen=0, run_id=None)
    sinks.event(1, 8, "resume changed", changed=["x"])  # nobody is woken for it
    sinks.event(2, 16, "rewind", kind="nan", value=float("nan"))
    sinks.event(3, 24, "sick gpu", rank=1, host="n3", what="XID 79")
    for step in range(10, 30):
        rate, wait = (100.0, 0.01) if step < 20 else (60.0, 0.35)
        sinks.log(step, 8 * step, {"images_per_s": rate, "data_wait": wait})
    sinks.close()
    records = [json.loads(line) for path in tmp_path.glob("logs/*") for line in path.read_text().splitlines()]
    events = [(record["step"], record["event"]) for record in records if "event" in record]
    assert events[:3] == [(1, "resume changed"), (2, "rewind"), (3, "sick gpu")]
    assert events[3:] == [(22, "slower"), (22, "waiting for data")]
    assert "step 22: slower (recent 60, usual 100)" in caplog.text
    (path,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    deadline = time.monotonic() + 60  # wandb's own process writes the file
    while not any(r.HasField("exit") for r in wandb_records(path)) and time.monotonic() < deadline:
        time.sleep(0.1)
    alerts = [(r.alert.title, r.alert.level) for r in wandb_records(path) if r.HasField("alert")]
    assert alerts[:2] == [("rewind", "ERROR"), ("sick gpu", "WARN")]
    assert alerts[2:] == [("slower", "WARN"), ("waiting for data", "WARN")]


def test_a_trend_is_told_once_until_it_is_well_again() -> None:
    trends = Trends()

    def told(rates: list[float], wait: float = 0.0) -> list[str]:
        return [name for r in rates for name in trends.observe({"images_per_s": r, "data_wait": wait})]

    assert told([100.0] * 20) == []
    assert told([20.0, 100.0, 100.0, 20.0, 100.0]) == []  # a checkpoint, a preview
    assert told([70.0] * 8) == ["slower"]
    assert told([85.0] * 8) == []  # still below 0.9 of the usual
    assert told([100.0] * 8) == []
    assert told([70.0] * 4) == ["slower"]
    assert told([100.0] * 8, wait=0.15) == []
    assert told([100.0] * 8, wait=0.25) == ["waiting for data"]
    assert trends.observe({"loss": 1.0}) == {}, "records of validation have no rate"


@pytest.mark.parametrize("given", [None, "job1"])
def test_offline_each_start_is_a_run_of_its_own_in_one_group(
    given: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under one id the second would say that it starts at step 0, and syncing it may erase the first."""
    monkeypatch.delenv("WANDB_RUN_ID", raising=False)
    if given:  # as slurm/train_ldm.sh does, for a start before the first checkpoint
        monkeypatch.setenv("WANDB_RUN_ID", given)
    group = None
    for _ in range(3):
        sink = WandbSink(LoggingConfig(wandb="offline"), str(tmp_path), {"a": 1}, group)
        assert group in (None, sink.run_id)
        group = None if given else sink.run_id
        sink.log(64, {"loss": 1.0})
        sink.log(32, {"loss": 2.0})  # a rewind: fewer samples than before must not be refused
        sink.close()
    deadline = time.monotonic() + 60
    while len(runs := offline_runs(tmp_path)) < 3 and time.monotonic() < deadline:
        time.sleep(0.1)  # wandb's own process writes the files
    assert len({run_id for run_id, _ in runs}) == len(runs) == 3
    assert {name for _, name in runs} == {sink.run_id} == {given or sink.run_id}
    assert sink.run_id not in {run_id for run_id, _ in runs}  # it is the online run's, if there is one


def test_passwords_and_signatures_of_urls_stay_here(tmp_path: Path) -> None:
    shards = ["https://me:pass@host/{0..9}.tar?part=3&X-Amz-Signature=1f2e", "s3://bucket/1.tar"]
    resolved = {"data": {"shards": shards}, "steps": 7}
    WandbSink(LoggingConfig(wandb="offline"), str(tmp_path), resolved, None).close()
    deadline = time.monotonic() + 60
    while not offline_runs(tmp_path) and time.monotonic() < deadline:
        time.sleep(0.1)  # wandb's own process writes the files
    (path,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    sent = next(r.run.config for r in wandb_records(path) if r.HasField("run")).update
    values = {update.key: json.loads(update.value_json) for update in sent}
    hidden = ["https://***@host/{0..9}.tar?part=3&X-Amz-Signature=***", "s3://bucket/1.tar"]
    assert (values["data"], values["steps"]) == ({"shards": hidden}, 7)


@pytest.mark.parametrize("torn", ["", '{"step": 3, "lo', "x" * 200_000])
def test_a_torn_last_line_does_not_spoil_the_next_record(tmp_path: Path, torn: str) -> None:
    """A full disk or SIGKILL in a write; the run then goes on in the same file."""
    path = tmp_path / "logs" / "metrics.jsonl"
    path.parent.mkdir()
    path.write_text('{"step": 1}\n{"step": 2}\n' + torn)
    JSONLWriter(str(tmp_path)).write({"step": 3})
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3]
