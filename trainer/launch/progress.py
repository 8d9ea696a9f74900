"""How far a run is, read from its run folder by processes that are not its ranks."""

from __future__ import annotations

import json
import re
from typing import Any

from data_pipeline.storage.urls import filesystem as open_filesystem

_TAIL_BYTES = 65_536
_MANIFEST = re.compile(r"/step_(\d+)/manifest\.json$")


def latest_record(run_dir: str) -> dict[str, Any] | None:
    """Newest record of losses and rates, None when there is none yet or storage cannot be read.

    Under a remote run folder records become visible when the trainer flushes them, at checkpoints.
    """
    filesystem, root = open_filesystem(run_dir)
    folder = f"{root.rstrip('/')}/logs"
    try:
        names = [name for name in filesystem.ls(folder, detail=False) if name.endswith(".jsonl")]
        if not names:
            return None
        newest = max(names)
        start = max(0, int(filesystem.size(newest)) - _TAIL_BYTES)
        text = filesystem.cat_file(newest, start=start).decode("utf-8", "replace")
    except OSError:
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
    filesystem, root = open_filesystem(run_dir)
    root = root.rstrip("/")
    try:
        manifests = filesystem.glob(f"{root}/checkpoints/step_*/manifest.json")
    except OSError:
        return None
    steps = [int(found[1]) for name in manifests if (found := _MANIFEST.search(f"/{name}"))]
    if not steps:
        return None
    newest = max(steps)
    return newest, f"{run_dir.rstrip('/')}/checkpoints/step_{newest:09d}"
