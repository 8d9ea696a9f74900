"""`ldm doctor --fit`: the largest micro-batch that trains on this machine, found by training with it.

Each try is all ranks of the machine in processes of their own (`trainer/doctor/fit.py` is what one does),
since a device that ran out of memory is clean again only once its process has ended:

    the configured micro-batch                   does a run as it stands fit, and how much memory is there?
    plan's guess for that memory                 counted activations, where they can be counted
    further and further away from it             until one size fits and a larger one does not
    the middle between the two                   until they are neighbours

No size is tried that would hold more than a rank's share of the global batch.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from data_pipeline.processes import scratch_folder
from trainer.config.io import config_from_dict
from trainer.config.run import Config, ConfigError
from trainer.console import configure_logging, say
from trainer.doctor.fit import as_tried, is_of_memory, try_micro_batch, write_first_stage
from trainer.exit_codes import ExitCode, classify
from trainer.launch.local import Attempt, ranks_are_given, thread_settings, visible_devices
from trainer.launch.rank import die_with_launcher, leave, write_config
from trainer.planning.machine import GIB, Reached
from trainer.planning.memory import plan
from trainer.planning.work import count_work

_TAIL_LINES = 40
_MOST_GIB = 2**20

logger = logging.getLogger(__name__)


class NoAnswer(Exception):
    """A try ended otherwise than by memory, as far as one sees: `code` is the exit code, its log says why."""

    def __init__(self, code: ExitCode, log: str) -> None:
        super().__init__(log)
        self.code = code


@dataclass(frozen=True)
class Tried:
    """One micro-batch on all ranks."""

    fits: bool
    peak: int
    """Bytes, of the rank that took most; 0 where none was left to say it."""
    limit: int
    """Bytes that each rank may take; 0 as above."""
    device: str


def find_largest(config: Config, memory_gib: float) -> ExitCode:
    """Search, and say each try; DONE where the configured micro-batch fits, else USER_ERROR.

    memory_gib: as if each rank had only so much; 0: what the device has.

    Raises:
        ConfigError: ranks are given by a launcher, or there is no such memory.
    """
    _require_alone(os.environ)
    if not 0 <= memory_gib <= _MOST_GIB:
        raise ConfigError(
            f"--memory {memory_gib} is no amount of GiB that a rank may take; e.g. --memory 39.4."
        )
    ranks = config.distributed.ranks or visible_devices(os.environ) or 1
    codes = []
    for phase in config.apart():
        size = f" at {phase.data.image_size} px" if config.phases else ""
        try:
            with _tries(phase, ranks, int(memory_gib * GIB)) as attempt:
                most = search(phase, ranks, attempt)
        except NoAnswer as error:
            say(f"{error}\nthis try ended for another reason than memory, so there is no answer")
            return error.code
        codes.append(_tell(phase, ranks, most, size))
    return max(codes)


def _tell(config: Config, ranks: int, most: int, where: str) -> ExitCode:
    sharing = config.sharing(ranks)
    if not most:
        say(f"no micro-batch fits{where}: raise distributed.zero_stage, or take more ranks")
        return ExitCode.USER_ERROR
    best = replace(sharing, at_once=most).rows
    if config.stage == "autoencoder":  # whose micro-batches are whole
        best = max(n for n in range(1, most + 1) if config.global_batch_size % n == 0)
    say(f"largest micro-batch that fits{where}: {most}; micro_batch_size={best} makes the fewest passes")
    if most < sharing.rows:
        say(f"micro_batch_size={config.micro_batch_size} does not fit; set micro_batch_size={best}")
        return ExitCode.USER_ERROR
    return ExitCode.DONE


def search(config: Config, ranks: int, attempt: Callable[[int], Tried]) -> int:
    """The largest micro-batch that `attempt` says fits, saying each try; 0 where none does."""
    sharing = config.sharing(ranks)
    most = -(-config.global_batch_size // ranks)
    limit, low, high, stride = 0, 0, most + 1, 0
    size, why = min(sharing.rows, most), ", as configured"
    while low + 1 < high:
        reason = ""
        try:
            tried = attempt(size)
        except NoAnswer as error:
            if not low:
                raise
            # A smaller one has trained, and nothing but what it takes is different.
            tried, reason = Tried(False, 0, limit, ""), f": {str(error).splitlines()[-1]}"
        peak = f", {tried.peak / GIB:.2f} GiB" if tried.fits else ""
        say(f"{size:6d}  {'fits' if tried.fits else 'does not fit'}{peak}{why}{reason}")
        low, high = (size, high) if tried.fits else (low, size)
        if tried.limit and not limit:
            limit = tried.limit
            say(f"        of {limit / GIB:.2f} GiB of each rank, {ranks} x {tried.device}")
            guess = _guess(config, tried.peak if tried.fits else 0, size, ranks, limit)
            if guess is not None and low < min(guess, high - 1):
                size, why = min(guess, high - 1), ", plan's guess"
                continue
        why, stride = "", max(1, 2 * stride)
        if low and high <= most:
            size = (low + high) // 2
        else:  # one side is not known yet
            size = max(1, high - stride) if high <= most else min(most, low + max(stride, low // 4))
    return low


def _guess(config: Config, peak: int, size: int, ranks: int, limit: int) -> int | None:
    """What fits beside all that is no activation, by plan's count of them; None where it cannot count.

    peak: bytes that a micro-batch of `size` took; 0: it did not fit, and plan's count of the rest is taken.
    """
    if config.stage != "diffusion":
        return None
    each = count_work(config).activation_bytes
    rest = peak - size * each if peak else plan(config, ranks, ranks).device_bytes
    return max(1, int((limit * Reached().room - rest) // each))


@contextmanager
def _tries(config: Config, ranks: int, memory_bytes: int) -> Iterator[Callable[[int], Tried]]:
    """What tries a micro-batch, in a folder that is gone afterwards."""
    with scratch_folder("ldm-fit-") as name:
        folder = Path(name)
        write_first_stage(config, folder)
        yield lambda size: _try(as_tried(config, size, ranks, folder), ranks, memory_bytes, folder)


def _try(config: Config, ranks: int, memory_bytes: int, folder: Path) -> Tried:
    file = write_config(str(folder), config)
    for old in [*folder.glob("rank_*.json"), *folder.glob("rank_*.log")]:
        old.unlink()
    command = [sys.executable, "-m", "trainer.launch.fit", str(file), str(memory_bytes)]
    attempt = Attempt(
        command,
        ranks,
        environment=thread_settings(ranks),
        scratch=folder,
        log_dir=folder,
        watchdog_s=0.0,
        restarts=0,
        tails=False,
    )
    try:
        outcome = attempt.wait(lambda: False)
    finally:
        attempt.kill()
    reports: list[dict[str, Any]] = [
        json.loads(path.read_text()) for path in sorted(folder.glob("rank_*.json"))
    ]
    fits = outcome.code is ExitCode.DONE
    # The machine itself may have run out: then the kernel ends a rank, which says nothing any more.
    logs = [path.read_text(errors="replace") for path in sorted(folder.glob("rank_*.log"))]
    full = (
        any(report["full"] for report in reports)
        or "SIGKILL" in outcome.reason
        or any(map(is_of_memory, logs))
    )
    if not fits and not full:
        failed = next((log for log in logs if log), outcome.reason)
        raise NoAnswer(outcome.code, "\n".join(failed.splitlines()[-_TAIL_LINES:]))
    if not reports:
        return Tried(fits, 0, 0, "")
    return Tried(fits, max(each["peak"] for each in reports), reports[0]["limit"], reports[0]["device"])


def _require_alone(environment: Mapping[str, str]) -> None:
    """Raise ConfigError where this process is one of several ranks."""
    if ranks_are_given(environment) and environment.get("WORLD_SIZE") != "1":
        raise ConfigError(
            "--fit starts the ranks of one machine itself, and torchrun or srun has started some already; "
            "run it as one process that sees all GPUs of a node: srun --nodes=1 --ntasks=1 --gpus-per-node=8."
        )


def main(arguments: list[str]) -> int:
    """Entry point of a rank."""
    die_with_launcher()
    file, memory_bytes = Path(arguments[0]), int(arguments[1])
    rank = int(os.environ["RANK"])
    with (file.parent / f"rank_{rank}.log").open("ab") as log:  # also rank 0's, whose console is people's
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    configure_logging(f"[rank {rank}] ")
    config = config_from_dict(json.loads(file.read_text(encoding="utf-8")))
    try:
        return try_micro_batch(config, memory_bytes, file.parent / f"rank_{rank}.json")
    except Exception as error:
        code = classify(error)
        if code is ExitCode.USER_ERROR:
            logger.error("%s", error)
        else:
            logger.exception("this try ends with exit code %d (%s)", code, code.name)
        return code


if __name__ == "__main__":
    leave(main(sys.argv[1:]))
