"""`ldm status`: each figure of a run folder, on a disk and elsewhere, and what is said of a quiet run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest

from data_pipeline.storage.files import write_bytes
from data_pipeline.storage.local_s3 import LocalS3
from tests.unit.one_rank import Train
from trainer.__main__ import main
from trainer.exit_codes import ExitCode
from trainer.operation.standing import duration, standing
from trainer.reliability.job import process_identity
from trainer.reliability.lease import acquire

CONFIG = "steps: 1000\nlogging: {every: 10}\nsome_setting_of_another_version: 1\n"


def logged(step: int, ago_s: float, **more: Any) -> dict[str, Any]:
    return {
        "step": step,
        "samples_seen": step * 64,
        "time": time.time() - ago_s,
        "loss": 0.5,
        "step_s": 2.0,
        "images_per_s": 32.0,
        "images_per_s_per_rank": 8.0,
        "slow_ranks": 1.0,
        **more,
    }


def event(step: int, name: str, ago_s: float, **details: Any) -> dict[str, Any]:
    return {"step": step, "samples_seen": 0, "event": name, "time": time.time() - ago_s, **details}


def write_run(run_dir: str, records: list[dict[str, Any]], lease: dict[str, Any] | None = None) -> None:
    """A folder as a run leaves it."""
    write_bytes(f"{run_dir}/config.yaml", CONFIG.encode())
    lines = "".join(json.dumps(record) + "\n" for record in records)
    name = "metrics-00000010.jsonl" if "://" in run_dir else "metrics.jsonl"
    write_bytes(f"{run_dir}/logs/{name}", b'{"step": 1, "lo\n' + lines.encode() + b'{"st')
    for step in (600, 700):
        write_bytes(f"{run_dir}/checkpoints/step_{step:09d}/manifest.json", b"{}")
    write_bytes(f"{run_dir}/checkpoints/step_000000800/shard", b"")
    if lease is not None:
        held = {"token": 3, "job": "j", "process": "elsewhere/1/1", "described": "SLURM job 17", "nonce": "n"}
        write_bytes(f"{run_dir}/lease.json", json.dumps({**held, **lease}).encode())


def age_lease(run_dir: Path, seconds: float) -> None:
    then = time.time() - seconds
    os.utime(run_dir / "lease.json", (then, then))


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalS3]:
    with LocalS3(tmp_path_factory.mktemp("s3"), buckets=("bucket",)) as running:
        yield running


@pytest.fixture(params=["disk", "memory", "s3"])
def run_dir(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "disk":
        return str(tmp_path / "run")
    if request.param == "memory":
        return f"memory://{tmp_path.name}/run"
    for name, value in request.getfixturevalue("server").env.items():
        monkeypatch.setenv(name, value)
    return f"s3://bucket/{tmp_path.name}/run"


def history() -> list[dict[str, Any]]:
    """Records of three starts."""
    return [
        logged(10, 900),
        logged(20, 850),
        event(15, "resume", 800, world_size=4),  # after a fault: five steps are made again
        event(15, "slow rank", 790, rank=3, host="old"),
        logged(20, 780),
        event(22, "stopped", 770),
        event(20, "resume", 600, world_size=4),
        logged(30, 500, step_s=9.0),
        event(31, "save failed", 490),
        event(30, "resume", 300, world_size=4),  # nothing was lost
        event(30, "slow rank", 60, rank=2, host="gpu7", own_s=1.0, step_s=2.0),
        event(30, "sick gpu", 60, rank=1, host="gpu6", what="XID 79 (fell off the bus)"),
        logged(690, 40, step_s=1.0),
        logged(700, 20, step_s=3.0, images_per_s=30.0, loss="nan"),
    ]


# Of before incidents said what was done, and of today.
INCIDENTS = [{"step": 3}, {"step": 5, "action": "rewound"}, {"step": 9, "action": "skipped"}]


def test_every_figure(run_dir: str) -> None:
    began = time.time()
    write_run(run_dir, history(), {})
    write_bytes(f"{run_dir}/healing.json", json.dumps(INCIDENTS).encode())
    write_bytes(f"{run_dir}/STOP", b"")
    found = standing(run_dir)
    took = time.time() - began + 1.0
    assert (found.state, found.step, found.steps, found.samples_seen) == ("running", 700, 1000, 44_800)
    assert found.loss == "nan"
    assert (found.step_s, found.images_per_s) == (2.0, 31.0)  # of this start alone
    assert found.eta_s == 600.0
    assert found.record_age_s is not None
    assert 19 < found.record_age_s < 20 + took
    assert found.checkpoint_step == 700
    assert found.checkpoint_age_s is not None
    assert found.checkpoint_age_s < took
    assert (found.starts, found.bad_steps, found.rewinds) == (3, 3, 2)
    assert (found.faults, found.failed_saves) == (1, 1)
    assert (found.steps_again, found.events_since) == (5, 10)
    assert (found.ranks, found.slow_ranks, found.found_slow) == (4, 1, ("rank 2 (gpu7)",))
    assert found.found_sick == ("rank 1 (gpu6): XID 79 (fell off the bus)",)
    assert found.holder == "SLURM job 17"
    assert found.holder_age_s is not None
    assert found.holder_age_s < took
    assert found.stop_requested


def test_the_screen_and_the_object_say_the_same(run_dir: str, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(run_dir, history(), {})
    assert main(["status", run_dir]) == 0
    shown = capsys.readouterr().out
    for text in (
        "700 of 1,000 (70.0 %)",
        "10 min at this speed",
        "checkpoint  step 700, ",
        "SLURM job 17, heard",
    ):
        assert text in shown
    assert len(shown.splitlines()) <= 12
    assert main(["status", run_dir, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["eta_s"] == 600.0


def test_a_held_folder_without_a_word_is_silent(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_dir = tmp_path / "run"
    write_run(str(run_dir), history(), {})
    age_lease(run_dir, 7300)
    found = standing(str(run_dir))
    assert (found.state, found.eta_s) == ("silent", 600.0)
    assert "nothing was heard of it for 2 h 2 min" in found.said
    assert main(["status", str(run_dir)]) == 1
    assert "silent" in capsys.readouterr().out


def test_rank_0_that_lives_and_logs_nothing_is_silent_after_some_intervals(run_dir: str) -> None:
    # 10 steps of 2 s between records: 60 s for three of them, and two minutes more (four elsewhere).
    limit = 180 if "://" not in run_dir else 300
    write_run(run_dir, [logged(10, limit - 20)], {})
    assert standing(run_dir).state == "running"
    write_run(run_dir, [logged(10, limit + 20)], {})
    assert standing(run_dir).state == "silent"
    # A start may take longer than that.
    write_run(run_dir, [logged(10, 5000), event(10, "resume", limit + 20)], {})
    assert standing(run_dir).state == "starting"
    # The first that a start says, where it has no checkpoint to go on from the only thing.
    write_run(run_dir, [logged(10, 5000), event(0, "settings changed", limit + 20, changed=[])], {})
    assert standing(run_dir).state == "starting"
    # So may a phase, which begins without a restart.
    write_run(run_dir, [logged(10, 5000), event(10, "phase", limit + 20, phase=1)], {})
    assert standing(run_dir).state == "starting"


def test_a_phase_has_a_speed_of_its_own(tmp_path: Path) -> None:
    """It is none before the phase's first interval is over: what came before says nothing about it."""
    run_dir = f"memory://{tmp_path.name}/phase"
    first = {
        name: value for name, value in logged(30, 1000).items() if name not in ("step_s", "images_per_s")
    }
    told = [logged(10, 3000), logged(20, 2000), event(20, "phase", 1900, phase=1), first]
    write_run(run_dir, told, {})
    found = standing(run_dir)
    assert (found.state, found.step, found.step_s, found.eta_s) == ("running", 30, None, None)
    write_run(run_dir, [*told, logged(40, 10, step_s=8.0, images_per_s=8.0)], {})
    found = standing(run_dir)
    assert (found.step_s, found.images_per_s, found.eta_s) == (8.0, 8.0, 960 * 8.0)
    # After a restart within it, until that has one: the phase's.
    write_run(run_dir, [*told, logged(40, 10, step_s=8.0), event(40, "resume", 5, world_size=4)], {})
    assert standing(run_dir).step_s == 8.0
    write_run(run_dir, [*told, event(30, "resume", 5, world_size=4)], {})
    assert standing(run_dir).step_s is None


