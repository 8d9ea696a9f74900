"""One attempt at a run: all ranks of this machine, until they have ended or one of them has to be ended.

    Attempt(...)        spawns every rank, at a fresh port
    wait()              ten times a second, until something of this has happened:
      interrupted       all are killed                                             ABORTED
      a rank failed     the others get a second to end with a code of their own,   what the failed ones
                        then all are killed; the tail of a failed rank's log       say together
      a rank hangs      stacks of all ranks into their logs, then all are killed   RETRYABLE
      all have ended    well                                                       what they say together

Whether there is another attempt is for the caller to decide (local.py).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from trainer.distributed.place import Place, free_port
from trainer.exit_codes import ExitCode, combine, normalize
from trainer.launch.rank_process import RankProcess, collect_stacks, describe
from trainer.reliability.heartbeat import Board

logger = logging.getLogger(__name__)

_POLL_S = 0.1
_STRAGGLER_S = 1.0
_TAIL_LINES = 40
_GRACEFUL = (ExitCode.DONE, ExitCode.PREEMPTED, ExitCode.STOPPED)


@dataclass(frozen=True)
class Outcome:
    """How one attempt ended."""

    code: ExitCode
    reason: str


class Attempt:
    """The local ranks of one attempt.

    command: a rank's command line. environment: of every rank. log_dir: where ranks other than 0 write
    their console output. watchdog_s, restarts: see RankProcess.
    """

    def __init__(
        self,
        command: list[str],
        ranks: int,
        *,
        environment: dict[str, str],
        scratch: Path,
        log_dir: Path,
        watchdog_s: float,
        restarts: int,
    ) -> None:
        self._board = Board(scratch / "heartbeat", ranks, create=True)
        port = free_port()
        self._ranks = [
            RankProcess(
                command,
                Place(rank, rank, ranks, ranks, "127.0.0.1", port),
                board=self._board,
                environment=environment,
                log=None if rank == 0 else log_dir / f"rank_{rank}.log",
                watchdog_s=watchdog_s,
                restarts=restarts,
            )
            for rank in range(ranks)
        ]

    def signal(self, number: int) -> None:
        """Pass a signal on to every rank (not to their loaders)."""
        for rank in self._ranks:
            rank.signal(number)

    def wait(self, interrupted: Callable[[], bool]) -> Outcome:
        """Block until all ranks have ended, by themselves or because one of them failed.

        interrupted: asked ten times a second; True kills every rank at once.
        """
        while True:
            statuses = [rank.poll() for rank in self._ranks]
            if interrupted():
                return self._end(ExitCode.ABORTED, "aborted")
            ended = [status for status in statuses if status is not None]
            if any(normalize(status) not in _GRACEFUL for status in ended):
                return self._end_after_failure()
            if len(ended) == len(self._ranks):
                code = combine(ended)
                return self._end(code, code.name.lower())
            alive = [rank for rank, status in zip(self._ranks, statuses, strict=True) if status is None]
            hung = {rank.place.rank: what for rank in alive if (what := rank.hang()) is not None}
            if hung:
                return self._end_after_hang(hung)
            time.sleep(_POLL_S)

    def kill(self) -> None:
        """SIGKILL every rank with its children, and wait for the ranks."""
        for rank in self._ranks:
            rank.kill()
        for rank in self._ranks:
            rank.wait()

    def _end_after_failure(self) -> Outcome:
        """Give the others a moment to end with a code of their own, then kill them."""
        limit = time.monotonic() + _STRAGGLER_S
        while time.monotonic() < limit and any(rank.poll() is None for rank in self._ranks):
            time.sleep(_POLL_S)
        statuses = {index: rank.poll() for index, rank in enumerate(self._ranks)}
        ended = {index: status for index, status in statuses.items() if status is not None}
        code = combine(status for status in ended.values() if normalize(status) not in _GRACEFUL)
        culprits = [index for index, status in ended.items() if normalize(status) is code]
        reason = ", ".join(f"rank {index} {describe(ended[index])}" for index in culprits)
        # The sentence of a failed rank 0 is on the console already.
        self._show_logs([] if 0 in culprits else culprits[:1])
        return self._end(code, reason)

    def _end_after_hang(self, hung: dict[int, str]) -> Outcome:
        reason = "; ".join(f"rank {rank} hangs: {what}" for rank, what in hung.items())
        logger.error("%s; collecting the stacks of all ranks", reason)
        collect_stacks(self._ranks)
        self._show_logs(list(hung))
        return self._end(ExitCode.RETRYABLE, reason)

    def _end(self, code: ExitCode, reason: str) -> Outcome:
        self.kill()
        self._board.close()
        return Outcome(code, reason)

    def _show_logs(self, ranks: list[int]) -> None:
        for rank in (self._ranks[index] for index in ranks):
            if rank.log is not None:
                logger.error("last lines of %s:\n%s", rank.log, rank.tail(_TAIL_LINES))
