"""The scripts of slurm/ on a real SLURM cluster: refusals, and containers."""

from __future__ import annotations

import os
import shutil
import sys
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


APPTAINER = """#!/usr/bin/env bash
# Stands in for apptainer: notes mounts, image and command, and runs the command where it stands.
printf '%s\\n' "$4 | $5 | ${*:6}" >>"$ENTERED"
exec "${@:6}"
"""
PYXIS = """#!/usr/bin/env bash
# Stands in for srun with pyxis, which is no part of Debian: notes the same, and the rest is srun's.
words=() mounts='' image=''
for word in "$@"; do
  case $word in
    --container-image=*) image=${word#*=} ;;
    --container-mounts=*) mounts=${word#*=} ;;
    --no-container-mount-home) ;;
    *) words+=("$word") ;;
  esac
done
printf '%s\\n' "$mounts | $image | ${words[*]}" >>"$ENTERED"
exec "$REAL_SRUN" "${words[@]}"
"""
MISTAKES = {
    "train_ldm.sh": (["bad.yaml"], "unknown key `stepz`", " -m trainer.launch.slurm_job prepare "),
    "encode.sh": (["bad.yaml"], "unknown key `stepz`", " bash -c "),
    "evaluate.sh": (
        ["run", "--reference", "none", "--sample", "--count 4", "--every", "0"],
        "--every 0 must be at least 1",
        " -m trainer evaluate watch run --reference none ",
    ),
}


@pytest.mark.parametrize("image", ["/images/ldm.sif", "registry#ldm:1"])
@pytest.mark.parametrize("script", MISTAKES)
def test_what_a_script_runs_it_runs_in_the_container(
    slurm: Any, tmp_path: Path, script: str, image: str
) -> None:
    program = tmp_path / "bin" / ("apptainer" if image.endswith(".sif") else "srun")
    program.parent.mkdir()
    program.write_text(APPTAINER if image.endswith(".sif") else PYXIS)
    program.chmod(0o755)
    (tmp_path / "bad.yaml").write_text("stepz: 3\n", encoding="utf-8")
    words, mistake, command = MISTAKES[script]
    path = slurm.environment["PATH"]
    environment = {
        "PATH": f"{program.parent}{os.pathsep}{path}",
        "ENTERED": str(tmp_path / "entered"),
        "REAL_SRUN": str(shutil.which("srun", path=path)),
        "LDM_PYTHON": sys.executable,
        "LDM_CONTAINER": image,
        "LDM_MOUNTS": "/data:/data:ro",
    }
    submit = ["sbatch", "--parsable", "--nodes=1", *HERE, f"--output={tmp_path}/log"]
    job = slurm.run(*submit, str(SCRIPT.with_name(script)), *words, cwd=tmp_path, **environment)
    assert slurm.wait_state(job, "FAILED", "COMPLETED") == "FAILED"
    assert slurm.field(job, "ExitCode") == "2:0"
    log = (tmp_path / "log").read_text()
    assert mistake in log, "the command has run"
    mounts, entered, ran = (tmp_path / "entered").read_text().splitlines()[0].split(" | ")
    places = [tmp_path, REPOSITORY, *([tmp_path / "runs/slurm" / job] if script == "train_ldm.sh" else [])]
    assert mounts == ",".join([*(f"{each}:{each}" for each in places), "/data:/data:ro"])
    assert entered == image
    assert command in f" {ran} "


def test_started_without_slurm_it_says_how_to_use_it(slurm: Any, tmp_path: Path) -> None:
    import subprocess

    done = subprocess.run([str(SCRIPT)], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 2
    assert "usage: sbatch" in done.stderr
