"""slurm/train_ldm.sh up to its first look at the nodes, with a scontrol that knows this job alone."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

SCRIPT = Path(__file__).parents[3] / "slurm" / "train_ldm.sh"


def begin(tmp_path: Path, restarts: str) -> subprocess.CompletedProcess[str]:
    """Job 7 submitted in this folder, started again so often."""
    scontrol = tmp_path / "scontrol"
    scontrol.write_text(f"#!/bin/sh\necho 'JobId=7 Command={SCRIPT} WorkDir=/'\n", encoding="utf-8")
    scontrol.chmod(0o700)
    facts = {"SLURM_JOB_ID": "7", "SLURM_SUBMIT_DIR": str(tmp_path), "SLURM_JOB_NODELIST": "n1"}
    facts |= {"SLURM_RESTART_COUNT": restarts, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "LDM"))}
    return subprocess.run(["bash", str(SCRIPT)], env=environment | facts, capture_output=True, text=True)


def test_a_folder_of_another_job_of_the_same_number_is_left_alone(tmp_path: Path) -> None:
    submission = tmp_path / "runs" / "slurm" / "7" / "submission.json"
    submission.parent.mkdir(parents=True)
    submission.write_text("{}", encoding="utf-8")
    said = begin(tmp_path, restarts="")
    assert said.returncode == 2
    assert "belongs to another job of this number: remove it, or submit with LDM_JOBS_DIR" in said.stdout
    assert submission.read_text() == "{}"
    assert "another job" not in begin(tmp_path, restarts="1").stdout


def test_a_job_without_a_configuration_says_so(tmp_path: Path) -> None:
    said = begin(tmp_path, restarts="0")
    assert said.returncode == 2
    assert "no configuration given" in said.stdout
