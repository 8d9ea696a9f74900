"""The trainer's side of writing: in this process, or through a process of its own that shares the memory."""

from __future__ import annotations

import logging
import os
import queue
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any, Protocol, TypeAlias

from data_pipeline.errors import CONSEQUENCES, Failure, RetryableFault
from data_pipeline.processes import children_deaf_to_stops
from trainer.checkpoint.host_buffer import HostBuffer
from trainer.checkpoint.manifest import StoredFile
from trainer.checkpoint.retirement import Retirement
from trainer.checkpoint.writer import Job, job_to_header, write_commit, write_shard
from trainer.checkpoint.writer_process import receive_frame, send_frame

logger = logging.getLogger(__name__)

_CLOSE_PATIENCE_S = 60.0
_POLL_S = 0.5

Order: TypeAlias = tuple[dict[str, Any], list[bytes]]
"""Header and blobs of one message to the process."""
STOP: Order = ({"order": "stop"}, [])


class Writer(Protocol):
    """Writes one checkpoint at a time from a host buffer."""

    def submit(self, job: Job, buffer: HostBuffer) -> None:
        """Begin. The previous job must have been waited for."""
        ...

    def failed(self) -> bool:
        """Whether it is known by now that the job cannot be completed. Does not wait."""
        ...

    def shard_result(self) -> Failure | None:
        """Wait until this rank's shard is stored and the buffer is free; what went wrong, if anything."""
        ...

    def commit_result(self) -> Failure | None:
        """On rank 0: wait for the commit, which needs the other ranks' shards."""
        ...

    def abandon(self) -> None:
        """Give the job up, since another rank's part of it has failed."""
        ...

    def close(self) -> None:
        """Finish what has been submitted within a bounded time, and go."""
        ...


class InlineWriter:
    """Implements `Writer` without a second process."""

    def __init__(self) -> None:
        self._job: Job | None = None
        self._stored: StoredFile | None = None
        self._failure: Failure | None = None
        self._retirement = Retirement()

    def submit(self, job: Job, buffer: HostBuffer) -> None:
        """Write the shard at once."""
        self._job, self._stored, self._failure = job, None, None
        try:
            self._stored = write_shard(job, buffer.view[: job.plan.data_bytes])
        except Failure as failure:
            self._failure = failure

    def failed(self) -> bool:
        """See `Writer`."""
        return self._failure is not None

    def shard_result(self) -> Failure | None:
        """See `Writer`."""
        return self._failure

    def commit_result(self) -> Failure | None:
        """Commit now: the caller knows that all shards are stored."""
        job, self._job = self._job, None
        if job is None or job.commit is None:
            return None
        assert self._stored is not None
        try:
            write_commit(job, self._stored, self._retirement)
        except Failure as failure:
            return failure
        return None

    def abandon(self) -> None:
        """Nothing runs beside the caller."""
        self._job = None

    def close(self) -> None:
        """Leave old checkpoints that cannot be removed where they are."""
        self._retirement.close()


