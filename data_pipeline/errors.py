"""Errors by consequence: the class of an error says what follows, so nobody has to read its words.

    UserError        a person has to change something       the run ends with one sentence
    RetryableFault   the same command may well succeed       the run is started again
    FatalFault       the same command would end here again   the run ends with its stack

Whatever ends a run or a command on purpose is one of the three. `consequence_of` places the exceptions of
others among them, and `trainer.exit_codes` gives each its exit code. The classes below the three exist
because some caller tells them apart.
"""

from __future__ import annotations

import errno


class Failure(Exception):
    """Something that we can explain: one sentence, with a remedy where there is one."""

    share: float | None = None
    """Part of all ranks that met it, set on one that others raise as well; None: whoever raises it met it."""


class UserError(Failure, ValueError):
    """A mistake that a person has to mend."""


class RetryableFault(Failure, RuntimeError):
    """Something outside the run failed; the same command may well succeed."""


class FatalFault(Failure, RuntimeError):
    """The run cannot go on, and running it again would end here again."""


class RunTaken(UserError):
    """Another job holds this run folder."""


class GivenUp(FatalFault):
    """All ranks decided together that the run cannot go on: no machine is to blame."""


class DataError(UserError):
    """A mistake in the data or its configuration."""


class NoShards(DataError):
    """The shard URL matches nothing, or shards are missing from the index."""


class NoIndex(NoShards):
    """Of a large set some shards have no index, which is not made without being asked."""


class NotATar(DataError):
    """A shard is not a tar archive."""


class NotFound(DataError):
    """There is no such file or folder."""


class MissingBucket(NotFound):
    """There is no such bucket."""


class AccessDenied(DataError):
    """The credentials are absent, wrong or not allowed to do this."""


class Unreachable(RetryableFault):
    """The storage endpoint does not answer. At the very start of a run this is a wrong URL instead."""


class StorageOutage(RetryableFault):
    """Storage stayed unreachable for as long as the caller had patience."""


class WorkerDied(RetryableFault):
    """A loader process ended without a message (killed, out of memory)."""


class ReadFailed(Exception):
    """One object cannot be read although others can: its samples are set aside."""


class Gone(ReadFailed):
    """An object is not there."""


class Replaced(Exception):
    """An object has another content than the one that its index was made from."""


class Rejected(Exception):
    """One sample cannot be used; `reason` is the name it is counted under."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason
        self.detail = detail


CONSEQUENCES: dict[str, type[Failure]] = {
    kind.__name__: kind for kind in (UserError, RetryableFault, FatalFault)
}
"""By name, so that a failure can cross to another process and keep its consequence."""

# No retry makes room on a disk or grants a permission; a person has to.
_USER_ERRNOS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES})
_PROGRAMMING_ERRORS = (
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    NameError,
    NotImplementedError,
    TypeError,
)


def consequence_of(error: BaseException) -> type[Failure]:
    """Which of the three an exception is, whoever raised it.

    Memory exhaustion is fatal: the same model and batch would exhaust it again. So is what only wrong code
    raises. Unknown runtime errors (CUDA, NCCL, gloo, storage) are worth another try, since restarts are
    bounded.
    """
    for kind in CONSEQUENCES.values():
        if isinstance(error, kind):
            return kind
    if isinstance(error, OSError) and error.errno in _USER_ERRNOS:
        return UserError
    # torch.OutOfMemoryError by name: nothing down here imports torch.
    out_of_memory = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    if out_of_memory or isinstance(error, _PROGRAMMING_ERRORS):
        return FatalFault
    return RetryableFault


def in_a_line(error: BaseException) -> str:
    """What it says, or what it is (a bare TimeoutError), for the middle of a sentence."""
    return shortened(str(error)) or type(error).__name__


def shortened(text: str) -> str:
    """The text in one line of at most 160 characters."""
    line = " ".join(text.split())
    return line if len(line) <= 160 else line[:157] + "..."


def as_failure(error: BaseException, where: str) -> Failure:
    """The same if it is one of ours, else one of its consequence that says where it came from.

    For what crosses to another process, where the classes and the traceback of a library may not exist, and
    may be raised by all: its `share` says that one alone met it.
    """
    if isinstance(error, Failure):
        failure = error
    else:
        failure = consequence_of(error)(f"{where}: {type(error).__name__}: {error}")
    failure.share = 0.0
    return failure
