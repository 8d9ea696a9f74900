"""A run that is killed and goes on, on other ranks, has the validation losses of one that went through."""

from __future__ import annotations

from typing import Any

import pytest

pytestmark = pytest.mark.timeout(2400)

MEASURED = {
    "steps": 12,
    "data": {"validation": {"share": 0.3}},
    "validation": {"every": 2, "samples": 8, "timesteps": 2},
}


def figures(run: Any, *, exactly: bool) -> dict[int, dict[str, float]]:
    """By step; a step that was measured twice must have had the same figures twice."""
    found: dict[int, dict[str, float]] = {}
    for record in run.records():
        mine = {name: value for name, value in record.items() if name.startswith("validation/")}
        if mine.pop("validation/seconds", None) is not None:
            before = found.setdefault(record["step"], mine)
            assert before == (mine if exactly else pytest.approx(mine, rel=1e-5))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 1])
def test_a_killed_run_that_goes_on_is_measured_as_the_one_that_went_through(
    make_run: Any, ranks: int
) -> None:
    whole, parts = make_run(MEASURED, name="whole"), make_run(MEASURED, name="parts")
    assert whole.run() == 0, whole.console[-4000:]
    parts.start().until_step(7)
    parts.kill()
    again = make_run({**MEASURED, "distributed": {"ranks": ranks}}, name="parts")
    assert again.run() == 0, again.console[-4000:]
    assert again.events("resume")
    wanted, found = figures(whole, exactly=True), figures(again, exactly=ranks == 2)
    assert list(wanted) == [2, 4, 6, 8, 10, 12]
    if ranks == 2:
        assert found == wanted
    for step, each in wanted.items():
        assert found[step] == pytest.approx(each, rel=1e-5), step