class BackgroundWriter:
    """Implements `Writer` with a process that shares the host buffer's memory.

    A process rather than a thread: hashing and uploading would fight training for the interpreter.
    It is started with the first job, and anew when it has died. A job is larger than a pipe takes at once
    (SD2's tables are 100 KB for a rank, megabytes for hundreds), so a thread hands it over: training would
    wait until the process has imported what it needs.
    """

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._orders: queue.Queue[Order] = queue.Queue()
        self._answers: queue.Queue[dict[str, Any]] = queue.Queue()
        self._expected: list[str] = []
        self._failure: Failure | None = None  # noticed, and not yet asked for

    def submit(self, job: Job, buffer: HostBuffer) -> None:
        """Hand the job over; returns at once."""
        assert not self._expected, "the previous job has not been waited for"
        header, blobs = job_to_header(job)
        self._failure = None
        self._expected = ["shard", "commit"] if job.commit is not None else ["shard"]
        try:
            if self._process is None or self._process.poll() is not None:
                self._start(buffer)
        except OSError as error:
            self._fail(RetryableFault(f"the checkpoint could not be written: its process is gone ({error})."))
            return
        self._orders.put(({"order": "write", **header}, blobs))

    def failed(self) -> bool:
        """See `Writer`."""
        while self._expected and self._process is not None:
            try:
                answer = self._answers.get_nowait()
            except queue.Empty:
                if self._process.poll() is None or not self._answers.empty():
                    break
                answer = _ended(self._process)
            self._note(answer)
        return self._failure is not None

    def shard_result(self) -> Failure | None:
        """See `Writer`."""
        return self._wait_for("shard")

    def commit_result(self) -> Failure | None:
        """See `Writer`."""
        return self._wait_for("commit")

    def abandon(self) -> None:
        """End the process if it is still at work; the next job starts another."""
        if self._expected and self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None
            self._orders.put(STOP)
        self._expected = []

    def close(self) -> None:
        """Give a submitted job a minute to finish, then end the process."""
        process, self._process = self._process, None
        if process is None:
            return
        deadline = time.monotonic() + _CLOSE_PATIENCE_S
        try:
            while self._expected and process.poll() is None and time.monotonic() < deadline:
                self._note(self._next_answer(process, deadline))
            self._orders.put(STOP)
            process.wait(timeout=5.0)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        if self._expected:
            logger.error("the last checkpoint was not completed; the one before it is intact")
            self._expected = []

    def _start(self, buffer: HostBuffer) -> None:
        self._answers = queue.Queue()
        root = str(Path(__file__).resolve().parents[2])
        paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
        with children_deaf_to_stops():
            self._process = subprocess.Popen(
                [sys.executable, "-m", "trainer.checkpoint.writer_process"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                pass_fds=[buffer.descriptor],
                env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
            )
        threading.Thread(target=_collect, args=(self._process, self._answers), daemon=True).start()
        self._orders.put(STOP)  # for the thread of a process that has died
        self._orders = queue.Queue()
        threading.Thread(target=_hand_over, args=(self._process, self._orders), daemon=True).start()
        self._orders.put(
            ({"order": "memory", "descriptor": buffer.descriptor, "bytes": buffer.num_bytes}, [])
        )

    def _wait_for(self, event: str) -> Failure | None:
        while event in self._expected:
            assert self._process is not None
            self._note(self._next_answer(self._process, None))
        failure, self._failure = self._failure, None
        return failure

    def _next_answer(self, process: subprocess.Popen[bytes], deadline: float | None) -> dict[str, Any]:
        while True:
            try:
                return self._answers.get(timeout=_POLL_S)
            except queue.Empty:
                if process.poll() is not None and self._answers.empty():
                    return _ended(process)
                if deadline is not None and time.monotonic() > deadline:
                    return {"failure": "it took too long"}

    def _note(self, answer: dict[str, Any]) -> None:
        if "failure" not in answer:
            self._expected.remove(answer["event"])
        elif "event" in answer:
            self._fail(CONSEQUENCES[answer["consequence"]](str(answer["failure"])))
        else:
            self._fail(RetryableFault(f"the checkpoint could not be written: {answer['failure']}."))

    def _fail(self, failure: Failure) -> None:
        self._expected = []
        self._failure = failure


def _ended(process: subprocess.Popen[bytes]) -> dict[str, Any]:
    return {"failure": f"its process ended with status {process.returncode}"}


def _hand_over(process: subprocess.Popen[bytes], orders: queue.Queue[Order]) -> None:
    assert process.stdin is not None
    while True:
        order = orders.get()
        try:
            send_frame(process.stdin, *order)  # type: ignore[arg-type]  # is buffered
        except OSError:  # whoever waits for the answer sees that the process is gone
            return
        if order is STOP:
            return


def _collect(process: subprocess.Popen[bytes], answers: queue.Queue[dict[str, Any]]) -> None:
    assert process.stdout is not None
    while (frame := receive_frame(process.stdout)) is not None:  # type: ignore[arg-type]  # is buffered
        answers.put(frame[0])
