"""Small runs that are closed after the test."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from .small_run import SmallRun, build_small_run

MakeRun = Callable[..., SmallRun]


@pytest.fixture
def make_run(tmp_path: Path) -> Iterator[MakeRun]:
    """Builds runs in one run folder (or another); arguments of `build_small_run`."""
    made: list[SmallRun] = []

    def make(*, run_dir: str | None = None, **settings: Any) -> SmallRun:
        made.append(build_small_run(run_dir or str(tmp_path / "run"), **settings))
        return made[-1]

    yield make
    for run in made:
        run.manager.close()
