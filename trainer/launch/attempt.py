"""One attempt at a run: spawn local rank processes, notice death and silence, end all of them."""

from __future__ import annotations

import logging
import math
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from trainer.exit_codes import ExitCode, combine, normalize
from trainer.launch.rank import LAUNCHER_VARIABLE, Task
from trainer.reliability.heartbeat import BOARD_VARIABLE, Board, Pulse
from trainer.reliability.watchdog import STACKS_SIGNAL, is_stopped

logger = logging.getLogger(__name__)

_POLL_S = 0.1
_IMPORT_LIMIT_S = 900.0
_BUSY_START_S = 60.0
_SUSPICION_S = 1.0
_STACKS_S = 1.0
_STRAGGLER_S = 1.0
_TAIL_LINES = 40
_GRACEFUL = (ExitCode.DONE, ExitCode.PREEMPTED, ExitCode.STOPPED)


@dataclass(frozen=True)
class Outcome:
    """How one attempt ended."""

    code: ExitCode
    reason: str


class Attempt:
    """The local ranks of one attempt, each in a process group of its own.

    command: a rank's command line. world: environment of every rank. log_dir: where ranks other than
    0 write their console output. watchdog_s: how long a rank may be stopped, and half of how long its
    watchdog thread may be silent; 0: only death counts.
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
    ) -> None:
        self._ranks = ranks
        self._watchdog_s = watchdog_s
        self._board = Board(scratch / "heartbeat", ranks, create=True)
        self._logs = [None if r == 0 else log_dir / f"rank_{r}.log" for r in range(ranks)]
        self._log_starts = [path.stat().st_size if path and path.exists() else 0 for path in self._logs]
        self._suspect_since: float | None = None
        self._stopped_since: dict[int, float] = {}
        self._ticks: dict[int, tuple[float, float]] = {}
        self._started = time.monotonic()
        shared = {
            **environment,
            "WORLD_SIZE": str(ranks),
            "LOCAL_WORLD_SIZE": str(ranks),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free_port()),
            "PYTHONUNBUFFERED": "1",
            BOARD_VARIABLE: str(self._board.path),
            LAUNCHER_VARIABLE: str(os.getpid()),
        }
        self._processes: list[subprocess.Popen[bytes]] = []
        for rank in range(ranks):
            own = {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            self._processes.append(self._spawn(command, own, self._logs[rank]))

    def signal(self, number: int) -> None:
        """Pass a signal on to every rank (not to their loader workers)."""
        for process in self._processes:
            if process.poll() is None:
                process.send_signal(number)

    def wait(self, interrupted: Callable[[], bool]) -> Outcome:
        """Block until all ranks have ended, by themselves or because one of them failed.

        interrupted: asked ten times a second; True kills every rank at once.
        """
        while True:
            statuses = [process.poll() for process in self._processes]
            if interrupted():
                return self._end(ExitCode.ABORTED, "aborted")
            ended = {rank: s for rank, s in enumerate(statuses) if s is not None}
            failed = [rank for rank, s in ended.items() if normalize(s) not in _GRACEFUL]
            if failed:
                return self._end_after_failure()
            if len(ended) == self._ranks:
                code = combine(ended.values())
                self._board.close()
                return Outcome(code, code.name.lower())
            hung = self._silent_ranks(alive=[r for r, s in enumerate(statuses) if s is None])
            if hung:
                return self._end_after_hang(hung)
            time.sleep(_POLL_S)

    def kill(self) -> None:
        """SIGKILL every rank with its children. A stopped (SIGSTOP) process obeys this one too."""
        for process in self._processes:
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        for process in self._processes:
            process.wait()

    @staticmethod
    def _spawn(command: list[str], environment: dict[str, str], log: Path | None) -> subprocess.Popen[bytes]:
        stream: IO[bytes] | None = None if log is None else log.open("ab")
        try:
            # A session of its own: Ctrl-C in the terminal reaches the launcher alone, which passes it
            # on, and one killpg ends the rank together with its loader workers.
            return subprocess.Popen(
                command,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=None if stream is None else subprocess.STDOUT,
                start_new_session=True,
            )
        finally:
            if stream is not None:
                stream.close()

    def _silent_ranks(self, alive: list[int]) -> dict[int, str]:
        """Ranks that are overdue, once that has held for a moment, with what they were doing."""
        if self._watchdog_s <= 0:
            return {}
        now = time.monotonic()
        overdue = {}
        for rank in alive:
            pulse = self._board.read(rank)
            where = f"{pulse.phase} of step {pulse.step}" if pulse.beat else "its imports"
            stopped_s = self._stopped_s(rank, now)
            if stopped_s > self._watchdog_s:
                overdue[rank] = f"stopped for {stopped_s:.1f} s in {where}"
            elif pulse.beat == 0.0:
                if now - self._started > _IMPORT_LIMIT_S:
                    overdue[rank] = "never reported"
            elif self._frozen_s(rank, pulse, now) > self._frozen_limit_s(pulse.phase):
                overdue[rank] = f"frozen for {now - pulse.tick:.1f} s in {where}"
            elif now > pulse.deadline:
                overdue[rank] = f"no progress for {now - pulse.beat:.1f} s in {where}"
        if not overdue:
            self._suspect_since = None
            return {}
        # If this process was held up itself (suspended machine), the ranks get time to speak again.
        self._suspect_since = self._suspect_since or now
        return overdue if now - self._suspect_since > _SUSPICION_S else {}

    def _stopped_s(self, rank: int, now: float) -> float:
        """Seconds for which a rank has been stopped (SIGSTOP) as far as this process has seen."""
        if not is_stopped(self._processes[rank].pid):
            self._stopped_since.pop(rank, None)
            return 0.0
        return now - self._stopped_since.setdefault(rank, now)

    def _frozen_s(self, rank: int, pulse: Pulse, now: float) -> float:
        """Silence of a rank's watchdog thread, less what the rank spent waiting for a processor."""
        waited = cpu_wait_s(self._processes[rank].pid)
        tick, waited_then = self._ticks.get(rank, (0.0, 0.0))
        if pulse.tick != tick:
            self._ticks[rank] = (pulse.tick, waited)
            return 0.0
        return now - pulse.tick - (waited - waited_then)

    def _frozen_limit_s(self, phase: str) -> float:
        """Silence that means a stuck interpreter."""
        if phase == "exit":
            return math.inf  # there the thread has ended
        # Importing DeepSpeed or building models keeps the GIL for seconds.
        return 2 * self._watchdog_s + (_BUSY_START_S if phase == "start" else 0.0)

    def _end_after_failure(self) -> Outcome:
        """Give the others a moment to end with a code of their own, then kill them."""
        limit = time.monotonic() + _STRAGGLER_S
        while time.monotonic() < limit and any(p.poll() is None for p in self._processes):
            time.sleep(_POLL_S)
        statuses = {r: p.poll() for r, p in enumerate(self._processes)}
        ended = {rank: s for rank, s in statuses.items() if s is not None}
        code = combine(s for s in ended.values() if normalize(s) not in _GRACEFUL)
        culprits = [rank for rank, s in ended.items() if normalize(s) is code]
        reason = ", ".join(f"rank {rank} {describe(ended[rank])}" for rank in culprits)
        # The sentence of a failed rank 0 is on the console already.
        self._show_logs([] if 0 in culprits else culprits[:1])
        return self._end(code, reason)

    def _end_after_hang(self, hung: dict[int, str]) -> Outcome:
        reason = "; ".join(f"rank {rank} hangs: {what}" for rank, what in hung.items())
        logger.error("%s; collecting the stacks of all ranks", reason)
        self.signal(STACKS_SIGNAL)
        self.signal(signal.SIGCONT)  # a stopped process writes its stacks only once it goes on
        time.sleep(_STACKS_S)
        self._show_logs(list(hung))
        return self._end(ExitCode.RETRYABLE, reason)

    def _end(self, code: ExitCode, reason: str) -> Outcome:
        self.kill()
        self._board.close()
        return Outcome(code, reason)

    def _show_logs(self, ranks: list[int]) -> None:
        for rank in ranks:
            path = self._logs[rank]
            if path is None:
                continue
            with path.open("rb") as stream:
                stream.seek(self._log_starts[rank])
                lines = stream.read().decode("utf-8", "replace").splitlines()[-_TAIL_LINES:]
            logger.error("last lines of %s:\n%s", path, "\n".join(lines))


def describe(status: int) -> str:
    """A process status in words."""
    if status < 0:
        return f"was ended by {signal.Signals(-status).name}"
    known = [code.name.lower().replace("_", " ") for code in ExitCode if code == status]
    return f"ended with exit code {status}" + (f" ({known[0]})" if known else "")


def cpu_wait_s(pid: int) -> float:
    """Seconds for which a process's main thread was runnable without running; 0 where unknown."""
    try:
        return int(Path(f"/proc/{pid}/schedstat").read_text().split()[1]) / 1e9
    except (OSError, IndexError):
        return 0.0


def rank_command(config_file: Path, task: Task) -> list[str]:
    """The command line of a rank."""
    return [sys.executable, "-m", "trainer.launch.rank", str(config_file), task]


def free_port() -> int:
    """A TCP port that nothing listens on, outside the range the kernel hands out by itself.

    It is used only seconds later, when rank 0 has imported torch; a kernel-chosen port could be
    given to somebody's outgoing connection by then.
    """
    system = random.SystemRandom()
    for _ in range(100):
        port = system.randrange(15_000, 32_000)
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise OSError("found no free TCP port between 15000 and 32000")
