"""Exit codes: the one language in which ranks, launchers and schedulers speak about how a run ended."""

from __future__ import annotations

import errno
import signal
from collections.abc import Iterable
from enum import IntEnum

from data_pipeline.errors import DataError, StorageOutage, Unreachable, WorkerDied
from trainer.config.run import ConfigError


class ExitCode(IntEnum):
    """How a rank, or a whole run, ended. Launchers act on nothing else.

    | code | meaning                                             | restart? |
    |------|-----------------------------------------------------|----------|
    | 0    | done: the last step is reached and saved            | no       |
    | 2    | user error: a sentence says what to change          | no       |
    | 75   | preempted: state saved, run the same command again  | yes      |
    | 76   | retryable fault: machine, network, storage, hang    | yes      |
    | 77   | stopped: a person asked for it, state saved         | no       |
    | 78   | fatal fault: would fail again (too many rewinds, a bug) | no   |
    | 130  | aborted: a second Ctrl-C, nothing saved             | no       |

    75 is EX_TEMPFAIL of sysexits.h; the others are free of shell, Python and signal conventions. A
    rank that a signal ended (SIGKILL of the out-of-memory killer, SIGBUS, ...) or that died without
    one of these codes counts as a retryable fault.
    """

    DONE = 0
    USER_ERROR = 2
    PREEMPTED = 75
    RETRYABLE = 76
    STOPPED = 77
    FATAL = 78
    ABORTED = 130


class RetryableFault(RuntimeError):
    """Something outside the run failed; the same command may well succeed."""


class FatalFault(RuntimeError):
    """The run cannot go on, and running it again would end here again."""


_FINAL = frozenset({ExitCode.DONE, ExitCode.USER_ERROR, ExitCode.STOPPED, ExitCode.FATAL, ExitCode.ABORTED})
_PROGRAMMING_ERRORS = (
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    NameError,
    NotImplementedError,
    TypeError,
)


# No retry makes room on a disk or grants a permission; a person has to.
_USER_ERRNOS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES})


def normalize(status: int) -> ExitCode:
    """The exit code that a process status stands for.

    Accepts subprocess's form (negative signal number) and the shell's (128 + signal number).
    """
    if status in (-signal.SIGINT, 128 + signal.SIGINT):
        return ExitCode.ABORTED
    try:
        return ExitCode(status)
    except ValueError:
        return ExitCode.RETRYABLE


def should_restart(status: int) -> bool:
    """Whether the same command is to be run again after this exit status."""
    return normalize(status) not in _FINAL


def combine(statuses: Iterable[int]) -> ExitCode:
    """The exit code of a run from those of its ranks: what forbids a restart wins.

    Except over a rank that a signal ended: whatever its peers say then (broken connections make
    strange errors) follows from that. Ranks killed by the launcher itself must be left out.
    """
    given = list(statuses)
    assert given, "no rank reported a status"
    if any(status < 0 and status != -signal.SIGINT for status in given):
        return ExitCode.RETRYABLE
    order = (
        ExitCode.ABORTED,
        ExitCode.USER_ERROR,
        ExitCode.FATAL,
        ExitCode.STOPPED,
        ExitCode.RETRYABLE,
        ExitCode.PREEMPTED,
        ExitCode.DONE,
    )
    present = {normalize(status) for status in given}
    return next(code for code in order if code in present)


def classify(error: BaseException, *, restarted: bool = False) -> ExitCode:
    """The exit code for an exception that ended a rank.

    Memory exhaustion is fatal: the same model and batch would exhaust it again. Unknown runtime
    errors (CUDA, NCCL, gloo, storage) are retryable, since restarts are bounded; errors that only
    wrong code raises are fatal. Storage that cannot be reached is a wrong URL, unless the run has been
    `restarted`: it was reachable before.
    """
    if isinstance(error, SystemExit):
        return normalize(error.code if isinstance(error.code, int) else 0 if not error.code else 1)
    if isinstance(error, KeyboardInterrupt):
        return ExitCode.ABORTED
    if isinstance(error, (StorageOutage, WorkerDied)) or (restarted and isinstance(error, Unreachable)):
        return ExitCode.RETRYABLE
    if isinstance(error, (ConfigError, DataError)):
        return ExitCode.USER_ERROR
    if isinstance(error, OSError) and error.errno in _USER_ERRNOS:
        return ExitCode.USER_ERROR
    if isinstance(error, RetryableFault):
        return ExitCode.RETRYABLE
    # torch.OutOfMemoryError by name: this module stays free of torch.
    out_of_memory = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    if out_of_memory or isinstance(error, (FatalFault, *_PROGRAMMING_ERRORS)):
        return ExitCode.FATAL
    return ExitCode.RETRYABLE
