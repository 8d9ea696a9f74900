"""One JSON line per record, appended to a local file, or kept in growing objects on S3."""

from __future__ import annotations

import json
import logging
import math
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fsspec

from data_pipeline.appending import cut_torn_line

logger = logging.getLogger(__name__)

SEND_EVERY_S = 60.0
"""Seconds between the uploads that nobody asks for."""
SEGMENT_BYTES = 1_000_000
"""Size at which a flush leaves a remote object as it is and begins the next: what it costs stays bounded."""


class JSONLWriter:
    """Writes `logs/metrics.jsonl` under a local run folder; under a remote one, which cannot append,
    `logs/metrics-STEP.jsonl` objects named by the step of their first record."""

    def __init__(self, run_dir: str) -> None:
        self._filesystem, root = fsspec.core.url_to_fs(run_dir)
        self._local = "file" in self._filesystem.protocol
        self._folder = f"{root.rstrip('/')}/logs"
        if self._local:
            self._filesystem.makedirs(self._folder, exist_ok=True)
        self._path = f"{self._folder}/metrics.jsonl"
        if self._local:
            cut_torn_line(Path(self._path))
        self._lines: list[str] = []
        self._sent = time.monotonic()
        # A thread, because storage that hangs must not hang the step.
        self._sender = ThreadPoolExecutor(1, thread_name_prefix="jsonl")
        self._sending: Future[None] | None = None

    def write(self, record: dict[str, Any]) -> None:
        """Add one record: on disk at once, in a remote folder within about a minute.

        A remote folder that does not answer keeps nobody from training: the record waits in memory.
        """
        if not self._local and not self._lines:
            self._path = f"{self._folder}/metrics-{record['step']:08d}.jsonl"
        # JSON has no NaN and no infinity: they become texts.
        strict = {
            k: str(v) if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()
        }
        self._lines.append(json.dumps(strict, allow_nan=False))
        if self._local:
            self.flush()
        elif time.monotonic() - self._sent > SEND_EVERY_S and (self._sending is None or self._sending.done()):
            self._sent = time.monotonic()
            self._sending = self._sender.submit(self._try_to_put, self._path, self._text())

    def flush(self) -> None:
        """Make everything written so far durable. Raises what the storage raises."""
        if not self._lines:
            return
        if self._sending is not None:
            self._sending.result()  # an older state of the object must not come last
        text = self._text()
        self._put(self._path, text)
        if self._local or len(text) > SEGMENT_BYTES:
            self._lines.clear()

    def _text(self) -> str:
        return "\n".join(self._lines) + "\n"

    def _put(self, path: str, text: str) -> None:
        with self._filesystem.open(path, "a" if self._local else "w") as file:
            file.write(text)

    def _try_to_put(self, path: str, text: str) -> None:
        try:
            self._put(path, text)
        except Exception as error:  # noqa: BLE001 - whatever the storage library raises
            logger.warning("%s cannot be written now (%s); its records are kept", path, error)
