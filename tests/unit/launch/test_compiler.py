"""Who compiles the kernels of the first step: a copy of a node's first rank, where there is a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from trainer.config.run import Config
from trainer.exit_codes import ExitCode
from trainer.launch.rank import compile_for_this_node
from trainer.planning import kernels

# A process of its own: one with threads, as pytest's workers have, is not copied.
RANK = """
import os, sys
from pathlib import Path
from trainer.exit_codes import ExitCode
from trainer.launch import rank

def compile_for_this_node(config):
    Path(sys.argv[1]).write_text(f"{config} for {os.getppid()}")
    return ExitCode.DONE

rank.NVIDIA_DRIVER = Path(sys.argv[2])
rank.compile_for_this_node = compile_for_this_node
rank._compile_ahead("kernels")
print(os.getpid())
try:
    os.wait()
except ChildProcessError:
    pass
"""


@pytest.mark.parametrize(
    ("variables", "driver", "compiles"),
    [
        ({}, "/", True),
        ({"LOCAL_RANK": "0", "RANK": "8"}, "/", True),
        ({"LOCAL_RANK": "1"}, "/", False),
        ({"SLURM_LOCALID": "0", "SLURM_PROCID": "8"}, "/", True),
        ({"SLURM_LOCALID": "3"}, "/", False),
        ({"CUDA_VISIBLE_DEVICES": ""}, "/", False),
        ({}, "/nowhere", False),
    ],
)
def test_one_rank_of_a_node_with_gpus_has_a_copy_compile(
    tmp_path: Path, variables: dict[str, str], driver: str, compiles: bool
) -> None:
    named = ("LOCAL_RANK", "SLURM_LOCALID", "CUDA_VISIBLE_DEVICES")
    environment = {name: value for name, value in os.environ.items() if name not in named} | variables
    command = [sys.executable, "-c", RANK, str(tmp_path / "said"), driver]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "said").exists() == compiles
    if compiles:
        assert (tmp_path / "said").read_text() == f"kernels for {done.stdout.strip()}"


def test_a_copy_that_fails_is_no_fault_of_the_rank(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*arguments: object) -> None:
        raise RuntimeError("no compiler")

    monkeypatch.setattr(os, "nice", lambda by: 0)
    monkeypatch.setattr(kernels, "compile_kernels", fail)
    with caplog.at_level("DEBUG"):
        assert compile_for_this_node(Config()) is ExitCode.RETRYABLE
    assert "no compiler" in caplog.text
