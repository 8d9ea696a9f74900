"""When an evaluator has nothing more to do, and when it only looks so."""

from __future__ import annotations

from pathlib import Path

import pytest

import trainer.evaluator.watch
from trainer.evaluator.lookout import Lookout
from trainer.evaluator.watch import Watcher, WatchOptions

from .committed_run import MakeRun, lines, watch


def test_the_last_step_is_measured_though_it_is_no_multiple(tmp_path: Path, make_run: MakeRun) -> None:
    run = make_run("steps=400")
    for step in (100, 300, 400):
        run.commit(step)
    assert watch(tmp_path, "--rule", "all", "--every", "300") == 0
    assert [line["step"] for line in lines(tmp_path)] == [300, 400]


def test_a_last_step_that_cannot_be_measured_ends_it_as_well(tmp_path: Path, make_run: MakeRun) -> None:
    run = make_run("steps=200")
    run.commit(100)
    run.commit(200)
    manifest = tmp_path / "run/checkpoints/step_000000200/manifest.json"
    manifest.write_bytes(manifest.read_bytes()[:-9])
    assert watch(tmp_path, "--rule", "all") == 0
    assert [line["step"] for line in lines(tmp_path)] == [100]


def test_the_snapshot_of_the_last_step_is_not_the_end(tmp_path: Path, make_run: MakeRun) -> None:
    """The checkpoint, which is larger, comes after it."""
    run = make_run("steps=200")
    run.commit(100)
    run.commit(200, snapshot=True)
    watcher = watcher_of(tmp_path)
    found = Lookout(str(tmp_path / "run")).look(200)
    watcher._passed_over = {each.key for each in found}
    watcher._worked = True
    assert watcher._next() is None
    assert not watcher._is_over()
    run.commit(200)
    watcher._passed_over |= {each.key for each in Lookout(str(tmp_path / "run")).look(200)}
    assert watcher._next() is None
    assert watcher._is_over()


def test_a_run_that_goes_on_is_watched_to_its_new_end(
    tmp_path: Path, make_run: MakeRun, caplog: pytest.LogCaptureFixture
) -> None:
    make_run("steps=400").commit(400)
    assert watch(tmp_path) == 0
    watcher = watcher_of(tmp_path)  # which is there before the run has written how far it goes now
    assert watcher._next() is None
    assert not watcher._is_over()
    assert "all of the run was measured before; it has 300 s to say that it goes on" in caplog.text
    run = make_run("steps=600")
    assert watcher._next() is None
    assert not watcher._is_over()
    run.commit(500)
    watcher._end()
    assert watch(tmp_path, "--once") == 0
    run.commit(600)
    assert watch(tmp_path) == 0
    assert [line["step"] for line in lines(tmp_path)] == [400, 500, 600]


def test_one_that_is_started_again_behind_the_end_ends(
    tmp_path: Path, make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_run("steps=400").commit(400)
    monkeypatch.setattr(trainer.evaluator.watch, "_GOES_ON_S", 0.3)
    assert watch(tmp_path) == 0
    assert watch(tmp_path) == 0
    assert [line["step"] for line in lines(tmp_path)] == [400]


def test_a_run_that_does_not_say_where_it_ends_is_said(
    tmp_path: Path, make_run: MakeRun, caplog: pytest.LogCaptureFixture
) -> None:
    make_run("steps=100").commit(100)
    assert watch(tmp_path, "--once") == 0
    (tmp_path / "run/config.yaml").unlink()
    watcher = watcher_of(tmp_path)
    assert watcher._next() is None
    assert not watcher._is_over()
    assert "run/config.yaml does not say how many steps the run has" in caplog.text


def watcher_of(tmp_path: Path) -> Watcher:
    """That has begun, and draws nothing."""
    run, out = str(tmp_path / "run"), tmp_path / "run/evaluation"
    by = lines(tmp_path)[-1]["measured_by"] if (out / "metrics.jsonl").exists() else {}
    options = WatchOptions(run, str(out), rule="all", measured_by=by)
    watcher = Watcher(options, lambda *_: None, lambda _: None)
    watcher._begin()
    return watcher
