"""One line of the doctor's table, and how ranks agree on it."""

from __future__ import annotations

import socket
from collections.abc import Callable
from dataclasses import dataclass

from trainer.distributed import collectives


@dataclass(frozen=True)
class Check:
    """What was looked at, whether it is well, what was measured, and what to do if it is not."""

    name: str
    passed: bool
    detail: str
    remedy: str = ""
    machine: bool = False
    """Whether a failure is that of some machines, which a start on others may not meet."""


def on_every_rank(name: str, remedy: str, examine: Callable[[], str], *, askers: int = 0) -> Check:
    """Run something without collectives on every rank; it passes if it raises nowhere.

    Args:
        examine: returns the detail (rank 0's is shown), or raises with a sentence. Collective.
        askers: how many ranks really look, where what only some of them find is those machines' fault.
    """
    try:
        own = (True, examine())
    except Exception as error:  # noqa: BLE001 - whatever is wrong with a machine belongs in the table
        own = (False, f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
    answers = collectives.all_gather_object((*own, socket.gethostname()))
    failed = [rank for rank, (passed, _, _) in enumerate(answers) if not passed]
    if not failed:
        return Check(name, True, answers[0][1], remedy)
    ranks = ", ".join(f"{rank} ({answers[rank][2]})" for rank in failed[:8]) + (
        ", ..." if len(failed) > 8 else ""
    )
    where = f"rank {ranks}" if len(answers) > 1 else ""
    machine = len(failed) < askers
    return Check(name, False, f"{where}: {answers[failed[0]][1]}".removeprefix(": "), remedy, machine)
