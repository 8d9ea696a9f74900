"""Commands beside a run on the same Ray cluster: encoders in front of it, an evaluator behind it.

driver        `Beside.tend`, every round: starts them once ranks train, and again where they end without being
              done; ends them while no ranks train, which may need their places
task (Ray's)  one command as a child process on resources of its own, followed to its end: `start`, `follow`

They know the run by its folder alone. Nothing of theirs is the run's: it goes on, and ends, as without them.
ray_sample.py starts commands in the same way, without a run.
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

import ray
import ray.exceptions

from trainer.config.run import Config, ConfigError, option_words
from trainer.distributed.place import Place, free_port
from trainer.exit_codes import ExitCode, normalize, should_restart
from trainer.launch.rank import LAUNCHER_VARIABLE, write_config
from trainer.launch.rank_process import describe
from trainer.launch.ray_rank import log_folder, shown_name
from trainer.launch.ray_worker import ROUND_S, child_environment
from trainer.reliability.job import JOB_VARIABLE, RESTARTS_VARIABLE

logger = logging.getLogger(__name__)

_CONFIG = "CONFIG"
"""Stands for the file with the run's configuration, which is written where the command runs."""
_FAILED = 1
"""Exit status of a command that has done what it could: another start would not do more."""
_LEAVE_S = 60.0
"""For what a command stores when it is ended."""
PAUSE_S = 10.0
"""Before a command that was lost is started again."""
_TAIL_BYTES, _TAIL_LINES = 8192, 20
_TRAINING_S, _IDLE_S = 5.0, 60.0
"""Since ranks were last heard of: less, and they train; more, and none of them is there."""


class Resources(TypedDict):
    """What each process of a command gets; see `Command`."""

    cpus: float
    gpus: float
    accelerator: str | None


class End(NamedTuple):
    """How a command was over."""

    status: int
    told: str
    """In words, after its name."""
    tail: str
    """Its last words, unless it was done."""


@dataclass(frozen=True)
class Command:
    """A command of `ldm` on a Ray cluster, and what it gets."""

    name: str
    words: tuple[str, ...]
    run: str
    """Folder or URL after which its log is named."""
    config: Config | None
    """What `CONFIG` among its words stands for."""
    cpus: float
    gpus: float
    accelerator: str | None
    """Ray's name for a kind of GPU."""
    to_the_end: bool = False
    """Whether it has work to do when the run has made its last step."""


@dataclass
class _Task:
    command: Command
    reference: Any = None
    starts: int = 0
    due: float = 0.0
    code: ExitCode | None = None
    """Of one that is not started again."""


class Beside:
    """The commands beside one run; `board` says whether ranks train."""

    def __init__(self, commands: Sequence[Command], board: Any) -> None:
        self._tasks = [_Task(command) for command in commands]
        self._board = board
        self._training = False
        self._job = f"Ray job {uuid.uuid4().hex}"

    def tend(self) -> None:
        """Once a round, while the run goes on."""
        if not self._tasks:
            return
        state = ray.get(self._board.state.remote())
        if state["attempt"] and state["quiet_s"] < _TRAINING_S:
            self._training = True
        elif state["quiet_s"] > _IDLE_S and self._training:
            self._training = False
            self._stop(self._tasks, "no ranks train, and may need their places")
        if self._training:
            self._look()

    def finish(self, code: ExitCode, is_over: Any) -> None:
        """The run has ended, or is about to: nothing is started again.

        What has work left does it, if the run is done and nobody wants to stop.
        """
        done = code is ExitCode.DONE
        self._stop(
            [task for task in self._tasks if not (done and task.command.to_the_end)], "the run has ended"
        )
        left = [task for task in self._tasks if done and task.command.to_the_end]
        while any(task.code is None for task in left) and not is_over():
            self._look()
            time.sleep(ROUND_S)
        self._stop(left, "asked to stop")
        self._tasks = []

    def _look(self) -> None:
        for task in self._tasks:
            if task.reference is not None and ray.wait([task.reference], timeout=0)[0]:
                self._note(task)
            if task.reference is None and task.code is None and time.monotonic() >= task.due:
                task.reference = start(task.command, self._job, task.starts)
                task.starts += 1

    def _note(self, task: _Task) -> None:
        """What became of a command that is over."""
        name, end, task.reference = task.command.name, ended(task.reference), None
        if end.status == _FAILED or not should_restart(end.status):
            task.code = ExitCode.DONE if end.status == 0 else normalize(end.status)
            level = logging.INFO if end.status == 0 else logging.ERROR
            logger.log(level, "%s %s%s", name, end.told, end.tail)
            return
        logger.warning("%s %s and is started again%s", name, end.told, end.tail)
        task.due = time.monotonic() + PAUSE_S

    def _stop(self, tasks: Sequence[_Task], why: str) -> None:
        running = [task for task in tasks if task.reference is not None]
        if running:
            logger.info("%s: %s", why, ", ".join(task.command.name for task in running))
        stop([task.reference for task in running])
        for task in running:
            task.reference = None


