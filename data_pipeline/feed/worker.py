"""A loader process: torch-free, hands finished shares over in shared memory, ends with its parent.

    rank (torch, CUDA)                         pipe                  loader process (NumPy, no torch)
    WorkerProcess(config)  ------------------ config ------------->  imports, storage client
    begin(task)            ------------------ task --------------->  ShareStream: reads begin
    take()                 <------- FilledShare, slot 0 -----------  fill(slot 0), fill(slot 1), ...
      copies slot 0                                                  ... until no slot is free
    release(0)             ------------------ 0 ------------------>  fill(slot 0) again

The arrays never pass through the pipe: both map one unnamed file of `data.prefetch` slots. So the worker
is at most that many steps ahead, and a position always belongs to a share that has been handed over.
"""

from __future__ import annotations

import mmap
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from multiprocessing.connection import Connection, Pipe
from typing import Any

from data_pipeline.config import DataConfig
from data_pipeline.errors import Failure, WorkerDied, as_failure
from data_pipeline.feed.share import FilledShare, ShareStream
from data_pipeline.feed.task import ShareTask
from data_pipeline.order.turns import Turns
from data_pipeline.processes import children_deaf_to_stops, unnamed_file
from data_pipeline.shards.sources import sources_of
from data_pipeline.storage.client import filesystem

_STOP_TIMEOUT_S = 5.0
_PARENT_CHECK_S = 1.0
_ENDED = (EOFError, BrokenPipeError, ConnectionResetError)
"""The parent has closed the pipe, or is gone."""
_SILENCE_S = 120.0
"""Patience with a worker on top of data.patience_s, after which it tells of an outage by itself."""
_ARENAS = "1"
"""Of glibc's malloc, unless the environment says otherwise. By default each thread has one, in which what is
freed stays: a worker whose threads take turns at windows would hold data.buffer_bytes twice."""


class WorkerProcess:
    """Parent's side: starts one worker and takes its shares in order.

    A fresh interpreter, not a fork: nothing of torch, CUDA or other threads is inherited. Shared memory
    is an unnamed file, so nothing is left behind whatever is killed.
    """

    def __init__(self, config: DataConfig, *, name: str) -> None:
        """Start the interpreter; it imports what reading takes while the parent prepares the task."""
        self.name = name
        self._patience_s = config.patience_s + _SILENCE_S
        self._slots = max(1, config.prefetch)
        self._ends_in_order = False
        self._memory_file = unnamed_file("loader")
        ours, theirs = Pipe(duplex=True)
        self._connection: Connection[Any, Any] = ours
        command = [
            sys.executable,
            "-m",
            "data_pipeline.feed.worker",
            str(theirs.fileno()),
            str(self._memory_file),
        ]
        with children_deaf_to_stops():
            self._process = subprocess.Popen(
                command,
                pass_fds=(theirs.fileno(), self._memory_file),
                stdin=subprocess.DEVNULL,
                env={
                    "MALLOC_ARENA_MAX": _ARENAS,
                    **os.environ,
                    "OMP_NUM_THREADS": "1",
                    "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
                },
            )
        theirs.close()
        self._send(config)

    def begin(self, task: ShareTask) -> None:
        """Hand over the task: shares are produced ahead, as many as there are slots."""
        self._slot_bytes = _slot_bytes(task)
        os.ftruncate(self._memory_file, self._slot_bytes * self._slots)
        self._memory = mmap.mmap(self._memory_file, self._slot_bytes * self._slots)
        self._send((task, self._slots, os.getpid()))
        self._ends_in_order = isinstance(task.order, Turns)

    def take(self) -> tuple[FilledShare, memoryview, int]:
        """Wait for the next share: (share, its memory, slot). Give the slot back with `release`."""
        deadline = time.monotonic() + self._patience_s
        while not self._connection.poll(0.5):
            if time.monotonic() > deadline:
                raise WorkerDied(
                    f"Loader process {self.name} has been silent for {self._patience_s:.0f} s; run the "
                    "same command again to resume."
                )
        try:
            message = self._connection.recv()
        except (EOFError, OSError):
            raise self._died() from None
        if isinstance(message, BaseException):
            raise message
        share, slot = message
        view = memoryview(self._memory)[slot * self._slot_bytes : (slot + 1) * self._slot_bytes]
        return share, view, slot

    def release(self, slot: int) -> None:
        """The share in `slot` has been copied."""
        self._send(slot)

    def _send(self, message: object) -> None:
        try:
            self._connection.send(message)
        except OSError:
            raise self._died() from None

    def _died(self) -> WorkerDied:
        try:
            code = self._process.wait(_STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            code = None
        how = (
            f"by {signal.Signals(-code).name}" if code is not None and code < 0 else f"with exit code {code}"
        )
        return WorkerDied(
            f"Loader process {self.name} ended {how}; when it was killed for memory lower data.workers, "
            "data.prefetch or data.buffer_bytes, then run the same command again."
        )

    def close(self) -> None:
        """End the process; safe to call twice."""
        if self._connection.closed:
            return
        self._connection.close()
        os.close(self._memory_file)
        if self._ends_in_order:  # what it has found out about shards is in no manifest yet
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(_STOP_TIMEOUT_S)
        if self._process.poll() is None:
            self._process.kill()  # it holds nothing else that needs an orderly end, and ignores SIGTERM
            self._process.wait()


def _slot_bytes(task: ShareTask) -> int:
    return -(-task.layout().bytes // mmap.PAGESIZE) * mmap.PAGESIZE


def _serve(connection: Connection[Any, Any], memory: int) -> None:
    config = connection.recv()
    with suppress(Exception):  # met again, and told, when reading
        # the library's import and its client take a while; the reader will ask for the same one
        filesystem(sources_of(config)[0].shards, timeout_s=config.request_timeout_s)
    task, slots, parent = connection.recv()
    threading.Thread(target=_watch_parent, args=(parent,), daemon=True).start()
    slot_bytes = _slot_bytes(task)
    shared = memoryview(mmap.mmap(memory, slot_bytes * slots))
    free = list(range(slots))
    stream = ShareStream(task)
    try:
        while True:
            while not free or connection.poll():
                free.append(connection.recv())
            slot = free.pop(0)
            share = stream.fill(shared[slot * slot_bytes : (slot + 1) * slot_bytes])
            connection.send((share, slot))
    except _ENDED:
        stream.close()
        raise


def _watch_parent(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(_PARENT_CHECK_S)
    os._exit(1)


def main() -> None:
    """Entry of the process: file descriptors of the pipe and of the shared memory."""
    connection: Connection[Any, Any] = Connection(int(sys.argv[1]))
    try:
        _serve(connection, int(sys.argv[2]))
    except _ENDED:
        os._exit(0)
    except BaseException as error:  # noqa: BLE001 - the parent raises it
        if not isinstance(error, Failure):
            sys.excepthook(type(error), error, error.__traceback__)
        try:
            connection.send(as_failure(error, "A loader process failed"))
            connection.close()
        finally:
            # without waiting for reads that are still under way
            sys.stderr.flush()
            os._exit(1)


if __name__ == "__main__":
    main()
