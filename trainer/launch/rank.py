"""One rank as a process: `python -m trainer.launch.rank CONFIG_JSON TASK`, started by the launcher.

Who is whose child; whatever ends a process ends those below it, too:

    launcher        `ldm train`, or a worker of Ray
      rank          on a restart it waits for storage; at a first start it has the doctor look; it trains
        doctor      a copy of it that has imported all of that already, over before training begins
        compiler    another, of a node's first rank: kernels of the first step, for which nobody waits
        loader      data_pipeline/feed/worker.py, data.workers of them
        writer      checkpoint/writer_process.py

Under torchrun and SLURM the process of `ldm train` itself becomes the rank (`run_rank`), watched by what
started it and by its own watchdog thread.
"""

from __future__ import annotations

import importlib
import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Literal, NoReturn

from data_pipeline.config import DataConfig
from data_pipeline.errors import Failure, RetryableFault, Unreachable
from data_pipeline.processes import die_with_parent, importing, told_rank
from data_pipeline.storage.urls import folder_before_patterns, is_local
from trainer.config.io import config_from_dict, config_to_dict
from trainer.config.run import Config
from trainer.console import configure_logging
from trainer.distributed.place import NVIDIA_DRIVER, named_devices
from trainer.exit_codes import ExitCode, classify, normalize
from trainer.reliability.doubt import weighed
from trainer.reliability.job import is_restart

LAUNCHER_VARIABLE = "LDM_LAUNCHER_PID"
"""Environment variable with the launcher's process id; a rank does not outlive it."""

Task = Literal["train", "doctor"]

_LONGEST_WAIT_S = 600.0  # a rank that says nothing for 900 s while it starts counts as stuck
_PAUSE_S = 5.0
_COMPILER_THREADS = 8

logger = logging.getLogger(__name__)


def rank_command(config_file: Path, task: Task) -> list[str]:
    """The command line of a rank."""
    return [sys.executable, "-m", "trainer.launch.rank", str(config_file), task]


def write_config(folder: str, config: Config) -> Path:
    """A file in the folder with all settings of a run, for processes that are started."""
    path = Path(folder) / "config.json"
    path.write_text(json.dumps(config_to_dict(config)), encoding="utf-8")
    return path


def run_rank(config: Config, task: Task = "train") -> ExitCode:
    """Do the task in this process, as the rank that the environment says it is."""
    try:
        if task == "train" and is_restart():
            wait_for_storage(config.run_dir, config.data)
        config.sharing(told_rank()[1])  # a mistake that needs neither peers nor a doctor to be seen
        _import_ahead(config)
        # Here, not at the top: the launcher imports this module and must stay small and quick.
        from trainer.distributed.env import DistributedEnv
        from trainer.train import run

        if task == "doctor":
            from trainer.doctor.examination import diagnose

            return diagnose(config, DistributedEnv.detect())
        _compile_ahead(config)
        if config.distributed.doctor and not is_restart():
            code = _examine(config)
            if code is not ExitCode.DONE:
                return code
        return run(config, DistributedEnv.detect())
    except (Exception, KeyboardInterrupt) as error:
        code = classify(error, restarted=is_restart())
        rank, ranks = told_rank()
        code = weighed(error, code, rank=rank, world_size=ranks)
        if code is ExitCode.USER_ERROR:
            logger.error("%s", error)
        elif code is ExitCode.ABORTED:
            logger.error("aborted; nothing was saved beyond the last checkpoint")
        else:
            logger.exception("this rank ends with exit code %d (%s)", code, code.name)
        return code


def wait_for_storage(run_dir: str, data: DataConfig) -> None:
    """Return when the remote folders of a run that starts again answer: storage may be away.

    Raises:
        RetryableFault: they do not, for as long as `data.patience_s` (ten minutes at most).
    """
    began = time.monotonic()
    for url in _remote_folders(run_dir, data):
        while not _answers(url):
            waited = time.monotonic() - began
            if waited > min(data.patience_s, _LONGEST_WAIT_S):
                raise RetryableFault(f"Storage has not answered for {waited:.0f} s at the start, last {url}.")
            logger.warning("storage does not answer since %.0f s: %s; waiting", waited, url)
            time.sleep(_PAUSE_S)


def _remote_folders(run_dir: str, data: DataConfig) -> Iterable[str]:
    patterns = [data.shards, *(source.shards for source in data.sources)]
    folders = [folder_before_patterns(pattern) for pattern in patterns if pattern]
    return [url for url in dict.fromkeys([run_dir, *folders]) if not is_local(url)]


def _answers(url: str) -> bool:
    from data_pipeline.storage.files import exists  # no launcher asks storage for anything

    try:
        exists(url)
    except Unreachable:
        return False
    except Failure:
        pass  # an answer, if a bad one: the run itself says what is wrong
    return True


