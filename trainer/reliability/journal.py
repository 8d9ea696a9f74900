"""The incidents of a run, stored beside its checkpoints, since older checkpoints do not know them."""

from __future__ import annotations

import json
from typing import Any

from data_pipeline.errors import NotFound
from data_pipeline.storage.files import read_bytes
from data_pipeline.storage.large import write_whole
from data_pipeline.storage.urls import join

_NAME = "healing.json"


def write_journal(run_dir: str, journal: list[dict[str, Any]]) -> None:
    """Store all incidents so far, whole or not at all.

    Raises:
        UserError, RetryableFault: it does not work; the run must not go back without it.
    """
    write_whole(join(run_dir, _NAME), json.dumps(journal).encode())


def read_journal(run_dir: str) -> list[dict[str, Any]]:
    """Stored incidents; none when there is no file."""
    try:
        journal: list[dict[str, Any]] = json.loads(read_bytes(join(run_dir, _NAME)))
    except NotFound:
        return []
    return journal