@pytest.mark.parametrize("every", [10, 50])
def test_steps_that_a_rewind_repeats_are_counted_whatever_is_logged(tmp_path: Path, every: int) -> None:
    run_dir = f"memory://{tmp_path.name}/rewound-{every}"
    before = [logged(step, 300 - step) for step in range(every, 139, every)]
    after = [logged(step, 0) for step in range(100 + every, 201, every)]
    rewind = event(138, "rewind", 160, kind="nan", value="nan", reached=139, back_to=100)
    write_run(run_dir, [*before, rewind, *after], {})
    assert (standing(run_dir).steps_again, standing(run_dir).faults) == (39, 0)
    # A restart later on: from the last step that was logged.
    write_run(run_dir, [*before, rewind, *after, event(190, "resume", 0, world_size=4)], {})
    assert (standing(run_dir).steps_again, standing(run_dir).faults) == (39 + 10, 1)
    # As earlier versions told it.
    older = event(138, "rewind", 160, kind="nan", value="nan")
    write_run(run_dir, [*before, older, *after], {})
    assert standing(run_dir).steps_again == {10: 20, 50: 0}[every]


def test_a_process_of_this_machine_that_is_gone_is_said_to_be(tmp_path: Path) -> None:
    run_dir = str(tmp_path / "run")
    ended = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    identity = process_identity(ended.pid)
    write_run(run_dir, history(), {"process": identity})
    assert standing(run_dir).state == "running"
    ended.communicate(b"\n")
    assert standing(run_dir).state == "gone"


