"""One JSON line per record, appended locally, or kept as one growing object per start on S3."""

from __future__ import annotations

import json
import math
from typing import Any

import fsspec


class JSONLWriter:
    """Writes `logs/metrics.jsonl` under a local run folder; under a remote one, which cannot append,
    `logs/metrics-STEP.jsonl`, rewritten at each flush."""

    def __init__(self, run_dir: str, start_step: int) -> None:
        self._filesystem, root = fsspec.core.url_to_fs(run_dir)
        self._local = "file" in self._filesystem.protocol
        folder = f"{root.rstrip('/')}/logs"
        if self._local:
            self._filesystem.makedirs(folder, exist_ok=True)
        self._path = f"{folder}/metrics.jsonl" if self._local else f"{folder}/metrics-{start_step:08d}.jsonl"
        self._lines: list[str] = []

    def write(self, record: dict[str, Any]) -> None:
        """Add one record; it is on disk or S3 after the next `flush` at the latest."""
        # JSON has no NaN and no infinity: they become texts.
        strict = {
            k: str(v) if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()
        }
        self._lines.append(json.dumps(strict, allow_nan=False))
        if self._local:
            self.flush()

    def flush(self) -> None:
        """Make everything written so far durable."""
        if not self._lines:
            return
        text = "\n".join(self._lines) + "\n"
        with self._filesystem.open(self._path, "a" if self._local else "w") as file:
            file.write(text)
        if self._local:
            self._lines.clear()
