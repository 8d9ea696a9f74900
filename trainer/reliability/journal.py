"""The incidents of a run, stored beside its checkpoints, since older checkpoints do not know them."""

from __future__ import annotations

import json
from typing import Any

from data_pipeline.errors import NoShards
from data_pipeline.storage.urls import join, read_bytes
from trainer.checkpoint.storage import write_whole

_NAME = "healing.json"


def write_journal(run_dir: str, journal: list[dict[str, Any]]) -> None:
    """Store all incidents so far, whole or not at all.

    Raises:
        ConfigError, RetryableFault: it does not work; the run must not go back without it.
    """
    write_whole(join(run_dir, _NAME), json.dumps(journal).encode())


def read_journal(run_dir: str) -> list[dict[str, Any]]:
    """Stored incidents; none when there is no file."""
    try:
        journal: list[dict[str, Any]] = json.loads(read_bytes(join(run_dir, _NAME)))
    except NoShards:  # what data_pipeline calls any file that is not there
        return []
    return journal