@pytest.mark.parametrize(
    ("last", "checkpoint", "state"),
    [
        (event(700, "stopped", 5), 700, "stopped"),
        (event(700, "preempted", 5), 700, "left"),
        (event(700, "storage outage", 5), 700, "left"),
        (logged(1000, 5), 1000, "done"),
        (logged(700, 5), 700, "left"),
    ],
)
def test_how_a_run_ended(run_dir: str, last: dict[str, Any], checkpoint: int, state: str) -> None:
    write_run(run_dir, [*history(), {**last, "time": time.time() - 5}], {"released": True})
    write_bytes(f"{run_dir}/checkpoints/step_{checkpoint:09d}/manifest.json", b"{}")
    found = standing(run_dir)
    assert (found.state, found.eta_s) == (state, None)
    assert found.said.startswith("ended ")


def test_records_of_a_run_that_went_back_are_read_in_the_order_of_time(tmp_path: Path) -> None:
    """Remote objects bear the step of their first record: the newer one may bear the lower."""
    run_dir = f"memory://{tmp_path.name}/back"
    write_run(run_dir, [logged(900, 20)], {})
    older = json.dumps(logged(920, 300)).encode()
    write_bytes(f"{run_dir}/logs/metrics-00000920.jsonl", older + b"\n")
    assert standing(run_dir).step == 900


def test_details_of_an_event_are_no_rates(tmp_path: Path) -> None:
    run_dir = f"memory://{tmp_path.name}/slow"
    slow = event(20, "slow rank", 5, rank=1, host="b", own_s=9.0, step_s=9.0, images_per_s=1.0)
    write_run(run_dir, [logged(10, 20), logged(20, 10), slow], {})
    found = standing(run_dir)
    assert (found.step_s, found.images_per_s) == (2.0, 32.0)


def test_a_real_run(train: Train, tmp_path: Path) -> None:
    assert train("steps=3") == ExitCode.DONE
    found = standing(str(tmp_path / "run"))
    assert (found.state, found.step, found.steps, found.checkpoint_step) == ("done", 3, 3, 3)
    assert (found.starts, found.faults, found.ranks) == (1, 0, 1)
    lease = acquire(str(tmp_path / "run"))
    assert standing(str(tmp_path / "run")).state == "running"
    lease.release()


def test_no_run_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(CONFIG)
    for place in (str(tmp_path / "nothing"), str(file), f"memory://{tmp_path.name}/nothing", str(tmp_path)):
        if place == str(tmp_path):
            file.unlink()
        for verb in ("status", "stop", "profile"):
            assert main([verb, place]) == ExitCode.USER_ERROR
            told = capsys.readouterr().err
            assert "there is no run in" in told
            assert len(told.strip().splitlines()) == 1
    assert not fsspec.filesystem("memory").exists(f"/{tmp_path.name}/nothing")


def test_durations() -> None:
    words = [duration(seconds) for seconds in (0.2, 119, 121, 7325, 49 * 3600)]
    assert words == ["0 s", "119 s", "2 min", "2 h 2 min", "2 d 1 h"]
