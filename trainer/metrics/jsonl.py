"""One JSON line per record, appended to a local file, or kept in growing objects on S3."""

from __future__ import annotations

import errno
import json
import logging
import math
import os
import re
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

from data_pipeline.errors import Failure
from data_pipeline.storage.files import cut_torn_line, list_names, read_bytes, read_tail, write_bytes
from data_pipeline.storage.urls import is_local, join, local_path

logger = logging.getLogger(__name__)

RECORDS = "metrics.jsonl"
MEASURED_BY = "measured_by"
"""Key of what figures have to share to be compared; its `networks` are those of `evaluation.networks`."""
SEND_EVERY_S = 60.0
"""Seconds between uploads."""
SEGMENT_BYTES = 1_000_000
"""Size from which on a remote object is left as it is and the next begun: what it costs stays bounded."""
_FILE = re.compile(r"metrics(-\d+)*\.jsonl")
_LAST_TRIES = 10
"""Of the upload at the end of a run: about twenty seconds."""


class JSONLWriter:
    """Writes `logs/metrics.jsonl` under a local run folder; under a remote one, which cannot append,
    `logs/metrics-START-STEP.jsonl` objects: when this writer began, in milliseconds, and the step of the
    first record. A restart from the same step must not write over what the start before it recorded.

    A folder that takes none, remote or local (full, say), keeps nobody from training: records wait in memory.
    Whether the run can go on, its checkpoints decide, which all ranks write.
    """

    def __init__(self, run_dir: str) -> None:
        self._folder = join(run_dir, "logs")
        self._file: Path | None = None
        if is_local(run_dir):
            self._file = Path(local_path(self._folder)) / RECORDS
            self._file.parent.mkdir(parents=True, exist_ok=True)
            cut_torn_line(self._file)
        self._stuck = False
        self._begun = time.time_ns() // 1_000_000
        self._lines: list[str] = []
        self._sent = time.monotonic()
        # A thread, because storage that hangs must not hang the step.
        self._sender = ThreadPoolExecutor(1, thread_name_prefix="jsonl")
        self._sending: Future[int] | None = None

    def write(self, record: dict[str, Any]) -> None:
        """Add one record: on disk at once, in a remote folder within about a minute."""
        self._lines.append(line_of(record))
        if self._file is not None or time.monotonic() - self._sent > SEND_EVERY_S:
            self.flush()

    def flush(self, *, tries: int = 1) -> None:
        """Store what is not yet: of a remote folder beside training, unless a transfer is under way."""
        if self._file is not None:
            self._append(self._file)
            return
        if self._sending is not None:
            if not self._sending.done():
                return
            del self._lines[: self._sending.result()]
            self._sending = None
        if self._lines:
            self._sent = time.monotonic()
            self._sending = self._sender.submit(self._send, list(self._lines), tries)

    def settle(self) -> None:
        """Wait for the transfer that is under way, if there is one."""
        if self._sending is not None:
            wait([self._sending])

    def close(self) -> None:
        """Wait until everything is stored; say so when it cannot be."""
        self.settle()
        self.flush(tries=_LAST_TRIES)
        self._sender.shutdown()

    def _append(self, path: Path) -> None:
        try:
            if self._stuck:
                cut_torn_line(path)
            with path.open("ab", buffering=0) as file:
                while self._lines:
                    line = f"{self._lines[0]}\n".encode()
                    if file.write(line) < len(line):
                        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
                    del self._lines[0]
            self._stuck = False
        except OSError as error:
            if not self._stuck:
                logger.warning("the last records are not stored yet: %s", error)
            self._stuck = True

    def _send(self, lines: list[str], tries: int) -> int:
        """How many lines lie in an object that is left as it is from now on."""
        url = join(self._folder, f"metrics-{self._begun:013d}-{json.loads(lines[0])['step']:08d}.jsonl")
        text = "\n".join(lines) + "\n"
        try:
            write_bytes(url, text.encode(), tries=tries)
        except Failure as error:
            logger.warning("the last records are not stored yet: %s", error)
            return 0
        return len(lines) if len(text) > SEGMENT_BYTES else 0


def line_of(record: Mapping[str, Any]) -> str:
    """A record as strict JSON, which has no NaN and no infinity: they become texts."""
    strict = {k: str(v) if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
    return json.dumps(strict, allow_nan=False)


def read_records(run_dir: str, most_bytes: int | None = None) -> list[dict[str, Any]]:
    """Records of a run, losses and events alike, in the order in which they were made, wherever it lies.

    Args:
        most_bytes: of the newest; unset: all. Lines that are cut or torn are left out.
    """
    folder, left = join(run_dir, "logs"), most_bytes
    parts: list[str] = []
    for name in reversed(list_names(folder)):
        if not _FILE.fullmatch(name) or left == 0:
            continue
        url = join(folder, name)
        data = read_bytes(url) if left is None else read_tail(url, left)
        left = None if left is None else max(0, left - len(data))
        parts.insert(0, data.decode("utf-8", "replace"))
    found = []
    for line in "\n".join(parts).splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and isinstance(record.get("step"), int):
            found.append(record)
    # Earlier versions named remote objects by steps alone, and a run that went back wrote lower ones later.
    return found if is_local(run_dir) else sorted(found, key=lambda record: record.get("time", 0))
