"""Where a step's time goes, measured without stopping the device; images per second and memory with it."""

from __future__ import annotations

import json
import logging
import resource
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from data_pipeline.processes import process_age_s
from trainer.distributed import collectives

START_VARIABLE = "LDM_START_REPORT"
"""Environment variable that names the file for rank 0's `StartTimer`."""

logger = logging.getLogger(__name__)


class StepTimer:
    """Adds up seconds per phase. On CUDA by events, read only in `take`; on the CPU by the clock.

    The host waits for data while the device has work queued. The event before that wait happens when the work
    is done, the one after it at once, or behind the work: between them the device had nothing to do.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._seconds: dict[str, float] = defaultdict(float)
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Time the enclosed work as part of `phase`."""
        if not self._cuda:
            started = time.perf_counter()
            yield
            self._seconds[phase] += time.perf_counter() - started
            return
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        yield
        end.record()
        self._events.append((phase, begin, end))

    def take(self) -> dict[str, float]:
        """Seconds per phase since the last call; on CUDA this waits for the device."""
        if self._events:
            torch.cuda.synchronize()
        for phase, begin, end in self._events:
            self._seconds[phase] += begin.elapsed_time(end) / 1000
        taken = dict(self._seconds)
        self._events.clear()
        self._seconds.clear()
        return taken


class StartTimer:
    """Where the time from the start of this process to its first optimizer step goes; told once.

    report: file that gets the same as JSON, for whoever started this process; none: only the log is told.
    """

    def __init__(self, report: str | None = None) -> None:
        self._report = report
        self._device: torch.device | None = None
        self._age = 0.0
        self._parts: dict[str, float] = {}

    def mark(self, part: str) -> None:
        """Everything since the last mark, or since the process began, was `part`."""
        age = process_age_s()
        self._parts[part] = self._parts.get(part, 0.0) + age - self._age
        self._age = age

    def first_step(self, device: torch.device) -> None:
        """Wait for the device, and write the parts into the log. Later calls do nothing."""
        if self._device is not None:
            return
        self._device = device
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        self.mark("first step")
        parts = ", ".join(f"{part} {seconds:.1f} s" for part, seconds in self._parts.items())
        logger.info("first step after %.1f s: %s", self._age, parts)
        if self._report is not None:
            self._write(Path(self._report))

    def _write(self, report: Path) -> None:
        facts = {"time": time.time(), "age": self._age, "parts": self._parts}
        partial = report.with_name(report.name + ".partial")
        try:
            partial.write_text(json.dumps(facts) + "\n", encoding="utf-8")
            partial.replace(report)
        except OSError as error:  # it is for people; training goes on
            logger.debug("%s could not be written: %s", report, error)


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
