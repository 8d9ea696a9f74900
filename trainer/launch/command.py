"""A command of `ldm` on many ranks: as one of those that torchrun or srun have started, or with local ones.

Unlike training, such a command keeps what it has made where it writes: it is started again as it is, and
whatever number of ranks it then has, it goes on.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from trainer.config.run import ConfigError
from trainer.distributed.env import DistributedEnv, initialise, shutdown
from trainer.exit_codes import ExitCode
from trainer.launch.local import ranks_are_given, supervise, visible_devices
from trainer.launch.rank import LAUNCHER_VARIABLE, die_with_launcher

_RANKS_WAIT_S = 86_400.0
"""For each other: one may have the last share of the work alone. A rank that died is noticed at once."""
_MAX_RESTARTS = 3


def run_on_ranks(words: Sequence[str], ranks: int, work: Callable[[DistributedEnv], None]) -> ExitCode:
    """Do `work` on every rank, in this process if it is one of them.

    Args:
        words: of the command line, by which local ranks are started.
        ranks: local ones to start; 0: one per visible GPU, or one on a CPU.
        work: collective; gets this rank's place.

    Raises:
        ConfigError: less than no rank, or local ranks beside those that are given.
    """
    if ranks < 0:
        raise ConfigError(f"--ranks {ranks} must be at least 0; 0 is one per GPU.")
    if ranks_are_given(os.environ):
        if ranks and LAUNCHER_VARIABLE not in os.environ:
            raise ConfigError(
                "--ranks starts local processes, and torchrun or srun has started some already; leave it out."
            )
        die_with_launcher()
        return as_rank(work)
    ranks = ranks or visible_devices(os.environ) or 1
    if ranks == 1:
        work(DistributedEnv.detect())
        return ExitCode.DONE
    with tempfile.TemporaryDirectory(prefix="ldm-launch-") as scratch:
        folder = Path(scratch)
        return supervise(
            [sys.executable, "-m", "trainer", *words],
            ranks,
            max_restarts=_MAX_RESTARTS,
            watchdog_s=0.0,  # no heartbeat: a batch may take minutes
            scratch=folder,
            log_dir=folder,
        )


def as_rank(work: Callable[[DistributedEnv], None]) -> ExitCode:
    """Do `work` on the ranks that there are, of which this process is one; collective where they are many."""
    env = DistributedEnv.detect()
    if env.world_size == 1:
        work(env)
        return ExitCode.DONE
    env = initialise(env, _RANKS_WAIT_S)
    try:
        work(env)
    finally:
        shutdown()
    return ExitCode.DONE
