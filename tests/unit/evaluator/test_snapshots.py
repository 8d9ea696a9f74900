"""A step whose checkpoint was measured is not measured once more by the averages that stay of it."""

from __future__ import annotations

import shutil
from pathlib import Path

from trainer.evaluator.lookout import Lookout

from .committed_run import MakeRun, lines, watch


def prune(tmp_path: Path, step: int) -> None:
    shutil.rmtree(tmp_path / f"run/checkpoints/step_{step:09d}")


def test_what_is_left_of_a_measured_step_is_not_measured_again(tmp_path: Path, make_run: MakeRun) -> None:
    run = make_run()
    for step in (100, 200):
        run.commit(step)
        run.commit(step, snapshot=True)
    assert watch(tmp_path, "--once", "--rule", "all") == 0
    prune(tmp_path, 100)
    assert watch(tmp_path, "--once", "--rule", "all") == 0  # another process, which has not seen it whole
    assert [(line["step"], line["snapshot"]) for line in lines(tmp_path)] == [(100, False), (200, False)]
    run.commit(100, weights=7, snapshot=True)  # after a rewind, whose checkpoint went unseen
    assert watch(tmp_path, "--once", "--rule", "all") == 0
    assert [(line["step"], line["snapshot"]) for line in lines(tmp_path)][2:] == [(100, True)]


def test_what_is_left_of_a_step_that_was_passed_over_is_passed_over(
    tmp_path: Path, make_run: MakeRun
) -> None:
    run, lookout = make_run(), Lookout(str(tmp_path / "run"))
    lookout.look()
    for step in (100, 200):
        run.commit(step)
        run.commit(step, snapshot=True)
    first, second = lookout.look()
    assert lookout.due([first, second], set(), "newest") == (second, [first])
    prune(tmp_path, 100)
    (left, _) = found = lookout.look()
    assert left.snapshot
    assert lookout.due(found, {first.key, second.key}, "newest") == (None, [])
    assert lookout.due(found, {second.key}, "all") == (left, []), "its checkpoint went unmeasured"
