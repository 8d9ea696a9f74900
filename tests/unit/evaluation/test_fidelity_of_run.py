"""`ldm evaluate fidelity RUN --sample OPTIONS`: what the commands one by one give."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.unit.evaluator.committed_run import CommittedRun, reference
from trainer.__main__ import main

ROOT = Path(__file__).resolve().parents[3]
Measure = Callable[..., dict[str, Any]]
DRAWN = ("--sample", "--count 10 --batch-size 4 --guidance 3 --steps 3 --seed 5")


@pytest.fixture(autouse=True)
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The system's temporary folder, of this test alone."""
    (tmp_path / "scratch").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "scratch"))
    monkeypatch.setattr(tempfile, "tempdir", None)
    return tmp_path / "scratch"


@pytest.fixture
def run_dir(tmp_path: Path) -> str:
    run = CommittedRun(str(tmp_path / "run"), "checkpoint.keep_last=9")
    for step in (100, 200):
        run.commit(step)
    run.close()
    (tmp_path / "run" / "config.yaml").write_text("steps: 200\n")
    reference(tmp_path / "real")
    return str(tmp_path / "run")


def command(tmp_path: Path, source: str, *words: str) -> list[str]:
    measuring = ["--reference", str(tmp_path / "real"), "--features", "random", "--metrics", "fid,kid"]
    return ["evaluate", "fidelity", source, *measuring, "--out", str(tmp_path / "out.json"), *words]


def found(tmp_path: Path) -> dict[str, Any]:
    return dict(json.loads((tmp_path / "out.json").read_text()))


def test_it_draws_what_sample_draws_and_leaves_nothing_behind(
    tmp_path: Path, run_dir: str, scratch: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command(tmp_path, run_dir, *DRAWN)) == 0
    told = found(tmp_path)
    assert "pictures: 10 of " in capsys.readouterr().out
    assert told["pictures"]["source"] == f"{run_dir}, step 200, decay"
    assert told["pictures"]["networks"]["random"]["sha256"]
    drawn = {name: told["drawn"][name] for name in ("checkpoint", "guidance", "steps", "seed", "count")}
    assert drawn == {"checkpoint": 200, "guidance": 3.0, "steps": 3, "seed": 5, "count": 10}
    assert list(scratch.glob("ldm-*")) == []
    # by hand
    out = str(tmp_path / "by_hand")
    assert main(["sample", run_dir, "--out", out, *DRAWN[1].split()]) == 0
    assert main(command(tmp_path, f"{out}/pictures")) == 0
    assert found(tmp_path)["figures"] == told["figures"]


def test_a_plain_sigterm_leaves_nothing_behind(tmp_path: Path, run_dir: str, scratch: Path) -> None:
    words = command(tmp_path, run_dir, "--sample", "--count 4000 --batch-size 4 --steps 9")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen([sys.executable, "-m", "trainer", *words], env=environment) as process:
        while not list(scratch.glob("ldm-fidelity-*/pictures/*")):
            assert process.poll() is None
            time.sleep(0.05)
        process.terminate()
        assert process.wait(timeout=120) == 128 + signal.SIGTERM
    assert list(scratch.glob("ldm-*")) == []


def test_pictures_are_kept_and_gone_on_with_where_one_says(tmp_path: Path, run_dir: str) -> None:
    kept = tmp_path / "kept"
    words = [DRAWN[0], f"{DRAWN[1]} --checkpoint 100", "--pictures-out", str(kept)]
    assert main(command(tmp_path, run_dir, *words)) == 0
    first = found(tmp_path)
    assert first["drawn"]["checkpoint"] == 100
    before = {path: path.stat().st_mtime_ns for path in (kept / "pictures").iterdir()}
    assert len(before) == 10
    # as after a kill in the second part
    (kept / "parts" / "000001.json").unlink()
    assert main(command(tmp_path, run_dir, *words)) == 0
    assert found(tmp_path) == first
    after = {path: path.stat().st_mtime_ns for path in (kept / "pictures").iterdir()}
    made_again = sorted(path.name for path in after if after[path] != before[path])
    assert made_again == [f"{i:07d}.png" for i in range(4, 8)]


