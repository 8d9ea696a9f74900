"""Every configuration under configs/ loads, and says how to run it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from trainer.config.io import load_config

ROOT = Path(__file__).parents[2]
CONFIGS = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "configs").rglob("*.yaml"))


def test_there_are_configs() -> None:
    assert len(CONFIGS) >= 4


@pytest.mark.parametrize("path", CONFIGS)
def test_loads_and_names_its_command(path: str) -> None:
    load_config(str(ROOT / path))
    first = (ROOT / path).read_text().splitlines()[0]
    assert first.startswith(f"# ldm train {path}"), first


def test_ldm_config_needs_no_torch() -> None:
    code = (
        "import sys; from trainer.__main__ import main; "
        "assert main(['config', 'configs/sd/sd2_base_256.yaml']) == 0; "
        "heavy = {'torch', 'deepspeed', 'ray', 'wandb', 'open_clip'} & set(sys.modules); "
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "zero_optimization" in done.stdout
