"""One rank as a child of somebody else's worker process: start, watch, signal, end."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import trainer
from trainer.exit_codes import ExitCode
from trainer.launch.attempt import rank_command
from trainer.launch.rank import LAUNCHER_VARIABLE
from trainer.launch.restarts import RESTARTS_VARIABLE
from trainer.reliability.heartbeat import BOARD_VARIABLE, Board

_SPAWN_LIMIT_S = 900.0
_SUSPICION_S = 2.0


@dataclass(frozen=True)
class Place:
    """Who a rank is and where the ranks meet."""

    rank: int
    local_rank: int
    world_size: int
    local_world_size: int
    master_addr: str
    master_port: int

    def environment(self) -> dict[str, str]:
        """The variables torchrun would set."""
        return {
            "RANK": str(self.rank),
            "LOCAL_RANK": str(self.local_rank),
            "WORLD_SIZE": str(self.world_size),
            "LOCAL_WORLD_SIZE": str(self.local_world_size),
            "MASTER_ADDR": self.master_addr,
            "MASTER_PORT": str(self.master_port),
        }


class RankProcess:
    """A process of its own, because trainers fork loaders and handle signals in the main thread.

    It dies with the thread that started it (Linux), and takes its loader workers along. watchdog_s:
    silence of the rank's watchdog thread that counts as a frozen process; 0: only death counts. restarts:
    how often the run has been started again before.
    """

    def __init__(
        self, config: dict[str, Any], place: Place, *, log: Path, watchdog_s: float, restarts: int
    ) -> None:
        self._place = place
        self._watchdog_s = watchdog_s
        self._started = time.monotonic()
        self._suspect_since: float | None = None
        self._scratch = tempfile.TemporaryDirectory(prefix="ldm-rank-")
        scratch = Path(self._scratch.name)
        (scratch / "config.json").write_text(json.dumps(config), encoding="utf-8")
        self._board = Board(scratch / "heartbeat", place.local_world_size, create=True)
        self.log = log
        log.parent.mkdir(parents=True, exist_ok=True)
        package = str(Path(trainer.__file__).parents[1])
        search_path = os.pathsep.join(filter(None, (package, os.environ.get("PYTHONPATH"))))
        with log.open("ab") as stream:
            self._process = subprocess.Popen(
                rank_command(scratch / "config.json", "train"),
                env={
                    **os.environ,
                    **place.environment(),
                    "PYTHONPATH": search_path,
                    "PYTHONUNBUFFERED": "1",
                    BOARD_VARIABLE: str(self._board.path),
                    LAUNCHER_VARIABLE: str(os.getpid()),
                    RESTARTS_VARIABLE: str(restarts),
                },
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        """Process id of the rank."""
        return self._process.pid

    @property
    def step(self) -> int:
        """Optimizer step the rank is at, 0 before it has spoken."""
        return self._board.read(self._place.local_rank).step

    def poll(self) -> int | None:
        """Exit status, None while it runs. A frozen rank is killed, which is a retryable fault."""
        status = self._process.poll()
        if status is None and self._frozen():
            self.kill()
            return int(ExitCode.RETRYABLE)
        return status

    def signal(self, number: signal.Signals) -> None:
        """To the rank alone, not to its loader workers."""
        if self._process.poll() is None:
            self._process.send_signal(number)

    def kill(self) -> None:
        """SIGKILL the rank with its children, and forget the scratch folder."""
        with contextlib.suppress(ProcessLookupError):  # already gone, loader workers included
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._scratch.cleanup()

    def tail(self, lines: int = 30) -> str:
        """The last lines the rank wrote."""
        text = self.log.read_bytes()[-65_536:].decode("utf-8", "replace")
        return "\n".join(text.replace("\r", "\n").splitlines()[-lines:])

    def _frozen(self) -> bool:
        if self._watchdog_s <= 0:
            return False
        now = time.monotonic()
        pulse = self._board.read(self._place.local_rank)
        if pulse.beat == 0.0:
            overdue = now - self._started > _SPAWN_LIMIT_S
        else:
            overdue = now > pulse.deadline or (pulse.phase != "exit" and now - pulse.tick > self._watchdog_s)
        if not overdue:
            self._suspect_since = None
            return False
        # Its own watchdog comes first; and if this process was held up, the rank may speak again.
        self._suspect_since = self._suspect_since or now
        return now - self._suspect_since > _SUSPICION_S