def test_local_ranks_share_one_temporary_folder(tmp_path: Path, run_dir: str, scratch: Path) -> None:
    assert main(command(tmp_path, run_dir, *DRAWN)) == 0
    alone = found(tmp_path)["figures"]
    assert main(command(tmp_path, run_dir, *DRAWN, "--ranks", "2")) == 0
    assert found(tmp_path)["figures"] == alone
    assert list(scratch.glob("ldm-*")) == []


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ((), "is a run, and holds previews at most; draw a set"),
        (("--pictures-out", "x"), "--pictures-out is for pictures that are drawn first; give --sample"),
        (("--ranks", "2"), "--ranks is for pictures that are drawn first; give --sample"),
        (("--sample", "--steps 3"), "say how many pictures are to be drawn, with --count"),
        (("--sample", "--count 3 --out x"), "--sample may not hold --out"),
        (("--sample", "--count 3 --prompt 'x"), "correct its quotes"),
        ((*DRAWN, "--pictures-out", " "), "--pictures-out is empty"),
        ((*DRAWN, "--ranks", "-1"), "--ranks -1 must be at least 0"),
        ((*DRAWN, "--metrics", "fidd"), "there is no metric 'fidd'"),
        (("--sample", "--count 3 --checkpoint 150"), "150"),
    ],
)
def test_mistakes_are_one_sentence(
    tmp_path: Path,
    run_dir: str,
    scratch: Path,
    capsys: pytest.CaptureFixture[str],
    words: tuple[str, ...],
    sentence: str,
) -> None:
    assert main(command(tmp_path, run_dir, *words)) == 2
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("ldm: ")]
    assert len(told) == 1
    assert sentence in told[0]
    assert list(scratch.glob("ldm-*")) == []


def test_what_the_model_cannot_draw_is_told_before_the_reference_is_read(
    tmp_path: Path, run_dir: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """So are pictures of another set where the new ones are to go. A reference may take hours."""
    kept = ("--pictures-out", str(tmp_path / "kept"))
    assert main(command(tmp_path, run_dir, *DRAWN, *kept)) == 0
    (tmp_path / "real" / "broken.png").write_bytes(b"whoever reads this is told so")
    for words, sentence in (
        (DRAWN, "broken.png cannot be measured"),
        (("--sample", f"{DRAWN[1]} --steps 5000"), "sampling.steps=5000 must be at most"),
        (("--sample", f"{DRAWN[1]} --seed 9", *kept), "holds another set of pictures (seed"),
    ):
        capsys.readouterr()
        assert main(command(tmp_path, run_dir, *words)) == 2
        assert sentence in capsys.readouterr().err


def test_weights_in_a_file_are_drawn_from_as_well(
    tmp_path: Path, run_dir: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file = str(tmp_path / "model.safetensors")
    assert main(["export", run_dir, file]) == 0
    assert main(command(tmp_path, file, *DRAWN)) == 0
    assert found(tmp_path)["pictures"]["source"] == f"{file}, step 200, decay"
    of_file = found(tmp_path)["figures"]
    assert main(command(tmp_path, run_dir, *DRAWN)) == 0
    assert found(tmp_path)["figures"] == of_file
    capsys.readouterr()
    assert main(command(tmp_path, file)) == 2
    assert "holds no statistics of pictures" in (told := capsys.readouterr().err)
    assert "--sample '--count N' to draw from them" in told


def test_pictures_are_no_run_and_other_launchers_ranks_need_a_folder(
    tmp_path: Path, run_dir: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command(tmp_path, str(tmp_path / "real"), *DRAWN)) == 2
    assert "name a run folder or a checkpoint's folder" in capsys.readouterr().err
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    assert main(command(tmp_path, run_dir, *DRAWN)) == 2
    assert "name it with --pictures-out" in capsys.readouterr().err
