"""How far a run is, read from its run folder by processes that are not its ranks."""

from __future__ import annotations

import json
from typing import Any

from data_pipeline.errors import Failure
from data_pipeline.storage.files import list_names, read_tail
from data_pipeline.storage.urls import join
from trainer.checkpoint.catalogue import checkpoints_url, folder_name, is_committed, steps_found

_TAIL_BYTES = 65_536


def latest_record(run_dir: str) -> dict[str, Any] | None:
    """Newest record of losses and rates, None when there is none yet or storage cannot be read.

    Under a remote run folder records become visible when the trainer flushes them, at checkpoints.
    """
    folder = join(run_dir, "logs")
    try:
        names = [name for name in list_names(folder) if name.endswith(".jsonl")]
        if not names:
            return None
        text = read_tail(join(folder, max(names)), _TAIL_BYTES).decode("utf-8", "replace")
    except Failure:
        return None
    for line in reversed(text.splitlines()):
        try:
            record = json.loads(line)
        except ValueError:
            continue  # the first line of the tail may be cut, the last one half written
        if isinstance(record, dict) and "loss" in record:
            return record
    return None


def newest_checkpoint(run_dir: str) -> tuple[int, str] | None:
    """(step, folder URL) of the newest committed checkpoint, None when there is none."""
    folder = checkpoints_url(run_dir)
    try:
        newest = next((step for step in steps_found(folder) if is_committed(folder, step)), None)
    except Failure:
        return None
    return None if newest is None else (newest, join(folder, folder_name(newest)))
