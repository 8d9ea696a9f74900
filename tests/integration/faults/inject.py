"""`ldm train CONFIG` whose ranks carry a fault: `python inject.py FAULT CONFIG`, or as a rank itself.

Faults that come from inside a process (a NaN, a spike, a clock that jumps) cannot be sent as signals.
This script starts the real command and makes the real ranks run through `become_rank` below. Every step is
stretched, and none is begun beyond the one that the test holds the run at (`FaultyRun.hold`): however crowded
the machine, a test finds the tiny run where it wants to hurt it.
"""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

PACE_S = 0.1
HELD_S = 0.02


def pace() -> None:
    """Stretch every step, and begin none where the run is held; a rank that is held does not hang."""
    from trainer.reliability.watchdog import Watchdog
    from trainer.stages.diffusion import DiffusionStage

    train_step, enter = DiffusionStage.train_step, Watchdog.__enter__
    watching: list[Watchdog] = []

    def entered(self: Watchdog) -> Watchdog:
        watching[:] = [self]
        return enter(self)

    def train(self: Any, *rest: Any) -> Any:
        time.sleep(PACE_S)
        while (dog := watching[0])._step >= held_at():
            dog.beat(dog._step, dog._phase)
            time.sleep(HELD_S)
        return train_step(self, *rest)

    Watchdog.__enter__ = entered  # type: ignore[method-assign]
    DiffusionStage.train_step = train  # type: ignore[method-assign]


def held_at() -> float:
    """Steps after which no more is begun."""
    try:
        return int(Path(os.environ["FAULT_HOLD"]).read_text())
    except FileNotFoundError:
        return math.inf


def poison(factor: float) -> Callable[[], None]:
    """Multiply the loss (and so the gradient) of every batch with a poisoned ordinal."""

    def install() -> None:
        from trainer.stages.diffusion import DiffusionStage

        whole = DiffusionStage._loss
        # The samples of the fault's step, noted by the run itself the first time it gets there.
        note = Path(os.environ["FAULT_NOTE"])
        step = int(os.environ["FAULT_STEP"])
        train_step = DiffusionStage.train_step

        def train(self: Any, batch: Any, now: int, *rest: Any) -> Any:
            own = Path(f"{note}.{os.environ['RANK']}")
            if now == step and not own.exists():
                own.write_text(",".join(map(str, batch.ordinals.tolist())))
            return train_step(self, batch, now, *rest)

        def loss(self: Any, micro: Any, *rest: Any) -> Any:
            value, error = whole(self, micro, *rest)
            own = Path(f"{note}.{os.environ['RANK']}")
            bad = set(map(int, own.read_text().split(","))) if own.exists() else set()
            return (value * factor if bad & set(micro.ordinals.tolist()) else value), error

        DiffusionStage.train_step = train  # type: ignore[method-assign]
        DiffusionStage._loss = loss  # type: ignore[method-assign]

    return install


def jump_clock() -> None:
    """The wall clock leaps a day ahead, then two days back, while the run goes on."""
    real, started = time.time, time.monotonic()

    def leaping() -> float:
        elapsed = time.monotonic() - started
        return real() + (0.0 if elapsed < 6 else 86_400.0 if elapsed < 8 else -86_400.0)

    time.time = leaping


FAULTS: dict[str, Callable[[], None]] = {
    "none": lambda: None,
    "nan": poison(float("nan")),
    "spike": poison(1e4),
    "clock": jump_clock,
}


def become_rank(fault: str, arguments: list[str]) -> int:
    """A real rank, with the fault in it."""
    from trainer.launch.rank import main

    pace()
    FAULTS[fault]()
    return main(arguments)


def launch(fault: str, arguments: list[str]) -> int:
    """The real command, with these ranks."""
    from trainer.__main__ import main
    from trainer.launch import local

    local.rank_command = lambda config, task: [  # type: ignore[assignment]
        *(sys.executable, __file__, fault, "--rank", str(config), task)
    ]
    return main(["train", *arguments])


if __name__ == "__main__":
    if sys.argv[2] == "--rank":
        sys.exit(become_rank(sys.argv[1], sys.argv[3:]))
    sys.exit(launch(sys.argv[1], sys.argv[2:]))
