"""What driver, controller and workers of one Ray run tell each other; a plain class, run as an actor."""

from __future__ import annotations

import time
from collections.abc import Mapping
from enum import StrEnum

from trainer.config.run import Config
from trainer.exit_codes import ExitCode


class RunRequest(StrEnum):
    """What the ranks are asked for. All of them mean: save at the next step, and leave."""

    NONE = ""
    RESIZE = "resize"
    """The worker group starts again with another number of workers."""
    PREEMPT = "preempt"
    """`ray job stop`: the job ends, and the same command resumes it."""


class RunBoard:
    """State of a run across its worker groups.

    max_faults: worker groups that may die in a row without getting further than the one before.
    """

    def __init__(self, max_faults: int) -> None:
        self._max_faults = max_faults
        self._attempt = 0
        self._request = RunRequest.NONE
        self._planned = True
        self._step = 0
        self._step_before = -1
        self._faults = 0
        self._expected = 0
        self._codes: dict[int, int] = {}
        self._heard = time.monotonic()

    def begin(self, ranks: int) -> tuple[int, bool]:
        """A worker group starts: (its number, whether to give up instead)."""
        if not self._planned:
            self._faults = 1 if self._step > self._step_before else self._faults + 1
        self._step_before = self._step
        self._planned = False
        self._attempt += 1
        self._expected = ranks
        self._codes = {}
        if self._request is RunRequest.RESIZE:
            self._request = RunRequest.NONE
        return self._attempt, self._faults > self._max_faults

    def tick(self, step: int) -> tuple[str, dict[int, int]]:
        """Called by every worker every other second: (request, exit codes so far by rank)."""
        self._step = max(self._step, step)
        self._heard = time.monotonic()
        return self._request, dict(self._codes)

    def ended(self, rank: int, code: int) -> None:
        """A rank's process has ended."""
        self._codes[rank] = code
        if code in (ExitCode.PREEMPTED, ExitCode.STOPPED):
            self._planned = True

    def ask(self, request: str) -> None:
        """Ask all ranks to save and leave; a stop is never taken back by a resize."""
        if self._request is not RunRequest.PREEMPT:
            self._request = RunRequest(request)

    def state(self) -> dict[str, object]:
        """For the driver, the controller and tests."""
        return {
            "attempt": self._attempt,
            "request": str(self._request),
            "step": self._step,
            "faults": self._faults,
            "ranks": self._expected,
            "codes": dict(self._codes),
            "quiet_s": time.monotonic() - self._heard,
        }


def useful_ranks(config: Config, workers: int) -> int:
    """The fewest ranks whose step is as short as that of all workers at hand.

    Of 2048 samples, 504 ranks have 5 or 4 each, and so have 410: a node that comes or goes in between is no
    reason to start anew.
    """
    return config.sharing(min(workers, config.most_ranks)).fewest_ranks


def forbids_restart(codes: Mapping[int, int]) -> bool:
    """Whether some rank has ended in a way that ends the run for all."""
    final = (ExitCode.USER_ERROR, ExitCode.FATAL, ExitCode.ABORTED)
    return any(code in final for code in codes.values())
