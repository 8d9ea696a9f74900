"""Asking a running job for a clean stop or for a profile, and waiting until it has done so."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

from data_pipeline.errors import Failure, RetryableFault, UserError
from data_pipeline.storage.files import exists, list_names, remove_file
from data_pipeline.storage.urls import is_local, join
from trainer.operation.standing import Standing, standing
from trainer.reliability.job import is_gone
from trainer.reliability.lease import holder
from trainer.reliability.requests import (
    ask_for_profile,
    ask_for_stop,
    profile_url,
    profiles_url,
    stop_url,
)

Tell = Callable[[str], None]
"""Takes one line for a person."""
_LOOK_S = {True: 0.5, False: 3.0}
"""Seconds between looks, by whether the folder is on this machine."""
_TELL_S = 30.0


@dataclass(frozen=True)
class Patience:
    """How long an answer is waited for."""

    limit_s: float = math.inf

    def __post_init__(self) -> None:
        """Raise UserError for what is no number of seconds."""
        if not self.limit_s >= 0:
            raise UserError(f"--wait {self.limit_s} is no time to wait; give seconds, or no number for ever.")

    def until(self, answered: Callable[[], bool], run_dir: str, tell: Tell, waiting: str) -> bool:
        """Look again and again; whether it was answered in time."""
        began = told = time.monotonic()
        while not _quietly(answered):
            now = time.monotonic()
            if now - began > self.limit_s:
                return False
            if now - told > _TELL_S:
                told = now
                tell(f"{waiting}, for {now - began:.0f} s by now")
            time.sleep(_LOOK_S[is_local(run_dir)])
        return True


def _quietly(look: Callable[[], bool]) -> bool:
    try:
        return look()
    except RetryableFault:
        return False  # storage that is away for a moment


def stop(run_dir: str, patience: Patience | None, tell: Tell) -> bool:
    """Ask for a clean stop; with patience, whether the run has ended by its end.

    Raises:
        UserError: there is no run, or its folder cannot be written to.
    """
    found = standing(run_dir)
    if found.state in ("stopped", "done"):
        tell(f"nothing to stop: {found.said}.")
        return True
    ask_for_stop(run_dir)
    if found.state in ("gone", "left"):
        tell(
            f"{found.said}. The request stays in {stop_url(run_dir)}: whoever starts this run next saves and "
            f"leaves after one step; `ldm stop {run_dir} --cancel` takes it back."
        )
        return True
    at = "" if found.step is None else f" (step {found.step:,} at its newest record)"
    tell(f"asked for a stop{at}: the run saves at its next step boundary and ends with code 77, for good.")
    if found.state == "silent":
        tell(f"{found.said}; it stops once it goes on, or when it is started again.")
    if patience is None:
        return True
    ended = patience.until(lambda: _has_left(run_dir), run_dir, tell, "waiting for the run to save and leave")
    if not ended:
        tell(f"the run has not ended yet; the request stays in {stop_url(run_dir)}.")
        return False
    after = standing(run_dir)
    saved = (
        ""
        if after.checkpoint_step is None
        else f"; the newest checkpoint is of step {after.checkpoint_step:,}"
    )
    tell(f"{after.said}{saved}.")
    return after.state in ("stopped", "done")


def _has_left(run_dir: str) -> bool:
    """Whether the run's lease is given back, or its process gone."""
    tenure = holder(run_dir)
    return tenure is None or tenure.released or is_gone(tenure.process)


def cancel_stop(run_dir: str, tell: Tell) -> None:
    """Take a request back that nobody has followed yet."""
    if not exists(stop_url(run_dir)):
        tell(f"no stop is asked for in {run_dir}.")
        return
    remove_file(stop_url(run_dir))
    tell("taken back, unless a running job has seen it already: that one stops.")


def profile(
    run_dir: str, *, steps: int, ranks: tuple[int, ...], patience: Patience | None, tell: Tell
) -> bool:
    """Ask for a profile of the next steps; with patience, whether it lies there by its end.

    Raises:
        UserError: no run is running there, or it has no such ranks.
    """
    found = standing(run_dir)
    if found.state not in ("running", "starting", "silent"):
        raise UserError(f"there is nothing to profile in {run_dir}: {found.said}.")
    _check_ranks(found, ranks)
    request = ask_for_profile(run_dir, steps=steps, ranks=ranks)
    whose = ", ".join(map(str, ranks))
    tell(
        f"asked for a profile of {steps} step(s) of rank(s) {whose}; it will lie in {profiles_url(run_dir)}."
    )
    if found.state == "silent":
        tell(f"{found.said}; it is profiled once it goes on.")
    if patience is None:
        return True
    files: list[str] = []

    def complete() -> bool:
        files[:] = _profile_files(run_dir, request.name)
        if len(files) == len(set(ranks)):
            return True
        if _has_left(run_dir):
            raise UserError(f"the run ended before its profile was complete: {standing(run_dir).said}.")
        return False

    if patience.until(complete, run_dir, tell, "waiting for the steps to be made and written"):
        for file in files:
            tell(file)
        return True
    seen = "nobody has seen the request yet" if exists(profile_url(run_dir)) else "the run has begun"
    tell(f"the profile is not there yet ({seen}).")
    return False


def _check_ranks(found: Standing, ranks: tuple[int, ...]) -> None:
    absent = [rank for rank in ranks if found.ranks is not None and rank >= found.ranks]
    if absent:
        raise UserError(
            f"the run has ranks 0 to {(found.ranks or 1) - 1}, and none {absent[0]}; choose others."
        )


def _profile_files(run_dir: str, name: str) -> list[str]:
    """Tables of a request that are there; the trace of each lies beside it by then."""
    folder = profiles_url(run_dir)
    try:
        made = [step for step in list_names(folder) if step.endswith(f"_{name}")]
        return [
            join(folder, step, f)
            for step in made
            for f in list_names(join(folder, step))
            if f.endswith(".txt")
        ]
    except Failure:
        return []
