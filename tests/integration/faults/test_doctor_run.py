"""The doctor on real ranks: alone, and in front of a training run."""

from __future__ import annotations

from typing import Any

import pytest

from trainer.config.io import load_config
from trainer.exit_codes import ExitCode
from trainer.launch.local import launch

# Every start of ranks imports torch and DeepSpeed, which takes long on a crowded machine.
pytestmark = pytest.mark.timeout(2400)


@pytest.mark.slow
def test_the_doctor_passes_and_training_follows(make_run: Any) -> None:
    run = make_run({"steps": 4, "distributed": {"engine": "deepspeed", "zero_stage": 2, "doctor": True}})
    assert run.run() == 0, run.console[-4000:]
    assert "11 of 11 checks passed" in run.console
    assert sorted(run.trace()) == [1, 2, 3, 4]


@pytest.mark.slow
def test_a_failing_doctor_stops_the_run_before_it_starts(
    make_run: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    run = make_run({"data": {"shards": "/nowhere/*.tar"}})
    config = load_config(str(run.config_path))
    assert launch(config, "doctor") == ExitCode.USER_ERROR
    shown = capfd.readouterr().err
    assert "shards" in shown
    assert "FAIL" in shown
    assert "9 of 11 checks passed" in shown
    assert not (run.folder_of_run / "checkpoints").exists()
