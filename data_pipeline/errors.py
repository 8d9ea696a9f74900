"""Errors that a user of the data pipeline can act on, and the reasons a sample is rejected for."""

from __future__ import annotations


class DataError(ValueError):
    """A problem with the data or its configuration: one sentence with the remedy."""


class NoShards(DataError):
    """The shard URL matches nothing."""


class MissingBucket(DataError):
    """The bucket or folder does not exist."""


class AccessDenied(DataError):
    """The credentials are absent, wrong or not allowed to do this."""


class Unreachable(DataError):
    """The storage endpoint does not answer."""


class NotATar(DataError):
    """A shard is not a tar archive."""


class StorageOutage(DataError):
    """Storage stayed unreachable for longer than `data.patience_s`."""


class WorkerDied(DataError):
    """A loader process ended without a message (killed, out of memory)."""


class ReadFailed(Exception):
    """One object cannot be read although others can: its samples are set aside."""


class Rejected(Exception):
    """One sample cannot be used; `reason` is the name it is counted under."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason
        self.detail = detail
