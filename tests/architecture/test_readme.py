"""What the README says to type works as written."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
COMMANDS = re.findall(r"^\.venv/bin/(ldm [^#\n]+)", README, flags=re.MULTILINE)


def test_there_are_commands() -> None:
    assert len(COMMANDS) >= 4


def test_commands_run_in_their_order(tmp_path: Path) -> None:
    for command in COMMANDS:
        arguments = shlex.split(command.replace("/tmp/shards", f"{tmp_path}/shards"))[1:]
        done = subprocess.run(
            [sys.executable, "-m", "trainer", *arguments],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"{command}\n{done.stderr}"
    assert (tmp_path / "shards.png").exists()


@pytest.mark.parametrize("verb", sorted(set(re.findall(r"\bldm (\w+)", README))))
def test_every_verb_exists_and_explains_itself(verb: str) -> None:
    if verb == "VERB":
        return
    done = subprocess.run(
        [sys.executable, "-m", "trainer", verb, "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "example: ldm" in done.stdout


def test_paths_in_the_readme_exist() -> None:
    paths = re.findall(r"\]\(([\w./-]+)\)", README)
    assert paths
    assert [path for path in paths if not (ROOT / path).exists()] == []


def test_targets_in_the_readme_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"(?:^|`)make ([\w-]+)", README, flags=re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target
