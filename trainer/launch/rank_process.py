"""One rank as a child process: start, watch, signal, end. Both our launchers consist of these.

The life of a rank, as its launcher sees it on the heartbeat board (reliability/heartbeat.py):

    spawned      beats "start"     "data" "step" "data" "step" ...  "checkpoint" ...    "exit"
    |- imports ---|- builds, loads -|------|------|------|----------|-------------------|- ends -|
     silence       each beat promises the next one by a deadline; between beats the rank's watchdog
                   thread ticks four times a second, whatever the training loop is doing

A hang is, w being distributed.watchdog_s, whichever of these is seen first:

    stopped       it has been in state T (SIGSTOP) for more than w
    mute          it has not spoken 15 minutes after it was spawned
    frozen        no tick for more than 2 w, time spent waiting for a processor not counted; while it starts,
                  a minute more: importing DeepSpeed and building models keep the interpreter for seconds
    no progress   the deadline of its last beat has passed

and holds a second later, since whoever watches may have been held up itself (suspended machine).
"""

from __future__ import annotations

import contextlib
import math
import os
import signal
import subprocess
import time
from pathlib import Path

from trainer.distributed.place import Place
from trainer.exit_codes import ExitCode
from trainer.launch.rank import LAUNCHER_VARIABLE
from trainer.reliability.heartbeat import BOARD_VARIABLE, Board, Pulse
from trainer.reliability.job import JOB_VARIABLE, RESTARTS_VARIABLE, job_identity
from trainer.reliability.watchdog import STACKS_SIGNAL, is_stopped

_MUTE_LIMIT_S = 900.0
_BUSY_START_S = 60.0
_SUSPICION_S = 1.0
_STACKS_S = 1.0
_TAIL_BYTES = 65_536


class RankProcess:
    """A rank in a process, session and process group of its own: trainers fork loaders and take signals.

    A session of its own: Ctrl-C in the terminal reaches the launcher alone, which passes it on, and one
    killpg ends the rank together with its loaders. The rank dies with the thread that started it (Linux).

    command: its command line. board: where it writes its pulse, at its local rank. environment: all
    variables but those that say who it is. log: file that its output is appended to; None: the launcher's
    own output. watchdog_s: see above; 0: only death counts. restarts: how often the run has been started
    again before.
    """

    def __init__(
        self,
        command: list[str],
        place: Place,
        *,
        board: Board,
        environment: dict[str, str],
        log: Path | None,
        watchdog_s: float,
        restarts: int,
    ) -> None:
        self.place = place
        self.log = log
        self._board = board
        self._watchdog_s = watchdog_s
        self._started = time.monotonic()
        self._stopped_since: float | None = None
        self._suspect_since: float | None = None
        self._tick, self._waited_at_tick = 0.0, 0.0
        self._log_start = log.stat().st_size if log is not None and log.exists() else 0
        with contextlib.ExitStack() as stack:
            stream = None if log is None else stack.enter_context(log.open("ab"))
            self._process = subprocess.Popen(
                command,
                env={
                    JOB_VARIABLE: job_identity(environment, launcher=os.getpid()),
                    **environment,
                    **place.variables(),
                    "PYTHONUNBUFFERED": "1",
                    BOARD_VARIABLE: str(board.path),
                    LAUNCHER_VARIABLE: str(os.getpid()),
                    RESTARTS_VARIABLE: str(restarts),
                },
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=None if stream is None else subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        """Process id of the rank."""
        return self._process.pid

    @property
    def step(self) -> int:
        """Optimizer step the rank is at, 0 before it has spoken."""
        return self._pulse().step

    def poll(self) -> int | None:
        """Exit status in subprocess's form, None while it runs."""
        return self._process.poll()

    def signal(self, number: int) -> None:
        """To the rank alone, not to its loaders."""
        if self._process.poll() is None:
            self._process.send_signal(number)

    def kill(self) -> None:
        """SIGKILL to the rank and its loaders; does not wait. A stopped process obeys this one too."""
        with contextlib.suppress(ProcessLookupError):  # all of them have ended
            os.killpg(self._process.pid, signal.SIGKILL)

    def wait(self) -> None:
        """Block until the rank has ended."""
        self._process.wait()

    def hang(self) -> str | None:
        """In what the rank hangs; None while it does not, or has not been seen to for a second.

        Ask about a running rank, several times a minute at least.
        """
        now = time.monotonic()
        found = self._overdue(now) if self._watchdog_s > 0 else None
        if found is None:
            self._suspect_since = None
            return None
        self._suspect_since = self._suspect_since or now
        return found if now - self._suspect_since > _SUSPICION_S else None

    def tail(self, lines: int) -> str:
        """The last lines that this rank wrote into its log; empty without one."""
        if self.log is None:
            return ""
        with self.log.open("rb") as stream:
            stream.seek(max(self._log_start, self.log.stat().st_size - _TAIL_BYTES))
            text = stream.read().decode("utf-8", "replace")
        return "\n".join(text.replace("\r", "\n").splitlines()[-lines:])

    def _pulse(self) -> Pulse:
        return self._board.read(self.place.local_rank)

    def _overdue(self, now: float) -> str | None:
        pulse = self._pulse()
        where = f"{pulse.phase} of step {pulse.step}" if pulse.beat else "its imports"
        if not is_stopped(self.pid):
            self._stopped_since = None
        elif self._stopped_since is None:
            self._stopped_since = now
        if self._stopped_since is not None and now - self._stopped_since > self._watchdog_s:
            return f"stopped for {now - self._stopped_since:.1f} s in {where}"
        if pulse.beat == 0.0:
            return "never reported" if now - self._started > _MUTE_LIMIT_S else None
        if self._frozen_s(pulse, now) > self._frozen_limit_s(pulse.phase):
            return f"frozen for {now - pulse.tick:.1f} s in {where}"
        if now > pulse.deadline:
            return f"no progress for {now - pulse.beat:.1f} s in {where}"
        return None

    def _frozen_s(self, pulse: Pulse, now: float) -> float:
        """Silence of the rank's watchdog thread, less what the rank spent waiting for a processor."""
        waited = cpu_wait_s(self.pid)
        if pulse.tick != self._tick:
            self._tick, self._waited_at_tick = pulse.tick, waited
            return 0.0
        return now - pulse.tick - (waited - self._waited_at_tick)

    def _frozen_limit_s(self, phase: str) -> float:
        if phase == "exit":
            return math.inf  # there the thread has ended
        return 2 * self._watchdog_s + (_BUSY_START_S if phase == "start" else 0.0)


def collect_stacks(ranks: list[RankProcess]) -> None:
    """Have the ranks write the stacks of all their threads into their logs, and give them time to."""
    for rank in ranks:
        rank.signal(STACKS_SIGNAL)
        rank.signal(signal.SIGCONT)  # a stopped process writes its stacks only once it goes on
    time.sleep(_STACKS_S)


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
