"""Images per second, share of time spent waiting for data, seconds per phase, memory."""

from __future__ import annotations

import resource
import time

import torch

from trainer.distributed import collectives
from trainer.metrics.timer import StepTimer


class Throughput:
    """Figures of the interval since the last reading, as this rank sees them."""

    def __init__(self, global_batch_size: int) -> None:
        self._global_batch_size = global_batch_size
        self._ranks = collectives.world_size()
        self._last: tuple[int, float] | None = None

    def read(self, step: int, timer: StepTimer) -> dict[str, float]:
        """Figures up to optimizer step `step`; rates from the second reading on (the first warms up)."""
        now, phases = time.perf_counter(), timer.take()
        record = {"memory_gib": _memory_gib()}
        if self._last is not None:
            steps, seconds = step - self._last[0], now - self._last[1]
            if steps > 0:
                rate = steps * self._global_batch_size / seconds
                record |= {
                    "images_per_s": rate,
                    "images_per_s_per_rank": rate / self._ranks,
                    "step_s": seconds / steps,
                    "data_wait": phases.get("data", 0.0) / seconds,
                    **{f"time/{phase}_s": total / steps for phase, total in phases.items()},
                }
        self._last = (step, now)
        return record


def _memory_gib() -> float:
    """Peak device memory, or peak resident memory of the process on the CPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
