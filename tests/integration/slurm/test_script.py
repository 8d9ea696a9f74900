"""slurm/train_ldm.sh on a real SLURM cluster: refusals, node checks and exclusion."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.slurm, pytest.mark.slow]

REPOSITORY = Path(__file__).parents[3]
SCRIPT = REPOSITORY / "slurm" / "train_ldm.sh"
HERE = ["--gpus-per-node=0", "--ntasks-per-node=1", "--cpus-per-task=1", "--oversubscribe"]


def test_a_bad_configuration_fails_once_and_is_not_requeued(slurm: Any, tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text("stepz: 3\n", encoding="utf-8")
    job = slurm.run("sbatch", "--parsable", "--nodes=2", *HERE, str(SCRIPT), "bad.yaml", cwd=tmp_path)
    assert slurm.wait_state(job, "FAILED", "COMPLETED") == "FAILED"
    assert slurm.field(job, "ExitCode") == "2:0"
    assert slurm.field(job, "Restarts") == "0"
    log = (tmp_path / f"ldm-{job}.log").read_text(encoding="utf-8")
    assert "bad.yaml:1: unknown key `stepz`; did you mean `steps`?" in log
    assert not (tmp_path / "runs" / "slurm" / job / "submission.json").exists()


def test_started_without_slurm_it_says_how_to_use_it(slurm: Any, tmp_path: Path) -> None:
    import subprocess

    done = subprocess.run([str(SCRIPT)], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 2
    assert "usage: sbatch" in done.stderr
