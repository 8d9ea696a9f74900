"""The heartbeat board: shared memory in which ranks say that they live and the launcher reads it."""

from __future__ import annotations

import mmap
import os
import struct
import time
from dataclasses import dataclass
from pathlib import Path

BOARD_VARIABLE = "LDM_HEARTBEAT"
"""Environment variable that names the board's file; set for ranks that RankProcess starts."""

_RECORD = struct.Struct("=dddq24s")
_STRIDE = 64
_DEADLINE = struct.Struct("=d")


@dataclass(frozen=True)
class Pulse:
    """What one rank last said. Times are CLOCK_MONOTONIC, which all processes of a host share."""

    deadline: float
    """The rank promised another beat before this time; 0: it has not spoken yet."""
    tick: float
    """When the rank's watchdog thread last ran; a frozen process or a stuck GIL stops it."""
    beat: float
    """When its training loop last beat."""
    step: int
    """Optimizer step it is at."""
    phase: str
    """What it is doing."""


class Board:
    """One fixed record per local rank in a memory-mapped file. No locks: one writer per record."""

    def __init__(self, path: Path, ranks: int, *, create: bool = False) -> None:
        self.path = path
        self.ranks = ranks
        descriptor = os.open(path, os.O_RDWR | (os.O_CREAT if create else 0), 0o600)
        try:
            if create:
                os.ftruncate(descriptor, _STRIDE * ranks)
            self._memory = mmap.mmap(descriptor, _STRIDE * ranks)
        finally:
            os.close(descriptor)
        if create:
            self.clear()  # never by truncating: somebody may have the file mapped

    def clear(self) -> None:
        """Forget every rank, before a restart."""
        self._memory[:] = bytes(len(self._memory))

    def write(self, rank: int, *, deadline: float, step: int, phase: str) -> None:
        """Record a beat of the training loop."""
        now = time.monotonic()
        name = phase.encode("ascii")[:24]
        # The deadline, all that the launcher's verdict needs, is one aligned 8-byte store.
        _RECORD.pack_into(self._memory, rank * _STRIDE, deadline, now, now, step, name)

    def extend(self, rank: int, deadline: float) -> None:
        """Put the deadline of a rank's last beat off: it waits for a peer that is busy."""
        _DEADLINE.pack_into(self._memory, rank * _STRIDE, deadline)

    def tick(self, rank: int) -> None:
        """Record that the process is alive, whatever its loop does."""
        _DEADLINE.pack_into(self._memory, rank * _STRIDE + 8, time.monotonic())

    def read(self, rank: int) -> Pulse:
        """What this rank last said."""
        deadline, tick, beat, step, phase = _RECORD.unpack_from(self._memory, rank * _STRIDE)
        return Pulse(deadline, tick, beat, step, phase.rstrip(b"\0").decode("ascii", "replace"))

    def close(self) -> None:
        """Unmap the file."""
        self._memory.close()


def board_from_environment(local_rank: int) -> Board | None:
    """The board that the launcher set up, if it was one of ours that started this process."""
    path = os.environ.get(BOARD_VARIABLE)
    if path is None:
        return None
    ranks = os.stat(path).st_size // _STRIDE
    assert local_rank < ranks, (local_rank, ranks)
    return Board(Path(path), ranks)
