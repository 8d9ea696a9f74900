"""What one worker of a Ray run does: it starts its rank and follows it to the end. Needs no Ray itself.

Ray Train places the workers and starts all of them anew when one raises. A worker is no rank: a rank forks
loaders and takes signals, and a thread inside a Ray worker, beside its gRPC threads, can do neither.

All workers go through the same rounds, one a second:

    tick     tell the board (ray_board.py) the step; hear what is asked for and which ranks ended how
    watch    pass a request on to the rank; note its end, or raise so that all ranks start anew
    share    worker 0 says whether that was the last round and what Ray is told about the run
"""

from __future__ import annotations

import logging
import os
import signal
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

import trainer
from data_pipeline.errors import RetryableFault
from trainer.config.run import Config
from trainer.distributed.place import Place
from trainer.exit_codes import ExitCode, combine, normalize, should_restart
from trainer.launch.rank import rank_command, write_config
from trainer.launch.rank_process import RankProcess, collect_stacks, describe
from trainer.launch.ray_board import RunRequest, forbids_restart
from trainer.reliability.heartbeat import Board

logger = logging.getLogger(__name__)

ROUND_S = 1.0
_GRACE_S = 10.0
_TAIL_LINES = 30

Facts = dict[str, Any]
"""JSON-able facts about a run, for Ray's dashboard."""


class Group(Protocol):
    """What a worker asks of Ray."""

    def tick(self, step: int) -> tuple[str, dict[int, int]]:
        """(what the ranks are asked for, exit codes so far by rank)."""
        ...

    def ended(self, rank: int, code: int) -> None:
        """Put the end of a rank on the board."""
        ...

    def is_preempted(self) -> bool:
        """Whether this node or another one is about to be taken away."""
        ...

    def share(self, message: Any) -> Any:
        """What worker 0 passed, on every worker. Collective."""
        ...

    def report(self, facts: Facts) -> None:
        """For the dashboard. Collective."""
        ...


@contextmanager
def started_rank(
    config: Config,
    place: Place,
    *,
    log: Path,
    restarts: int,
    environment: Mapping[str, str] = MappingProxyType({}),
) -> Iterator[RankProcess]:
    """A rank of this run as a child of this process; it is gone, loaders included, when the context ends.

    log: its output is appended here. restarts: how often the run has been started again before.
    environment: variables beside those of this process.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="ldm-rank-") as scratch:
        board = Board(Path(scratch) / "heartbeat", place.local_world_size, create=True)
        rank = RankProcess(
            rank_command(write_config(scratch, config), "train"),
            place,
            board=board,
            environment={**child_environment(), **environment},
            log=log,
            watchdog_s=config.distributed.watchdog_s,
            restarts=restarts,
        )
        try:
            yield rank
        finally:
            rank.kill()
            rank.wait()
            board.close()


def child_environment() -> dict[str, str]:
    """The variables of this process, for a child that imports this very code wherever it is started."""
    package = str(Path(trainer.__file__).parents[1])
    search_path = os.pathsep.join(filter(None, (package, os.environ.get("PYTHONPATH"))))
    return {**os.environ, "PYTHONPATH": search_path}


class Follower:
    """Follows one rank.

    news: on worker 0, facts about the run every now and then, at once when its argument is True (the end).
    """

    def __init__(
        self,
        rank: int,
        ranks: int,
        process: RankProcess,
        group: Group,
        news: Callable[[int, bool], Facts | None],
    ) -> None:
        self._rank, self._ranks = rank, ranks
        self._process = process
        self._group = group
        self._news = news
        self._asked = False
        self._code: int | None = None
        self._doomed_since: float | None = None

    def run(self) -> ExitCode:
        """The run's exit code, once worker 0 says that the round was the last.

        Raises:
            RetryableFault: this rank died or hung, or was preempted with its node; the group starts anew.
        """
        while True:
            time.sleep(ROUND_S)
            step = self._process.step
            asked, codes = self._group.tick(step)
            request = RunRequest(asked)
            self._watch(request, codes)
            if self._group.is_preempted():
                self._ask_to_save("this node or another one is to be taken away")
            message = self._group.share(self._verdict(step, codes) if self._rank == 0 else None)
            if message["facts"] is not None:
                self._group.report(message["facts"])
            if message["over"]:
                code = ExitCode(message["code"])
                if code is ExitCode.PREEMPTED and request is RunRequest.NONE:
                    raise RetryableFault("preempted with its node; the state is saved")
                return code

    def _verdict(self, step: int, codes: dict[int, int]) -> dict[str, Any]:
        over = self._code is not None and len(codes) >= self._ranks
        code = combine(codes.values()) if over else ExitCode.DONE
        return {"over": over, "code": int(code), "facts": self._news(step, over)}

    def _watch(self, request: RunRequest, codes: dict[int, int]) -> None:
        process = self._process
        if self._code is not None:
            return
        if request is not RunRequest.NONE:
            self._ask_to_save(f"request: {request}")
        if forbids_restart(codes):
            # The others would wait for that rank until their collectives time out.
            self._doomed_since = self._doomed_since or time.monotonic()
            if time.monotonic() - self._doomed_since > _GRACE_S:
                process.kill()
                self._end(combine(codes.values()))
                return
        status = process.poll()
        if status is None:
            hung = process.hang()
            if hung is not None:
                collect_stacks([process])
                raise RetryableFault(f"rank {self._rank} hangs: {hung}:\n{process.tail(_TAIL_LINES)}")
            return
        code = normalize(status)
        if self._asked and status == -signal.SIGUSR1:
            code = ExitCode.PREEMPTED  # it was still importing, and had nothing to save yet
        words = f"rank {self._rank} {describe(status)}:\n{process.tail(_TAIL_LINES)}"
        if code is not ExitCode.PREEMPTED and should_restart(code):
            raise RetryableFault(words)
        if code not in (ExitCode.DONE, ExitCode.PREEMPTED):
            logger.error("%s", words)
        self._end(code)

    def _end(self, code: ExitCode) -> None:
        self._code = code
        self._group.ended(self._rank, int(code))

    def _ask_to_save(self, reason: str) -> None:
        if not self._asked:
            self._asked = True
            logger.warning("rank %d: %s; saving", self._rank, reason)
            self._process.signal(signal.SIGUSR1)
