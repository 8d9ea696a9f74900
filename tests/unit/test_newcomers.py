"""What a person types wrongly, where it would cost data, days or a traceback."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from data_pipeline.errors import UserError
from trainer.__main__ import main
from trainer.cli import demo
from trainer.config.io import load_config
from trainer.config.run import ConfigError
from trainer.generation.store import SmallSet
from trainer.operation.asking import Patience

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", ["", " ", "."])
def test_a_fresh_demo_removes_nothing_that_is_not_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    (tmp_path / "thesis.txt").write_text("years")
    monkeypatch.chdir(tmp_path)
    assert main(["demo", "--folder", name, "--fresh"]) == 2
    told = capsys.readouterr().err
    assert "--folder is empty" in told if not name.strip() else "was not begun by a demo" in told
    assert (tmp_path / "thesis.txt").read_text() == "years"


def test_a_fresh_demo_removes_what_a_demo_began(tmp_path: Path) -> None:
    own = tmp_path / "demo"
    own.mkdir()
    (own / demo.MARK).touch()
    (own / "s3").mkdir()
    demo._clear(own)
    assert not own.exists()
    demo._clear(own)


def test_braces_that_the_shell_expanded_are_told() -> None:
    """One shard of a thousand would be trained on."""
    words = [f"data.shards=s3://b/laion/{i:05d}.tar" for i in range(1000)]
    with pytest.raises(ConfigError, match=r"data\.shards is given several times in a row.*in quotes"):
        load_config(None, words)
    load_config(None, ["data.shards=s3://b/laion/{00000..00999}.tar", "steps=3", "steps=4"])
    assert load_config(None, ["run_dir=a/b", "steps=3", "run_dir=a/c"]).run_dir == "a/c"


def test_tars_in_a_folder_named_parts_are_nobodys_to_remove(tmp_path: Path) -> None:
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts/00000.tar").write_bytes(b"a data set")
    with pytest.raises(ConfigError, match="holds another set of pictures"):
        SmallSet(str(tmp_path), {"prompts": []}, [], overwrite=False)


def test_a_reader_that_has_seen_enough_gets_no_traceback() -> None:
    words = f"{sys.executable} -m trainer config configs/sd/sd2_base_256.yaml"
    command = f"{words} | head -n 1; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(
        ["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, check=True, timeout=300
    )
    assert "Traceback" not in done.stderr
    assert "BrokenPipe" not in done.stderr
    assert done.stdout.splitlines()[-1] in ("0", "141")


def test_a_closed_pipe_is_the_end_of_a_program_that_nobody_reads() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "wb") as closed:
        command = [sys.executable, "-m", "trainer", "config", "configs/sd/sd2_base_256.yaml"]
        done = subprocess.run(
            command, cwd=ROOT, stdout=closed, stderr=subprocess.PIPE, text=True, check=False, timeout=300
        )
    assert (done.returncode, done.stderr) == (141, "")


def test_levels_of_the_log_are_read_in_any_case(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for level, told in (("debug", ""), ("loud", "LDM_LOG_LEVEL=LOUD is no level")):
        monkeypatch.setenv("LDM_LOG_LEVEL", level)
        caplog.clear()
        assert main(["config", "nowhere.yaml"]) == 2
        assert told in caplog.text


@pytest.mark.parametrize("seconds", [float("nan"), -1.0])
def test_no_time_to_wait_is_told(seconds: float) -> None:
    with pytest.raises(UserError, match="is no time to wait"):
        Patience(seconds)
