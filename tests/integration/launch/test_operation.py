"""A job that runs is looked at, profiled and stopped by the commands, and goes on afterwards."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from data_pipeline.tools.scenes.scene import SceneOptions
from data_pipeline.tools.scenes.write_shards import SynthesisOptions, synthesize
from tests.integration.ranks import ROOT
from tests.unit.test_resume_changed import TINY, records
from trainer.__main__ import main
from trainer.config.io import dump_yaml, load_config
from trainer.exit_codes import ExitCode
from trainer.operation.standing import standing


@pytest.fixture
def config(tmp_path: Path) -> Path:
    scene = SceneOptions(min_edge=16, max_edge=24)
    list(synthesize(str(tmp_path / "shards"), SynthesisOptions(samples=8, failed_share=0.0, scene=scene)))
    where = (f"run_dir={tmp_path}/run", f"data.shards={tmp_path}/shards/*.tar", "distributed.ranks=1")
    path = tmp_path / "config.yaml"
    path.write_text(dump_yaml(load_config(None, [*TINY, *where, "steps=1000000"])))
    return path


@pytest.fixture
def job(config: Path, tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    with (tmp_path / "console.log").open("wb") as log:
        command = [sys.executable, "-m", "trainer", "train", str(config)]
        process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)
        try:
            yield process
        finally:
            process.kill()
            process.wait()


def waits(job: subprocess.Popen[bytes], limit: float) -> bool:
    return job.poll() is None and time.monotonic() < limit


def test_a_running_job_is_looked_at_profiled_and_stopped(
    job: subprocess.Popen[bytes], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "run"
    limit = time.monotonic() + 300
    # The second record of losses has rates, which say how many ranks there are.
    while not (run_dir / "config.yaml").exists() or standing(str(run_dir)).ranks is None:
        assert waits(job, limit), (tmp_path / "console.log").read_text()
        time.sleep(0.2)
    assert main(["status", str(run_dir), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["ranks"] == 1

    assert main(["profile", str(run_dir), "--ranks", "1"]) == ExitCode.USER_ERROR
    assert "no" in capsys.readouterr().err
    assert main(["profile", str(run_dir), "--steps", "2", "--wait", "200"]) == 0
    (table,) = (run_dir / "profiles").glob("*/*.txt")
    assert str(table) in capsys.readouterr().out
    assert table.with_name("rank_00000.trace.json.gz").exists()

    assert main(["stop", str(run_dir), "--wait", "200"]) == 0
    told = capsys.readouterr().out
    assert "ends with code 77" in told
    assert "a person stopped it" in told
    assert job.wait(timeout=120) == ExitCode.STOPPED
    assert not (run_dir / "STOP").exists()
    last = records(run_dir)[-1]
    assert last["event"] == "stopped"
    assert standing(str(run_dir)).checkpoint_step == last["step"]

    # Ended: nothing to stop, and nothing to profile.
    assert main(["stop", str(run_dir)]) == 0
    assert "nothing to stop" in capsys.readouterr().out
    assert not (run_dir / "STOP").exists()
    assert main(["profile", str(run_dir)]) == ExitCode.USER_ERROR
    assert "nothing to profile" in capsys.readouterr().err


def test_a_request_to_a_run_that_is_gone_waits_for_its_next_start_or_is_taken_back(
    job: subprocess.Popen[bytes], config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "run"
    limit = time.monotonic() + 300
    while not (run_dir / "logs/metrics.jsonl").exists() or not records(run_dir):
        assert waits(job, limit), (tmp_path / "console.log").read_text()
        time.sleep(0.2)
    job.kill()
    job.wait()
    while standing(str(run_dir)).state != "gone":  # its rank ends with it
        assert time.monotonic() < limit
        time.sleep(0.1)
    assert main(["stop", str(run_dir), "--wait", "1"]) == 0
    assert "--cancel" in capsys.readouterr().out
    assert main(["stop", str(run_dir), "--cancel"]) == 0
    assert not (run_dir / "STOP").exists()
    assert main(["stop", str(run_dir)]) == 0
    again = subprocess.run([sys.executable, "-m", "trainer", "train", str(config)], cwd=ROOT, timeout=300)
    assert again.returncode == ExitCode.STOPPED
