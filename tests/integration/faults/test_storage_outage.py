"""Object storage goes away in the middle of a run and comes back: nothing is lost, nothing restarts."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.storage.local_s3 import LocalS3
from trainer.exit_codes import ExitCode

# Every start of ranks imports torch and DeepSpeed, which takes long on a crowded machine.
pytestmark = pytest.mark.timeout(2400)

SETTINGS: dict[str, Any] = {"steps": 120, "data": {"prefetch": 1, "read_ahead_bytes": 4096}}


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [20, 60])
def test_an_outage_within_patience_is_waited_out(
    on_s3: Any, unbroken: Callable[..., Any], s3: LocalS3, seconds: int
) -> None:
    wanted = unbroken(SETTINGS)
    run = on_s3(SETTINGS).start()
    run.until_step(10)
    s3.stop()
    run.hold(None)
    gone = time.monotonic()
    while time.monotonic() < gone + seconds:
        assert run.process.poll() is None, run.console[-4000:]
        time.sleep(0.5)
    s3.start()
    back = time.monotonic()
    made = run.pulse(0).step
    run.until_step(made + 1)
    run.report(f"S3 outage of {seconds} s", recover_s=time.monotonic() - back, lost_steps=0)
    assert run.wait() == 0, run.console[-4000:]
    assert "restarting" not in run.console
    assert run.last_losses() == wanted.trace
    assert run.fingerprint() == wanted.fingerprint


@pytest.mark.slow
def test_an_outage_beyond_patience_saves_and_asks_for_a_restart(
    on_s3: Any, unbroken: Callable[..., Any], s3: LocalS3, tmp_path: Path
) -> None:
    wanted = unbroken(SETTINGS)
    changes = {
        **SETTINGS,
        "run_dir": str(tmp_path / "local"),
        "data": {**SETTINGS["data"], "patience_s": 3.0},
        "distributed": {"max_restarts": 0},
    }
    run = on_s3(changes)
    run.folder_of_run = tmp_path / "local"
    run.run_dir = str(run.folder_of_run)
    run.start()
    run.until_step(10)
    s3.stop()
    assert run.wait() == ExitCode.RETRYABLE, run.console[-4000:]
    saved = run.committed()[0]
    assert saved >= 10
    s3.start()
    assert run.run() == 0, run.console[-4000:]
    assert run.events("resume")[-1]["step"] == saved
    assert run.fingerprint() == wanted.fingerprint
    assert run.trace() == wanted.trace