def main(arguments: list[str]) -> int:
    """Entry point of a spawned rank."""
    die_with_launcher()
    rank, _ = told_rank()
    configure_logging(f"[rank {rank}] " if rank else "")
    path, task = arguments
    config = config_from_dict(json.loads(Path(path).read_text(encoding="utf-8")))
    return run_rank(config, "doctor" if task == "doctor" else "train")


def leave(status: int) -> NoReturn:
    """End this rank's process with an exit code, at once.

    Everything is saved and closed; Python's own tear-down, with the threads of a dozen libraries, can only
    hang now.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    logging.shutdown()
    os._exit(status)


def _examine(config: Config) -> ExitCode:
    """The doctor as a child of this rank, at the same place among the ranks.

    In a process of its own, because DeepSpeed does not survive a second process group, and so that the
    training finds the device's memory untouched. It is a fork of this one, after all that training takes was
    imported: a hundred thousand questions to the file system that hundreds of ranks would else ask twice. A
    process that has spoken to a GPU's driver, or has threads, cannot be forked; then it is started anew.
    """
    if threading.active_count() == 1 and not _driver_is_open():
        return _forked(config)
    with tempfile.TemporaryDirectory(prefix="ldm-doctor-") as scratch:
        environment = {**os.environ, LAUNCHER_VARIABLE: str(os.getpid())}
        command = rank_command(write_config(scratch, config), "doctor")
        doctor = subprocess.Popen(command, env=environment)
        try:
            return normalize(doctor.wait())
        finally:
            doctor.kill()  # does nothing when it has ended
            doctor.wait()


def _compile_ahead(config: Config) -> None:
    """Kernels of the first step, by a copy of this process beside all that comes before that step.

    On a node that has not trained this before they take half a minute, and of a job with one such node all
    ranks would wait for it. Nothing waits for the copy, and nothing is lost with it.
    """
    first_of_node = os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0")) == "0"
    if not first_of_node or not NVIDIA_DRIVER.exists() or named_devices(os.environ) == []:
        return
    if threading.active_count() == 1 and not _driver_is_open():
        _fork(lambda: compile_for_this_node(config))


def compile_for_this_node(config: Config) -> ExitCode:
    """What `_compile_ahead` has its copy do."""
    os.nice(5)
    try:
        from trainer.planning.kernels import compile_kernels

        begun = time.monotonic()
        kernels = compile_kernels(
            config, told_rank()[1], min(_COMPILER_THREADS, len(os.sched_getaffinity(0)))
        )
        logger.debug("%d kernels are compiled, after %.1f s", len(kernels), time.monotonic() - begun)
    except Exception:  # the first step compiles what is missing
        logger.debug("kernels could not be compiled ahead", exc_info=True)
        return ExitCode.RETRYABLE
    return ExitCode.DONE


def _forked(config: Config) -> ExitCode:
    child = _fork(lambda: run_rank(config, "doctor"))
    try:
        return normalize(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    except BaseException:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        raise


def _fork(work: Callable[[], ExitCode]) -> int:
    """Process id of a copy of this one that does the work, and ends with its code or with this process."""
    parent = os.getpid()
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child != 0:
        return child
    code = ExitCode.RETRYABLE
    try:
        die_with_parent()
        if os.getppid() == parent:
            code = work()
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


def _driver_is_open() -> bool:
    """Whether this process has spoken to a GPU's driver, which holds on to its devices from then on."""
    for descriptor in Path("/proc/self/fd").iterdir():
        try:
            if os.readlink(descriptor).startswith(("/dev/nvidia", "/dev/kfd", "/dev/dri")):
                return True
        except OSError:  # closed while we looked
            continue
    return False


def _import_ahead(config: Config) -> None:
    """Seconds of imports that no device notices; torch wants its compiler for the first optimizer."""
    if "trainer.train" in sys.modules:  # of an earlier run of this process
        return
    names = ["trainer.train", "torch._dynamo"]
    if config.conditioning.openclip is not None:
        names.append("trainer.conditioning.openclip")
    with importing():
        from data_pipeline.storage.client import import_client  # no launcher asks storage for anything

        for url in _remote_folders(config.run_dir, config.data):
            import_client(url)
        for name in names:
            importlib.import_module(name)


def die_with_launcher() -> None:
    """As a rank that a launcher of ours has started; does nothing for others."""
    launcher = os.environ.get(LAUNCHER_VARIABLE)
    if launcher is None:
        return
    die_with_parent()
    if os.getppid() != int(launcher):  # it ended before the request was in place
        sys.exit(ExitCode.RETRYABLE)


if __name__ == "__main__":
    leave(main(sys.argv[1:]))
