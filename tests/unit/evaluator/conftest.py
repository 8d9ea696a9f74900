"""Runs that an evaluator sees."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from .committed_run import CommittedRun, MakeRun


@pytest.fixture
def make_run(tmp_path: Path) -> Iterator[MakeRun]:
    made: list[CommittedRun] = []

    def make(*settings: str, run_dir: str | None = None) -> CommittedRun:
        made.append(CommittedRun(run_dir or str(tmp_path / "run"), "checkpoint.keep_last=9", *settings))
        return made[-1]

    yield make
    for run in made:
        run.close()
