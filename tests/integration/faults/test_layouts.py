"""`ldm train` goes on with other ranks, ZeRO stages, micro-batches, workers: the run that never changed."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.loader import build_loader
from trainer.__main__ import main
from trainer.config.io import load_config

pytestmark = pytest.mark.timeout(2400)

LEG_STEPS = 4
LEGS: list[dict[str, Any]] = [
    {"ranks": 1, "engine": "deepspeed", "zero_stage": 1, "micro": 12, "workers": 0},
    {"ranks": 2, "engine": "deepspeed", "zero_stage": 2, "micro": 3, "workers": 1},
    {"ranks": 4, "engine": "deepspeed", "zero_stage": 3, "micro": 3, "workers": 1},
    {"ranks": 3, "engine": "deepspeed", "zero_stage": 0, "micro": 2, "workers": 2},
    {"ranks": 2, "engine": "fsdp", "zero_stage": 1, "micro": 3, "workers": 1},
    {"ranks": 1, "engine": "torch", "zero_stage": 0, "micro": 4, "workers": 3},
]


def settings(leg: dict[str, Any], steps: int) -> dict[str, Any]:
    """Changes to the tiny run: this leg's layout, up to this step."""
    distributed = {name: leg[name] for name in ("ranks", "engine", "zero_stage")}
    return {
        "steps": steps,
        "global_batch_size": 12,
        "micro_batch_size": leg["micro"],
        "data": {"workers": leg["workers"]},
        "distributed": distributed,
    }


@pytest.mark.slow
def test_a_run_whose_layout_changes_at_every_restart_is_the_run_that_never_did(make_run: Any) -> None:
    for number, leg in enumerate(LEGS, 1):
        changing = make_run(settings(leg, LEG_STEPS * number), name="changing")
        assert changing.run() == 0, changing.console[-4000:]
        if number > 1:
            assert changing.events("resume")[-1]["step"] == LEG_STEPS * (number - 1)
    constant = make_run(settings(LEGS[-1], LEG_STEPS * len(LEGS)), name="constant")
    assert constant.run() == 0, constant.console[-4000:]
    # Other samples, or other draws for one of them, would move every loss in the first digits.
    wanted = constant.trace()
    assert list(changing.trace()) == list(wanted)
    worst = max(abs(changing.trace()[step] / loss - 1) for step, loss in wanted.items())
    assert worst < 5e-6
    distances = changing.state_distances(constant)
    assert max(distances.values()) < 1e-4, distances
    changing.report("layout changes", loss_distance=worst, state_distance=max(distances.values()))


ANY_RANKS: list[dict[str, Any]] = [
    {"ranks": 1, "engine": "deepspeed", "zero_stage": 1, "micro": 10, "workers": 1},
    {"ranks": 3, "engine": "deepspeed", "zero_stage": 2, "micro": 2, "workers": 2},
    {"ranks": 5, "engine": "torch", "zero_stage": 0, "micro": 4, "workers": 0},
    {"ranks": 7, "engine": "deepspeed", "zero_stage": 3, "micro": 1, "workers": 0},
    {"ranks": 3, "engine": "fsdp", "zero_stage": 1, "micro": 3, "workers": 1},
    {"ranks": 2, "engine": "deepspeed", "zero_stage": 0, "micro": 3, "workers": 3},
]


@pytest.fixture
def own_shards(tmp_path: Path, shards: str) -> str:
    """The same shards, without an index."""
    (tmp_path / "shards").mkdir()
    for tar in Path(shards).parent.glob("*.tar"):
        shutil.copy(tar, tmp_path / "shards")
    return f"{tmp_path}/shards/*.tar"


@pytest.mark.parametrize(
    "legs",
    [ANY_RANKS[:2], pytest.param(ANY_RANKS, marks=pytest.mark.slow)],
    ids=["1, 3 ranks", "1, 3, 5, 7, 3, 2 ranks, every engine"],
)
def test_ranks_that_do_not_divide_the_batch_are_the_run_on_one(
    make_run: Any, own_shards: str, legs: list[dict[str, Any]]
) -> None:
    """10 samples: rows filled up, in passes of padding alone too."""
    steps = 3
    assert main(["data", "index", own_shards]) == 0

    def changes(leg: dict[str, Any], last: int) -> dict[str, Any]:
        given = settings(leg, last)
        return given | {"global_batch_size": 10, "data": given["data"] | {"shards": own_shards}}

    for number, leg in enumerate(legs, 1):
        changing = make_run(changes(leg, steps * number), name="changing")
        assert changing.run() == 0, changing.console[-4000:]
        assert ("of the rows are padding" in changing.console) == (number > 1)
        if number > 1:
            resumed = changing.events("resume")[-1]
            assert (resumed["step"], resumed["world_size"]) == (steps * (number - 1), leg["ranks"])
    one = {**legs[0], "engine": "torch", "zero_stage": 0}
    constant = make_run(changes(one, steps * len(legs)), name="constant")
    assert constant.run() == 0, constant.console[-4000:]
    wanted = constant.trace()
    assert list(changing.trace()) == list(wanted) == list(range(1, steps * len(legs) + 1))
    worst = max(abs(changing.trace()[step] / loss - 1) for step, loss in wanted.items())
    assert worst < 5e-6
    distances = changing.state_distances(constant)
    assert max(distances.values()) < 1e-4, distances
    changing.report("any ranks", loss_distance=worst, state_distance=max(distances.values()))
    # Every lane stands where one uninterrupted reader leaves it: each sample came exactly once.
    data = load_config(str(constant.config_path), []).data
    with build_loader(data, seed=0, global_batch_size=10) as batches:
        for _ in wanted:
            batch = next(batches)
    assert changing.position() == constant.position() == batch.position
    assert {record["samples_seen"] for record in changing.records() if "loss" in record} == {
        10 * step for step in wanted
    }


def test_a_run_that_began_without_an_index_keeps_its_lanes(make_run: Any, own_shards: str) -> None:
    """Four shards make two lanes of five samples a step: with an index there would be ten, of three ranks two
    would have three samples and one four; so the last one has none."""

    def changes(ranks: int, last: int, order: str = "streamed") -> dict[str, Any]:
        sizes = {"steps": last, "global_batch_size": 10, "micro_batch_size": 4}
        data = {"shards": own_shards, "workers": 0, "order": order}
        return sizes | {"data": data, "distributed": {"ranks": ranks}}

    constant = make_run(changes(1, 4), name="constant")
    assert constant.run() == 0, constant.console[-4000:]
    assert make_run(changes(1, 2), name="changing").run() == 0
    assert main(["data", "index", own_shards]) == 0
    changing = make_run(changes(3, 4, "indexed"), name="changing")
    assert changing.run() == 0, changing.console[-4000:]
    assert "; 2 ranks make a step as short" in changing.console
    assert changing.position() == constant.position()
    assert changing.position()["lanes"] == 2
    wanted = constant.trace()
    assert max(abs(changing.trace()[step] / loss - 1) for step, loss in wanted.items()) < 5e-6
