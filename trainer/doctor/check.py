"""One line of the doctor's table, and how ranks agree on it."""

from __future__ import annotations

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


def on_every_rank(name: str, remedy: str, examine: Callable[[], str]) -> Check:
    """Run something without collectives on every rank; it passes if it raises nowhere.

    examine: returns the detail (rank 0's is shown), or raises with a sentence. Collective.
    """
    try:
        own = (True, examine())
    except Exception as error:  # noqa: BLE001 - whatever is wrong with a machine belongs in the table
        own = (False, f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
    answers = collectives.all_gather_object(own)
    failed = [rank for rank, (passed, _) in enumerate(answers) if not passed]
    if not failed:
        return Check(name, True, answers[0][1], remedy)
    ranks = ", ".join(map(str, failed[:8])) + (", ..." if len(failed) > 8 else "")
    where = f"rank {ranks}" if len(answers) > 1 else ""
    return Check(name, False, f"{where}: {answers[failed[0]][1]}".removeprefix(": "), remedy)
