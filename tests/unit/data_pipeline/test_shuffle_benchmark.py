"""benchmarks/shuffle.py: the shuffle that ours is compared with is as it stays, not as it begins."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.parametrize("buffer", [100, 1000])
def test_a_drawn_sample_has_stood_in_the_buffer_for_a_geometric_time(
    buffer: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    shuffle = import_module("shuffle")
    passed = 10 * buffer // shuffle.SAMPLES * shuffle.SAMPLES + shuffle.DEEP
    draws = 40 * buffer
    waited = passed + buffer + np.arange(draws) - shuffle.buffered(buffer, draws, 1)
    assert waited.min() >= 0
    assert waited.mean() == pytest.approx(buffer, rel=0.1)
    older = [(waited > turns * buffer).mean() for turns in (1, 2, 3)]
    assert older == pytest.approx(np.exp([-1, -2, -3]), abs=0.03)
