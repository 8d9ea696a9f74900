"""`ldm train` on this machine: use the ranks the environment gives, or start and restart our own."""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from data_pipeline.storage.urls import is_local, local_path
from trainer.config.run import Config
from trainer.exit_codes import ExitCode, should_restart
from trainer.launch.attempt import Attempt
from trainer.launch.rank import Task, rank_command, run_rank, write_config

# Why not torch.distributed.elastic: its agent restarts after any failure, a mistake in the
# configuration included, knows no heartbeat (a SIGSTOPped rank lives on until the collective's
# timeout), sends SIGTERM first and waits, and costs the launcher an import of torch.

_FORWARDED = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT)

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
            log_dir=_log_dir(config, Path(scratch)),
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
                environment=_thread_settings(ranks),
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

    A shell inside a SLURM allocation (salloc, or a batch script before srun) is not a rank: only
    srun sets SLURM_STEP_ID.
    """
    return {"RANK", "WORLD_SIZE"} <= environment.keys() or (
        {"SLURM_PROCID", "SLURM_STEP_ID", "SLURM_NTASKS"} <= environment.keys()
    )


def visible_devices(environment: Mapping[str, str]) -> int:
    """CUDA devices this process may use, without creating a context on any of them."""
    masked = environment.get("CUDA_VISIBLE_DEVICES")
    if masked is not None:
        return len([name for name in masked.split(",") if name.strip() not in ("", "-1")])
    if not Path("/dev/nvidiactl").exists():
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


def _thread_settings(ranks: int) -> dict[str, str]:
    """The environment of a rank, with the cores divided unless the user already did."""
    threads = str(max(1, len(os.sched_getaffinity(0)) // ranks))
    return {"OMP_NUM_THREADS": threads, **os.environ}  # MKL follows it


def _log_dir(config: Config, scratch: Path) -> Path:
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
