"""The fault matrix: each fault is noticed, survived, and leaves the same weights behind."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from trainer.checkpoint.catalogue import folder_name
from trainer.exit_codes import ExitCode

# Every start of ranks imports torch and DeepSpeed, which takes long on a crowded machine.
pytestmark = pytest.mark.timeout(2400)

STEPS = 24
Unbroken = Callable[..., Any]


def assert_as_unbroken(run: Any, wanted: Any) -> None:
    assert run.fingerprint() == wanted.fingerprint
    assert run.trace() == wanted.trace


def test_a_stopped_rank_is_replaced(make_run: Any, unbroken: Unbroken) -> None:
    """SIGSTOP: the process lives, its socket answers, and a collective would wait for ten minutes."""
    wanted = unbroken()
    run = make_run().start()
    run.until_step(10, rank=1)
    stopped = run.ranks()
    step = run.pulse(1).step
    run.follow_recovery("SIGSTOP of a rank", run.signal(signal.SIGSTOP, 1), step, stopped)
    assert run.wait() == 0, run.console[-4000:]
    assert "rank 1 hangs: stopped" in run.console
    assert "Current thread" in run.console  # stacks of both: rank 0's on the console
    assert_as_unbroken(run, wanted)


def test_preemption_saves_and_the_same_command_goes_on(make_run: Any, unbroken: Unbroken) -> None:
    wanted = unbroken()
    run = make_run().start()
    run.until_step(9)
    asked = time.monotonic()
    run.process.send_signal(signal.SIGUSR1)
    assert run.wait() == ExitCode.PREEMPTED, run.console[-4000:]
    run.report("preemption signal", detect_s=time.monotonic() - asked, lost_steps=0)
    saved = run.committed()[0]
    assert saved >= 9
    assert f"preempted: step {saved} is committed, " in run.console  # how much of a notice it takes
    assert saved % 4 != 0 or saved == max(run.trace())  # at the boundary, not at the next interval
    (run.folder_of_run / "STOP").touch()
    run.start()
    assert run.wait() == ExitCode.STOPPED, run.console[-4000:]
    assert not (run.folder_of_run / "STOP").exists()
    assert run.run() == 0, run.console[-4000:]
    assert_as_unbroken(run, wanted)


@pytest.fixture
def injected(make_run: Any, tmp_path: Path) -> Callable[..., Any]:
    """A run whose ranks carry one of inject.py's faults."""

    def make(fault: str, changes: dict[str, Any], *, step: int = 10, name: str = "run") -> Any:
        environment = {"FAULT_NOTE": str(tmp_path / "note"), "FAULT_STEP": str(step)}
        run = make_run(changes, name=name, environment=environment)
        run.command[-1] = fault
        return run

    return make


def check_healing(injected: Any, make_run: Any, fault: str, changes: dict[str, Any]) -> None:
    run = injected(fault, changes).start()
    struck = run.until_step(11)
    run.until(lambda: run.events("rewind"), "the rewind")
    noticed = time.monotonic()
    lost = 11 - max(step for step in run.committed() if step < 11)
    run.until(lambda: len(run.losses_of(11)) > 1, "the step made again")
    run.report(fault, detect_s=noticed - struck, recover_s=time.monotonic() - struck, lost_steps=lost)
    assert run.wait() == 0, run.console[-4000:]
    (event,) = run.events("rewind")
    assert event["step"] == 11
    assert len(event["skipped"]) == 8
    journal = json.loads((run.folder_of_run / "healing.json").read_text())
    # The same end as a run that knew from the start what to leave out.
    knowing = make_run(changes, name="knowing")
    knowing.folder_of_run.mkdir(parents=True)
    (knowing.folder_of_run / "healing.json").write_text(json.dumps(journal))
    assert knowing.run() == 0, knowing.console[-4000:]
    assert knowing.events("rewind") == []
    assert run.fingerprint() == knowing.fingerprint()
    assert run.last_losses() == knowing.last_losses()


