"""A run seen from outside: its progress, from its run folder, and the ranks of a local one, from /proc."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from data_pipeline.errors import Failure
from data_pipeline.storage.urls import join
from trainer.checkpoint.catalogue import checkpoints_url, folder_name, is_committed, steps_found
from trainer.metrics.jsonl import read_records
from trainer.reliability.heartbeat import BOARD_VARIABLE, Board, Pulse

_TAIL_BYTES = 65_536


def latest_record(run_dir: str) -> dict[str, Any] | None:
    """Newest record of losses and rates, None when there is none yet or storage cannot be read.

    Of a remote run folder it may be a minute old.
    """
    try:
        records = read_records(run_dir, _TAIL_BYTES)
    except Failure:
        return None
    return next((record for record in reversed(records) if "loss" in record), None)


def newest_checkpoint(run_dir: str) -> tuple[int, str] | None:
    """(step, folder URL) of the newest committed checkpoint, None when there is none."""
    folder = checkpoints_url(run_dir)
    try:
        newest = next((step for step in steps_found(folder) if is_committed(folder, step)), None)
    except Failure:
        return None
    return None if newest is None else (newest, join(folder, folder_name(newest)))


class LocalRun:
    """The ranks of a running local launcher, found through /proc. Reads only.

    launcher: process id of `ldm train`. Works for processes of the same user, on Linux.
    """

    def __init__(self, launcher: int) -> None:
        self._launcher = launcher
        self._board: Board | None = None

    def ranks(self) -> dict[int, int]:
        """Process id by rank, of the ranks there are now; none between two attempts."""
        tasks = Path(f"/proc/{self._launcher}/task/{self._launcher}/children")
        found = {}
        for pid in _read(tasks).split():
            entries = _read(Path(f"/proc/{pid}/environ")).split("\0")
            environment = dict(entry.split("=", 1) for entry in entries if "=" in entry)
            if BOARD_VARIABLE in environment:
                found[int(environment["RANK"])] = int(pid)
                if self._board is None:
                    path = Path(environment[BOARD_VARIABLE])
                    self._board = Board(path, int(environment["WORLD_SIZE"]))
        return found

    def pulse(self, rank: int) -> Pulse | None:
        """What a rank last said; None if it has not spoken yet. Cheap once the ranks are known."""
        if self._board is None:
            self.ranks()
        if self._board is None:
            return None
        pulse = self._board.read(rank)
        return pulse if pulse.beat else None


def _read(path: Path) -> str:
    """Content of a file under /proc; empty once its process is gone."""
    try:
        return path.read_bytes().decode("utf-8", "replace")
    except (FileNotFoundError, ProcessLookupError):
        return ""
