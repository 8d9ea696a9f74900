"""The machine code of every kernel for GPUs that are not here: nothing spills, rows come in wide words."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
SCRIPT = Path(__file__).with_name("compiled.py")
SMALL = {"_forward_lines", "_backward_lines", "_draw"}
"""Of a few values per sample, and of draws, which come four to a thread that computes for long."""


@pytest.mark.parametrize("capability", [80, pytest.param(90, marks=pytest.mark.slow)], ids=["A100", "H100"])
def test_no_kernel_takes_more_registers_than_a_thread_has(capability: int, tmp_path: Path) -> None:
    """Once a branch more made the sums of gradients spill 8 KB a thread."""
    pytest.importorskip("triton")
    variables = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TRITON_CACHE_DIR": str(tmp_path)}
    variables |= {"TRITON_INTERPRET": "0"}
    command = [sys.executable, str(SCRIPT), str(capability)]
    done = subprocess.run(command, env=os.environ | variables, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert {kernel["kernel"] for kernel in found} == launched(), "each is compiled at least once"
    assert [kernel for kernel in found if kernel["spilled"]] == []
    assert [kernel for kernel in found if kernel["kernel"] not in SMALL and not kernel["wide"]] == []


def launched() -> set[str]:
    """Names of the kernels that our modules launch."""
    modules = (ROOT / "trainer/kernels").glob("*.py")
    return {name for module in modules for name in re.findall(r"^ +(_\w+)\[.*\]\(", module.read_text(), re.M)}
