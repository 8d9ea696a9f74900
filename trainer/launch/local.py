"""`ldm train` on this machine: use the ranks the environment gives, or start and restart our own.

One attempt is all ranks of this machine, until they have ended or one of them has to be ended:

    Attempt(...)        spawns every rank, at a fresh port
    wait()              ten times a second, until something of this has happened:
      interrupted       all are killed                                             ABORTED
      a rank failed     the others get a second to end with a code of their own,   what the failed ones
                        then all are killed; the tail of a failed rank's log       say together
      a rank hangs      stacks of all ranks into their logs, then all are killed   RETRYABLE
      all have ended    well                                                       what they say together

Whether there is another one, `supervise` decides.
"""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from data_pipeline.storage.urls import is_local, local_path
from trainer.config.run import Config
from trainer.distributed.place import NVIDIA_DRIVER, Place, free_port, named_devices, tasks_of_step
from trainer.exit_codes import ExitCode, combine, normalize, should_restart
from trainer.launch.rank import Task, rank_command, run_rank, write_config
from trainer.launch.rank_process import RankProcess, collect_stacks, describe
from trainer.reliability.heartbeat import Board
from trainer.reliability.job import JOB_FOLDER_VARIABLE

# Why not torch.distributed.elastic: its agent restarts after any failure, a mistake in the
# configuration included, knows no heartbeat (a SIGSTOPped rank lives on until the collective's
# timeout), sends SIGTERM first and waits, and costs the launcher an import of torch.

_FORWARDED = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT)
_POLL_S = 0.1
_STRAGGLER_S = 1.0
_TAIL_LINES = 40
_GRACEFUL = (ExitCode.DONE, ExitCode.PREEMPTED, ExitCode.STOPPED)

logger = logging.getLogger(__name__)


def launch(config: Config, task: Task = "train") -> int:
    """Train, or run the doctor's checks, on all ranks; returns the run's exit code (exit_codes.py).

    Raises:
        ConfigError: the global batch has no sample for each rank.
    """
    if ranks_are_given(os.environ):
        return run_rank(config, task)
    ranks = config.distributed.ranks or visible_devices(os.environ) or 1
    config.sharing(ranks)
    with tempfile.TemporaryDirectory(prefix="ldm-launch-") as scratch:
        return supervise(
            rank_command(write_config(scratch, config), task),
            ranks,
            max_restarts=config.distributed.max_restarts if task == "train" else 0,
            watchdog_s=config.distributed.watchdog_s,
            scratch=Path(scratch),
            log_dir=_log_dir(config),
        )


def supervise(
    command: list[str],
    ranks: int,
    *,
    max_restarts: int,
    watchdog_s: float,
    scratch: Path,
    log_dir: Path,
) -> ExitCode:
    """Run `command` as local ranks until it is done, asked to stop, or out of restarts."""
    stop = _StopSignals()
    restarts = 0
    with stop.installed():
        while True:
            attempt = Attempt(
                command,
                ranks,
                environment=thread_settings(ranks),
                scratch=scratch,
                log_dir=log_dir,
                watchdog_s=watchdog_s,
                restarts=restarts,
            )
            try:
                stop.attach(attempt)
                outcome = attempt.wait(lambda: stop.aborted)
            finally:
                stop.attach(None)
                attempt.kill()
            if stop.received is not None and should_restart(outcome.code):
                # The ranks may have died of the signal before they could handle it (during import).
                interrupted = stop.received == signal.SIGINT
                return ExitCode.STOPPED if interrupted else ExitCode.PREEMPTED
            # A preempted run is restarted by whoever wanted the machine back, not here.
            if outcome.code is ExitCode.PREEMPTED or not should_restart(outcome.code):
                if outcome.code is not ExitCode.DONE:
                    logger.error("the run ends: %s", outcome.reason)
                return outcome.code
            if restarts == max_restarts:
                logger.error("%s; no restart left (distributed.max_restarts)", outcome.reason)
                return outcome.code
            restarts += 1
            logger.warning("%s; restarting all ranks (%d of %d)", outcome.reason, restarts, max_restarts)


@dataclass(frozen=True)
class Outcome:
    """How one attempt ended."""

    code: ExitCode
    reason: str


class Attempt:
    """The local ranks of one attempt.

    command: a rank's command line. environment: of every rank. log_dir: where ranks other than 0 write
    their console output. watchdog_s, restarts: see RankProcess. tails: show the end of a failed rank's.
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
        tails: bool = True,
    ) -> None:
        self._tails = tails
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
            if self._tails and rank.log is not None:
                logger.error("last lines of %s:\n%s", rank.log, rank.tail(_TAIL_LINES))


class _StopSignals:
    """Signals to the launcher, passed on to the ranks; the second Ctrl-C kills them."""

    def __init__(self) -> None:
        self.received: int | None = None
        self.aborted = False
        self._attempt: Attempt | None = None

    def attach(self, attempt: Attempt | None) -> None:
        """Where signals go from now on."""
        self._attempt = attempt
        if attempt is not None and self.received is not None:
            attempt.signal(self.received)  # it came between two attempts

    @contextmanager
    def installed(self) -> Iterator[None]:
        previous = {number: signal.signal(number, self._handle) for number in _FORWARDED}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.aborted = number == signal.SIGINT and self.received == signal.SIGINT
        self.received = number
        if self._attempt is not None:
            self._attempt.signal(number)


def ranks_are_given(environment: Mapping[str, str]) -> bool:
    """Whether torchrun, srun or Ray already decided who and where the ranks are.

    A single task of srun may be a shell, or have a node's GPUs: it is a rank in our own jobs alone.
    """
    fewest = 1 if JOB_FOLDER_VARIABLE in environment else 2
    return {"RANK", "WORLD_SIZE"} <= environment.keys() or tasks_of_step(environment) >= fewest


def visible_devices(environment: Mapping[str, str]) -> int:
    """CUDA devices this process may use, without creating a context on any of them."""
    named = named_devices(environment)
    if named is not None:
        return len(named)
    if not NVIDIA_DRIVER.exists():
        return 0
    count = _devices_by_driver()
    if count is None:
        # Only here: the launcher need not import torch.
        import torch

        count = torch.cuda.device_count()
    return count


def _devices_by_driver() -> int | None:
    """What the driver's library counts, which torch asks as well; None where it does not answer."""
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
        if nvml.nvmlInit_v2() != 0:
            return None
        count = ctypes.c_int(-1)
        status = nvml.nvmlDeviceGetCount_v2(ctypes.byref(count))
        nvml.nvmlShutdown()
    except (OSError, AttributeError):
        return None
    return count.value if status == 0 and count.value >= 0 else None


def thread_settings(ranks: int) -> dict[str, str]:
    """The environment of a rank, with the cores divided unless the user already did."""
    threads = str(max(1, len(os.sched_getaffinity(0)) // ranks))
    return {"OMP_NUM_THREADS": threads, **os.environ}  # MKL follows it


def _log_dir(config: Config) -> Path:
    """Where the console output of ranks other than 0 goes: beside the run if that is local."""
    if is_local(config.run_dir):
        folder = Path(local_path(config.run_dir)) / "logs"
    else:
        # Kept after the run: it may be needed to understand a failure.
        folder = Path(tempfile.gettempdir()) / f"ldm-logs-{os.getpid()}"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "launcher.log").open("a", encoding="utf-8") as stream:
        stream.write(f"{time.strftime('%Y-%m-%dT%H:%M:%S%z')} launcher {os.getpid()} started\n")
    return folder