@pytest.mark.parametrize("ranks", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_a_nan_batch_is_rewound_and_skipped(injected: Any, make_run: Any, ranks: int) -> None:
    """Eight samples on three ranks are 3, 3 and 2 with padding, which is skipped by nobody."""
    changes = {"steps": STEPS, "healing": {"max_skips": 0}, "distributed": {"ranks": ranks}}
    check_healing(injected, make_run, "nan", changes)


def test_a_nan_batch_is_left_out_in_place_and_named(injected: Any) -> None:
    """No checkpoint is gone back to, whatever the interval: nothing is lost but the update."""
    run = injected("nan", {"steps": STEPS})
    assert run.run() == 0, run.console[-4000:]
    assert run.events("rewind") == []
    (event,) = run.events("step skipped")
    assert event["step"] == 11
    assert [culprit.split(" ")[:2] for culprit in event["culprits"]] == [["rank", "0"], ["rank", "1"]]
    assert all("/" in culprit.rpartition(": ")[2] for culprit in event["culprits"])  # keys of samples
    assert [len(run.losses_of(step)) for step in range(10, 14)] == [1, 1, 1, 1]
    assert "loss is NaN (nan) at step 11, rank 0 (" in run.console


@pytest.mark.slow
@pytest.mark.parametrize(
    "distributed",
    [
        {"engine": "deepspeed", "zero_stage": 1, "precision": "bf16"},
        {"engine": "deepspeed", "zero_stage": 3},
        {"engine": "fsdp", "zero_stage": 1, "precision": "bf16"},
    ],
    ids=["zero1-bf16", "zero3", "fsdp-bf16"],
)
def test_a_nan_batch_is_survived_under_sharded_engines(
    injected: Any, make_run: Any, distributed: dict[str, Any]
) -> None:
    changes = {"steps": STEPS, "distributed": distributed, "healing": {"max_skips": 0}}
    check_healing(injected, make_run, "nan", changes)


@pytest.mark.slow
def test_a_spike_is_rewound_and_skipped(injected: Any, make_run: Any) -> None:
    changes = {"steps": 32, "healing": {"spike_zscore": 20.0, "spike_window": 8, "spike_patience": 1}}
    check_healing(injected, make_run, "spike", changes)


@pytest.mark.slow
def test_endless_nans_end_with_a_sentence(injected: Any) -> None:
    run = injected("nan", {"healing": {"max_skips": 0, "max_rewinds": 0}})
    assert run.run() == ExitCode.FATAL
    assert "healing.max_rewinds=0" in run.console
    assert "restarting" not in run.console


@pytest.mark.slow
def test_a_clock_that_jumps_changes_nothing(injected: Any, unbroken: Unbroken) -> None:
    run = injected("clock", {})
    assert run.run() == 0, run.console[-4000:]
    assert "restarting" not in run.console
    assert_as_unbroken(run, unbroken())


def damage(checkpoint: Path, how: str) -> None:
    """Harm it in one of the ways storage and crashes do."""
    shard = sorted(checkpoint.glob("rank_00001*.safetensors"))[0]
    content = bytearray(shard.read_bytes())
    if how == "truncated":
        shard.write_bytes(content[: len(content) // 2])
    elif how == "bit flipped":
        content[len(content) * 3 // 4] ^= 0x10
        shard.write_bytes(content)
    elif how == "file missing":
        shard.unlink()
    else:
        (checkpoint / "manifest.json").unlink()


@pytest.mark.slow
@pytest.mark.parametrize("how", ["truncated", "bit flipped", "file missing", "no manifest"])
def test_a_damaged_checkpoint_is_passed_over(make_run: Any, unbroken: Unbroken, how: str) -> None:
    wanted = unbroken()
    run = make_run().start()
    run.until_step(14)
    run.kill()
    newest, previous = run.committed()[:2]  # a newer one may have begun
    damage(run.folder_of_run / "checkpoints" / folder_name(newest), how)
    assert run.run() == 0, run.console[-4000:]
    assert run.events("resume")[-1]["step"] == previous
    assert f"step_{newest:09d} is not used" in run.console
    assert_as_unbroken(run, wanted)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 32 megabytes of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=32m", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True, check=False).returncode != 0:
        pytest.skip("needs the right to mount a tmpfs")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.slow
def test_a_full_disk_stops_with_a_sentence_and_loses_nothing(
    make_run: Any, unbroken: Unbroken, small_disk: Path
) -> None:
    wanted = unbroken()
    run = make_run({"run_dir": str(small_disk / "out")}).start()
    run.until(lambda: len(run.committed()) >= 1, "a first checkpoint", hold=6)
    ballast = small_disk / "ballast"
    with ballast.open("wb", buffering=0) as stream, contextlib.suppress(OSError):
        while stream.write(b"x" * 4096):
            pass
    assert run.wait() == ExitCode.USER_ERROR, run.console[-4000:]
    assert "No space left" in run.console or "full" in run.console
    assert "restarting" not in run.console
    ballast.unlink()
    assert run.run() == 0, run.console[-4000:]
    assert_as_unbroken(run, wanted)


@pytest.mark.slow
def test_storage_that_turns_read_only_stops_with_a_sentence(
    make_run: Any, unbroken: Unbroken, small_disk: Path
) -> None:
    wanted = unbroken()
    run = make_run({"run_dir": str(small_disk / "out")}).start()
    run.until(lambda: len(run.committed()) >= 1, "a first checkpoint", hold=6)
    # A second mount over the first: it can turn read-only although the run has files open below it.
    out = str(run.folder_of_run)
    subprocess.run(["mount", "--bind", out, out], check=True)
    subprocess.run(["mount", "-o", "remount,bind,ro", out], check=True)
    assert run.wait() == ExitCode.USER_ERROR, run.console[-4000:]
    assert "Read-only file system" in run.console
    assert "restarting" not in run.console
    subprocess.run(["umount", "-l", out], check=True)
    assert run.run() == 0, run.console[-4000:]
    assert_as_unbroken(run, wanted)


@pytest.mark.slow
def test_a_rank_that_slows_down_is_not_killed(make_run: Any, unbroken: Unbroken) -> None:
    """Stopped for a second, running for a second: slow, and alive."""
    wanted = unbroken()
    run = make_run().start()
    run.until_step(6, rank=1)
    victim = run.ranks()[1]
    run.hold(None)
    for _ in range(4):
        os.kill(victim, signal.SIGSTOP)
        time.sleep(1.0)
        os.kill(victim, signal.SIGCONT)
        time.sleep(1.0)
    assert run.wait() == 0, run.console[-4000:]
    assert "restarting" not in run.console
    assert_as_unbroken(run, wanted)
