"""SIGKILL at seeded points: final weights, moments, EMA and every loss as in the unbroken run, bit by bit."""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest

# Every start of ranks imports torch and DeepSpeed, which takes long on a crowded machine.
pytestmark = pytest.mark.timeout(2400)

Where = Literal["startup", "step", "data", "save", "upload", "finish"]
Victim = Literal["rank 0", "rank 1", "all", "launcher"]
EVERY = 4
STEPS = 24


@dataclass(frozen=True)
class KillPoint:
    """Kill `victim` `delay_s` after the run was seen at `where`."""

    where: Where
    step: int
    victim: Victim
    delay_s: float = 0.0


def seeded_points(seed: int, count: int) -> list[KillPoint]:
    """Kill points in the order in which a run meets them, every place and victim taking its turn."""
    draw = random.Random(seed)
    places: list[Where] = ["startup", "step", "data", "save", "upload"]
    victims: list[Victim] = ["rank 0", "rank 1", "all", "launcher"]
    draw.shuffle(places)
    draw.shuffle(victims)
    points = []
    for i in range(count):
        # Clear of the end: a run is held two steps further, and has more to do then.
        step = 1 + (STEPS - 3) * i // count
        where = places[i % len(places)]
        if where in ("save", "upload"):
            step = EVERY * max(1, -(-step // EVERY))
        delay = draw.uniform(0, 4.0) if where == "startup" else draw.uniform(0, 0.05)
        points.append(KillPoint(where, step, victims[(i + i // len(places)) % len(victims)], delay))
    return points


class Killer:
    """Carries out kill points on a run, starting it again where its launcher was the victim."""

    def __init__(self, run: Any) -> None:
        self._run = run
        self._killed: set[int] = set()

    def strike(self, point: KillPoint) -> None:
        run = self._run
        beyond = point.step + 2  # the run waits there to be killed, and is inside a step before
        run.until(self._fresh_ranks, "ranks of a new attempt", hold=beyond)
        if point.where in ("step", "data", "finish"):
            run.until_step(point.step, phase=point.where)
        elif point.where == "save":
            run.until_step(point.step, phase="checkpoint")
        elif point.where == "upload":
            self._until_half_written(point.step)
        run.hold(beyond)
        time.sleep(point.delay_s)
        ranks = run.ranks()
        pulse = run.pulse(0)
        self._killed |= set(ranks.values())
        if point.victim == "launcher":
            run.kill()
            run.start()
            return
        victims = (0, 1) if point.victim == "all" else (int(point.victim.split()[1]),)
        struck = run.signal(signal.SIGKILL, *victims)
        if point.where != "startup" and pulse is not None:
            what = f"SIGKILL of {point.victim.replace(' 0', '').replace(' 1', '')} in {point.where}"
            run.follow_recovery(what, struck, pulse.step, ranks)

    def _fresh_ranks(self) -> bool:
        ranks = self._run.ranks()
        return len(ranks) == 2 and not set(ranks.values()) & self._killed

    def _until_half_written(self, step: int) -> None:
        folder = Path(self._run.run_dir) / "checkpoints" / f"step_{step:09d}"

        def torn() -> bool:
            return folder.exists() and not (folder / "manifest.json").exists()

        def past() -> bool:
            pulse = self._run.pulse(0)
            return pulse is not None and pulse.phase != "start" and pulse.step > step

        # The window is milliseconds wide; once the next step begins it may be over.
        self._run.until(lambda: torn() or past(), f"a half-written step {step}", hold=step + 1)


def check_kills(
    make_run: Any, unbroken: Callable[..., Any], changes: dict[str, Any], points: list[KillPoint]
) -> None:
    changes = {**changes, "steps": STEPS, "checkpoint": {"every": EVERY, **changes.get("checkpoint", {})}}
    wanted = unbroken(changes)
    run = make_run(changes).start()
    killer = Killer(run)
    for point in points:
        killer.strike(point)
    assert run.wait() == 0, run.console[-4000:]
    assert run.fingerprint() == wanted.fingerprint
    assert run.trace() == wanted.trace
    assert sorted(wanted.trace) == list(range(1, STEPS + 1))


def test_kills_of_each_kind_leave_no_trace(make_run: Any, unbroken: Callable[..., Any]) -> None:
    points = [
        KillPoint("step", 6, "rank 0"),
        KillPoint("data", 14, "launcher"),
    ]
    check_kills(make_run, unbroken, {}, points)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("seed", "changes"),
    [
        (1, {"distributed": {"engine": "deepspeed", "zero_stage": 1}}),
        (2, {"distributed": {"engine": "deepspeed", "zero_stage": 2, "precision": "bf16"}}),
        (3, {"distributed": {"engine": "deepspeed", "zero_stage": 3}, "micro_batch_size": 1}),
        (4, {"distributed": {"engine": "torch"}, "checkpoint": {"asynchronous": False}}),
    ],
    ids=["zero1", "zero2-bf16", "zero3-accumulation", "torch-synchronous"],
)
def test_seeded_kills_leave_no_trace(
    make_run: Any, unbroken: Callable[..., Any], seed: int, changes: dict[str, Any]
) -> None:
    """Six points each: 24 in all."""
    check_kills(make_run, unbroken, changes, seeded_points(seed, 6))


def test_seeded_points_cover_every_place_and_victim() -> None:
    points = [point for seed in (1, 2, 3, 4) for point in seeded_points(seed, 6)]
    assert len(points) >= 20
    assert {point.where for point in points} == {"startup", "step", "data", "save", "upload"}
    assert {point.victim for point in points} == {"rank 0", "rank 1", "all", "launcher"}
