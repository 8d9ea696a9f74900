"""`ldm train` goes on with other ranks, ZeRO stages, micro-batches, workers: the run that never changed."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from trainer.checkpoint.catalogue import checkpoints_url, folder_name, open_checkpoint, steps_found
from trainer.checkpoint.reader import EngineReader

pytestmark = pytest.mark.timeout(2400)

LEG_STEPS = 4
LEGS: list[dict[str, Any]] = [
    {"ranks": 1, "engine": "deepspeed", "zero_stage": 1, "micro": 12, "workers": 0},
    {"ranks": 2, "engine": "deepspeed", "zero_stage": 2, "micro": 3, "workers": 1},
    {"ranks": 4, "engine": "deepspeed", "zero_stage": 3, "micro": 3, "workers": 1},
    {"ranks": 3, "engine": "deepspeed", "zero_stage": 0, "micro": 2, "workers": 2},
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


def final_state(run: Any) -> dict[str, torch.Tensor]:
    """Master weights, moments and averages of the last checkpoint, one vector each."""
    folder = checkpoints_url(run.run_dir)
    handle = open_checkpoint(f"{folder}/{folder_name(steps_found(folder)[0])}")
    state = {}
    for engine, shapes in handle.manifest.shapes.items():
        reader = EngineReader(handle, engine)
        for kind in handle.manifest.plan(0).kinds[engine]:
            whole = reader.whole(kind, list(shapes))
            state[f"{engine}.{kind}"] = torch.cat([whole[name].flatten().double() for name in sorted(whole)])
    return state


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
    theirs = final_state(constant)
    distances = {
        name: float((value - theirs[name]).norm() / theirs[name].norm())
        for name, value in final_state(changing).items()
    }
    assert max(distances.values()) < 1e-4, distances
    changing.report("layout changes", loss_distance=worst, state_distance=max(distances.values()))