def start(command: Command, job: str, restarts: int, **strategy: Any) -> Any:
    """Ask Ray to `follow` a command where there is room for it; the reference to what that returns.

    strategy: further options of a Ray task.
    """
    options: dict[str, Any] = {"num_cpus": command.cpus, "num_gpus": command.gpus, "max_retries": 0}
    if command.accelerator is not None:
        options["accelerator_type"] = command.accelerator
    return ray.remote(follow).options(**options, **strategy).remote(command, job, restarts)


def ended(reference: Any) -> End:
    """How a command that is over has ended; one whose node or worker is gone met a fault."""
    try:
        status, tail = ray.get(reference)
    except ray.exceptions.RayError as error:
        return End(ExitCode.RETRYABLE, f"is lost ({str(error).partition(chr(10))[0]})", "")
    return End(status, describe(status), tail)


def stop(references: Sequence[Any]) -> None:
    """End commands, those that have not begun too; they get a while to store what they have."""
    for reference in references:
        ray.cancel(reference)
    if references:
        ray.wait(list(references), num_returns=len(references), timeout=_LEAVE_S)


def resources(on: str, cpus: float) -> Resources:
    """What a process gets that runs on `cpu`, `gpu`, or a kind of GPU."""
    kind = None if on in ("cpu", "gpu") else on
    return {"cpus": cpus, "gpus": 0.0 if on == "cpu" else 1.0, "accelerator": kind}


def encoders(config: Config, count: int, ahead: int, on: Resources) -> list[Command]:
    """`ldm encode` in front of a run, as so many parts."""
    words = ("encode", _CONFIG, "--ahead", str(ahead), "--ranks", str(count), "--rank")
    return [
        Command(f"encoder {rank}", (*words, str(rank)), config.run_dir, config, **on) for rank in range(count)
    ]


def evaluator(config: Config, options: str, on: Resources) -> list[Command]:
    """`ldm evaluate watch` of the run, with these options of its own; none without any."""
    words = watch_words(options)
    command = ("evaluate", "watch", config.run_dir, *words)
    return [Command("evaluator", command, config.run_dir, config, **on, to_the_end=True)] if words else []


def watch_words(options: str) -> list[str]:
    """The words of --watch.

    Raises:
        ConfigError: they are no command line, or lack what `ldm evaluate watch` cannot do without.
    """
    words = option_words("--watch", options)
    for needed in ("--reference", "--sample"):
        if words and not any(word.partition("=")[0] == needed for word in words):
            raise ConfigError(
                f"--watch needs {needed}, as `ldm evaluate watch --help` says; add it to the text."
            )
    return words


def follow(command: Command, job: str, restarts: int) -> tuple[int, str]:
    """Run a command as a child of this worker: its exit status, and its last words unless it is done.

    job: names all starts of it, each of which may go on where the one before held a folder.
    """
    run = shown_name(command.run)
    log = log_folder() / f"{run}-{command.name.replace(' ', '-')}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    alone = Place(0, 0, 1, 1, "127.0.0.1", free_port())  # whatever ranks srun has told Ray's own processes of
    environment = {
        **child_environment(),
        **alone.variables(),
        "PYTHONUNBUFFERED": "1",
        LAUNCHER_VARIABLE: str(os.getpid()),
        JOB_VARIABLE: f"{job}, {command.name}",
        RESTARTS_VARIABLE: str(restarts),
    }
    if not command.gpus:
        environment["CUDA_VISIBLE_DEVICES"] = ""
    with tempfile.TemporaryDirectory(prefix="ldm-beside-") as scratch, log.open("ab") as stream:
        config = "" if command.config is None else str(write_config(scratch, command.config))
        words = [config if word == _CONFIG else word for word in command.words]
        process = subprocess.Popen(
            [sys.executable, "-m", "trainer", *words],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        logger.info("%s is process %d; log: %s", command.name, process.pid, log)
        try:
            while process.poll() is None:
                time.sleep(ROUND_S / 2)
        except BaseException:  # KeyboardInterrupt: `ray.cancel`
            process.terminate()
            with suppress(subprocess.TimeoutExpired):
                process.wait(_LEAVE_S)
            raise
        finally:
            with suppress(ProcessLookupError):  # its loaders, and itself where it does not obey
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return process.returncode, _last_words(log) if process.returncode else ""


def _last_words(log: Path) -> str:
    with log.open("rb") as stream:
        stream.seek(max(0, log.stat().st_size - _TAIL_BYTES))
        text = stream.read().decode("utf-8", "replace")
    return ":\n" + "\n".join(text.replace("\r", "\n").splitlines()[-_TAIL_LINES:])
