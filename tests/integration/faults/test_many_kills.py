"""One run killed again and again: any rank, all of them, their helpers, the launcher; at any moment; while
its S3 comes and goes; with other ranks, engine and ZeRO stage after every death of the launcher. It ends as
the run that nobody touched.

    LDM_KILLS=100 LDM_FAULT_REPORT=kills.jsonl python -m pytest tests/integration/faults/test_many_kills.py

takes about an hour on two cores (docs/reliability.md has its log); without LDM_KILLS there are eight.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from data_pipeline.storage.local_s3 import LocalS3

pytestmark = [pytest.mark.slow, pytest.mark.timeout(4 * 3600)]

KILLS = int(os.environ.get("LDM_KILLS", "8"))
STEPS_PER_KILL = 4
EVERY = 4
LAYOUTS: list[dict[str, Any]] = [
    {"ranks": 4, "engine": "torch", "zero_stage": 0},
    {"ranks": 4, "engine": "deepspeed", "zero_stage": 1},
    {"ranks": 3, "engine": "deepspeed", "zero_stage": 2},
    {"ranks": 4, "engine": "fsdp", "zero_stage": 1},
    {"ranks": 2, "engine": "deepspeed", "zero_stage": 3},
    {"ranks": 4, "engine": "deepspeed", "zero_stage": 0},
    {"ranks": 5, "engine": "torch", "zero_stage": 0},
]
VICTIMS = ("a rank", "a rank", "a rank", "a helper of a rank", "all ranks", "the launcher")
"""A helper: a loader process, or the writer of checkpoints."""
BATCH = {"global_batch_size": 12, "micro_batch_size": 3}


def last_step(kills: int) -> int:
    """Steps of a run with this many kills."""
    return STEPS_PER_KILL * (kills + 1)


class Tormentor:
    """Carries out seeded kills on one run."""

    def __init__(self, run: Any, s3: LocalS3, seed: int) -> None:
        self._run = run
        self._s3 = s3
        self._draw = random.Random(seed)
        self._killed: set[int] = set()
        self._layout = 0

    def strike(self, number: int) -> None:
        """Kill number `number` (from 1): once its share of the steps is made, or while ranks start up."""
        run, draw = self._run, self._draw
        share = STEPS_PER_KILL * number  # of the steps: it waits there to be killed
        run.until(self._fresh_ranks, "ranks of a new attempt", hold=share)
        at_start = draw.random() < 0.15
        if at_start:
            time.sleep(draw.uniform(0.0, 6.0))
        else:
            run.until_step(share - STEPS_PER_KILL + draw.randrange(STEPS_PER_KILL))
            run.hold(share)
            time.sleep(draw.uniform(0.0, 0.3))
        outage = draw.uniform(1.0, 6.0) if draw.random() < 0.15 else 0.0
        if outage:
            self._s3.stop()
        pulse, victim = run.pulse(0), draw.choice(VICTIMS)
        self._kill(victim)
        if outage:
            time.sleep(outage)
            self._s3.start()
        run.report(
            f"kill {number}: {victim}",
            phase="start" if pulse is None else pulse.phase,
            step=0 if pulse is None else pulse.step,
            outage_s=outage,
            **LAYOUTS[self._layout % len(LAYOUTS)],
        )
        if victim == "the launcher":
            self._layout += 1
            change_layout(run, LAYOUTS[self._layout % len(LAYOUTS)])
            run.start()

    def _kill(self, victim: str) -> None:
        ranks = self._run.ranks()
        chosen = sorted(ranks.values())
        if victim == "the launcher":
            self._killed |= set(chosen)
            self._run.kill()
            return
        if victim != "all ranks":
            chosen = [self._draw.choice(chosen)] if chosen else []
        if victim == "a helper of a rank":
            chosen = [self._draw.choice(helpers) for rank in chosen if (helpers := children(rank))]
        else:
            self._killed |= set(ranks.values())  # the launcher ends the others of this attempt
        for pid in chosen:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def _fresh_ranks(self) -> bool:
        ranks = set(self._run.ranks().values())
        return bool(ranks) and not ranks & self._killed


def children(pid: int) -> list[int]:
    """Processes that any thread of a process has started."""
    found: list[int] = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            found += map(int, task.read_text().split())
    return sorted(found)


def change_layout(run: Any, layout: dict[str, Any]) -> None:
    """Other ranks and another engine from the next start on."""
    values = yaml.safe_load(run.config_path.read_text())
    values["distributed"] |= layout
    run.config_path.write_text(yaml.safe_dump(values))


def test_many_random_kills_leave_no_trace(make_run: Any, on_s3: Any, s3: LocalS3) -> None:
    steps = last_step(KILLS)
    settings = BATCH | {"steps": steps, "checkpoint": {"every": EVERY}}
    whole, other = (
        make_run(settings | {"distributed": LAYOUTS[layout]}, name=f"unbroken-{layout}") for layout in (0, 4)
    )
    for unbroken in (whole, other):
        assert unbroken.run() == 0, unbroken.console[-4000:]
    patient = {"max_restarts": 1000, "watchdog_s": 60.0}
    run = on_s3(settings | {"distributed": LAYOUTS[0] | patient}).start()
    tormentor = Tormentor(run, s3, seed=KILLS)
    for number in range(1, KILLS + 1):
        tormentor.strike(number)
    assert run.wait() == 0, run.console[-4000:]

    wanted = whole.trace()
    assert sorted(wanted) == list(range(1, steps + 1))
    made = [(record["step"], record["loss"]) for record in run.records() if "loss" in record]
    assert sorted({step for step, _ in made}) == sorted(wanted)
    # Layouts sum in other orders, and training makes more of each last bit step by step: so much is allowed.
    # Another sample, or another draw for one of them, would move a loss in its first digits.
    allowed = 1e-6 + 10 * max(abs(loss / wanted[step] - 1) for step, loss in other.trace().items())
    furthest = max(abs(loss / wanted[step] - 1) for step, loss in made)
    assert furthest < min(allowed, 1e-2)
    distances, rounding = run.state_distances(whole), other.state_distances(whole)
    assert all(distance < 1e-6 + 10 * rounding[kind] for kind, distance in distances.items()), distances
    assert run.position() == whole.position()
    run.report(
        f"{KILLS} kills",
        steps=steps,
        made_again=len(made) - steps,
        loss_distance=furthest,
        state_distance=max(distances.values()),
        unbroken_distance=max(rounding.values()),
    )
