"""What a person asks of a running job through small files in its run folder: to stop, or for a profile.

    run_dir/STOP       save at the next step boundary, and leave        `ldm stop RUN`, or `touch`
    run_dir/PROFILE    a torch profile of the next few steps            `ldm profile RUN`, or `touch`

Rank 0 looks for both (`preemption.Preemption`), the ranks agree at the next step boundary.
"""

from __future__ import annotations

import json
import time
import uuid
from dataclasses import asdict, dataclass
from typing import Any

from data_pipeline.errors import UserError
from data_pipeline.storage.files import write_bytes
from data_pipeline.storage.urls import join

MOST_STEPS = 100
"""Of a profile: a step of SD2 is some 30,000 events."""
MOST_RANKS = 64
"""Of a profile: each writes a trace of its own."""


@dataclass(frozen=True)
class ProfileRequest:
    """Which steps of which ranks are to be profiled."""

    name: str
    """Distinguishes requests; part of the folder's name."""
    steps: int = 3
    """Optimizer steps, from the next one on."""
    ranks: tuple[int, ...] = (0,)
    """Who writes a trace."""

    def __post_init__(self) -> None:
        if not 1 <= self.steps <= MOST_STEPS:
            raise UserError(f"a profile takes 1 to {MOST_STEPS} steps, not {self.steps}.")
        if not self.ranks or len(self.ranks) > MOST_RANKS or min(self.ranks) < 0:
            raise UserError(f"a profile takes 1 to {MOST_RANKS} ranks, counted from 0, not {self.ranks}.")

    @staticmethod
    def from_bytes(content: bytes) -> ProfileRequest:
        """What lies in the file; an empty one, of `touch`, asks for the defaults.

        Raises:
            UserError: it is something else.
        """
        name = f"{int(time.time()):x}"
        if not content.strip():
            return ProfileRequest(name)
        try:
            given: Any = json.loads(content)
            ranks = tuple(int(rank) for rank in given.get("ranks", (0,)))
            name = "".join(c for c in str(given.get("name", name)) if c.isalnum())[:32]
            return ProfileRequest(name, int(given.get("steps", 3)), ranks)
        except UserError:
            raise
        except (ValueError, TypeError, AttributeError) as error:
            raise UserError(
                f"not a request for a profile ({error}); write one with `ldm profile`."
            ) from error


def stop_url(run_dir: str) -> str:
    """The file that asks for a saved stop."""
    return join(run_dir, "STOP")


def profile_url(run_dir: str) -> str:
    """The file that asks for a profile."""
    return join(run_dir, "PROFILE")


def profiles_url(run_dir: str) -> str:
    """Folder of the profiles that were taken."""
    return join(run_dir, "profiles")


def ask_for_stop(run_dir: str) -> None:
    """Leave the request. Raises UserError or RetryableFault where the folder cannot be written to."""
    write_bytes(stop_url(run_dir), b"")


def ask_for_profile(run_dir: str, *, steps: int, ranks: tuple[int, ...]) -> ProfileRequest:
    """Leave the request, in place of one that nobody has seen yet; raises as `ask_for_stop`."""
    request = ProfileRequest(uuid.uuid4().hex[:6], steps, ranks)
    write_bytes(profile_url(run_dir), json.dumps(asdict(request)).encode())
    return request
