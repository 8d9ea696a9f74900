"""The writer that works in the training process; the background one has the same methods."""

from __future__ import annotations

from typing import Protocol

from data_pipeline.errors import Failure
from trainer.checkpoint.host_buffer import HostBuffer
from trainer.checkpoint.manifest import StoredFile
from trainer.checkpoint.writer import Job, write_commit, write_shard


class Writer(Protocol):
    """Writes one checkpoint at a time from a host buffer."""

    def submit(self, job: Job, buffer: HostBuffer) -> None:
        """Begin. The previous job must have been waited for."""
        ...

    def shard_result(self) -> Failure | None:
        """Wait until this rank's shard is stored and the buffer is free; what went wrong, if anything."""
        ...

    def commit_result(self) -> Failure | None:
        """On rank 0: wait for the commit, which needs the other ranks' shards."""
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

    def submit(self, job: Job, buffer: HostBuffer) -> None:
        """Write the shard at once."""
        self._job, self._stored, self._failure = job, None, None
        try:
            self._stored = write_shard(job, buffer.view[: job.plan.data_bytes])
        except Failure as failure:
            self._failure = failure

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
            write_commit(job, self._stored)
        except Failure as failure:
            return failure
        return None

    def close(self) -> None:
        """Nothing runs beside the caller."""
