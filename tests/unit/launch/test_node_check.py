"""slurm/node_check.sh on a node whose nvidia-smi says what the test wants."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

CHECK = Path(__file__).parents[3] / "slurm" / "node_check.sh"
NVIDIA_SMI = """\
#!/bin/bash
case "$*" in
  *--list-gpus*) printf 'GPU 0: A\\nGPU 1: A\\n' ;;
  *--query-gpu=*) printf '%s\\n' "$GPUS" ;;
  *--query-remapped-rows=*) printf '%s\\n' "$ROWS"; exit "$ROWS_STATUS" ;;
esac
"""
WELL = "0, 0, [N/A]\n1, 0, [N/A]"
NO_ROWS = "00000000:07:00.0, No, No\n00000000:0F:00.0, No, No"


def verdict(tmp_path: Path, gpus: str = WELL, rows: str = NO_ROWS, status: int = 0) -> str:
    """What the quick check prints of node n1."""
    (tmp_path / "config.yaml").touch()
    stand_in = tmp_path / "nvidia-smi"
    stand_in.write_text(NVIDIA_SMI, encoding="utf-8")
    stand_in.chmod(0o700)
    facts = {"SLURMD_NODENAME": "n1", "SLURM_GPUS_ON_NODE": "2", "LDM_JOB_DIR": str(tmp_path)}
    facts |= {"LDM_MIN_TMP_GIB": "0", "LDM_MIN_SHM_GIB": "0", "LDM_NODE_CHECK": ""}
    facts |= {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    facts |= {"GPUS": gpus, "ROWS": rows, "ROWS_STATUS": str(status)}
    command = ["bash", str(CHECK), "quick"]
    return subprocess.run(
        command, env={**os.environ, **facts}, capture_output=True, text=True, check=True
    ).stdout.strip()


@pytest.mark.parametrize(
    ("rows", "status"),
    [
        (NO_ROWS, 0),
        ("00000000:07:00.0, 0, 0\n00000000:0F:00.0, 0, 0", 0),
        ("00000000:07:00.0, [N/A], [N/A]", 0),  # before Ampere
        ("Option --query-remapped-rows=gpu_bus_id is not recognized. Please run 'nvidia-smi -h'.", 6),
    ],
)
def test_a_node_is_fit(tmp_path: Path, rows: str, status: int) -> None:
    assert verdict(tmp_path, rows=rows, status=status) == "n1 fit"


@pytest.mark.parametrize("sick", ["Yes, No", "No, Yes", "1, 0", "0, 1"])
def test_rows_that_wait_to_be_remapped_make_it_unfit(tmp_path: Path, sick: str) -> None:
    rows = f"00000000:07:00.0, No, No\n00000000:0F:00.0, {sick}"
    said = verdict(tmp_path, rows=rows)
    assert said == "n1 rows of memory wait to be remapped, or cannot be, on GPU 00000000:0F:00.0"


@pytest.mark.parametrize("sick", ["3, [N/A]", "0, Yes"])
def test_uncorrected_errors_and_pages_to_be_retired_do_too(tmp_path: Path, sick: str) -> None:
    said = verdict(tmp_path, gpus=f"0, 0, [N/A]\n1, {sick}")
    assert said == "n1 uncorrected memory errors on GPU 1"
