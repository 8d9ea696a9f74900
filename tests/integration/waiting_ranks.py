"""What the ranks do in test_waiting_ranks.py: one is busy or silent, the others wait for it in a
collective."""

from __future__ import annotations

import threading
import time

from trainer.distributed import collectives
from trainer.distributed.env import DistributedEnv
from trainer.reliability.peers import peer_phases
from trainer.reliability.watchdog import Phase, Watchdog

WATCHDOG_S = 1.5
QUICK_STEPS = 4


def wait_for_one(env: DistributedEnv, phase: Phase, seconds: float) -> dict[str, float | bool]:
    """Quick steps; then rank 0 stays in `phase` for `seconds`, and the others meet it in a reduction.

    Whether this rank's watchdog took that for a hang, and after how long.
    """
    hung = threading.Event()
    hung_at: list[float] = []

    def on_hang() -> None:
        hung_at.append(time.monotonic())
        hung.set()

    with Watchdog(WATCHDOG_S, peers=peer_phases(env), grace_s={"data": 60.0}, on_hang=on_hang) as watchdog:
        for step in range(QUICK_STEPS):
            watchdog.beat(step, "step")
            watchdog.beat(step, "data")
            collectives.barrier()
        began = time.monotonic()
        if env.rank == 0:
            watchdog.beat(QUICK_STEPS, phase)
            time.sleep(seconds)
        watchdog.beat(QUICK_STEPS, "step")
        collectives.barrier()
        watchdog.beat(QUICK_STEPS, "data")
        return {"hung": hung.is_set(), "after_s": hung_at[0] - began if hung_at else 0.0}
