"""Checkpoints that somebody beside the run wants to keep: a small file each, which retention reads.

    RUN/checkpoints/keep/NAME.json     {"steps": [3000, 5000], "why": "..."}

Each keeper has a file of its own and rewrites it as its mind changes: nobody has to agree with anybody, and
taking a file away lets its checkpoints go with the next commit. A file that cannot be understood keeps
everything, and the run's log says so: what was to be kept must not be lost to a slip.
"""

from __future__ import annotations

import json
from collections.abc import Iterable

from data_pipeline.errors import NotFound
from data_pipeline.storage.files import list_names, read_text, write_bytes
from data_pipeline.storage.urls import join

FOLDER = "keep"
"""In the folder of the checkpoints, whose own names are step_000000000."""
_ENDING = ".json"


def mark(folder: str, name: str, steps: Iterable[int], why: str) -> None:
    """Keep these steps, and none of those that this keeper wanted before.

    Args:
        folder: that of a run's checkpoints.
        name: of the keeper, a file's name.
        why: for people.
    """
    content = {"steps": sorted(set(steps)), "why": why}
    write_bytes(join(folder, FOLDER, name + _ENDING), json.dumps(content, indent=1).encode())


def marked_steps(folder: str) -> set[int]:
    """Steps that some keeper wants; one listing, and a request for each keeper.

    Raises:
        ValueError: a file is not understood; says which.
        Failure: storage does not answer.
    """
    found: set[int] = set()
    for name in list_names(join(folder, FOLDER)):
        if name.endswith(_ENDING) and not name.startswith("."):
            found |= _steps_of(join(folder, FOLDER, name))
    return found


def _steps_of(url: str) -> set[int]:
    try:
        steps = json.loads(read_text(url))["steps"]
    except NotFound:  # taken away meanwhile
        return set()
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise _not_understood(url) from error
    if not isinstance(steps, list) or not all(type(step) is int for step in steps):
        raise _not_understood(url)
    return set(steps)


def _not_understood(url: str) -> ValueError:
    return ValueError(f'{url} is not like {{"steps": [1000]}}, so nothing is removed; mend or remove it')
