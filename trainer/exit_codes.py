"""Exit codes: the one language in which ranks, launchers and schedulers speak about how a run ended."""

from __future__ import annotations

import signal
from collections.abc import Iterable
from enum import IntEnum

from data_pipeline.errors import Failure, FatalFault, RetryableFault, Unreachable, UserError, consequence_of


class ExitCode(IntEnum):
    """How a rank, or a whole run, ended. Launchers act on nothing else; docs/reliability.md has the table.

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


class StopRequest(IntEnum):
    """What was asked for. Ordered, so that the maximum over ranks is the agreed request."""

    NONE = 0
    PREEMPTED = 1
    """The machine is wanted back: save, exit, and be started again."""
    STOPPED = 2
    """A person wants the run to stop: save, exit, and stay stopped."""

    @property
    def exit_code(self) -> ExitCode:
        """The exit code of a run that honoured this request."""
        assert self is not StopRequest.NONE
        return ExitCode.PREEMPTED if self is StopRequest.PREEMPTED else ExitCode.STOPPED


_FINAL = frozenset({ExitCode.DONE, ExitCode.USER_ERROR, ExitCode.STOPPED, ExitCode.FATAL, ExitCode.ABORTED})
_CODES: dict[type[Failure], ExitCode] = {
    UserError: ExitCode.USER_ERROR,
    RetryableFault: ExitCode.RETRYABLE,
    FatalFault: ExitCode.FATAL,
}


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
    """The exit code for an exception that ended a rank or a command: here, and nowhere else, it is decided.

    Storage that cannot be reached is a wrong URL, unless the run has been `restarted`: it was reachable
    before. Whether a mistake is believed to be one, in a run that has worked, reliability/doubt.py says.
    """
    if isinstance(error, SystemExit):
        return normalize(error.code if isinstance(error.code, int) else 0 if not error.code else 1)
    if isinstance(error, KeyboardInterrupt):
        return ExitCode.ABORTED
    if isinstance(error, Unreachable) and not restarted:
        return ExitCode.USER_ERROR
    return _CODES[consequence_of(error)]
