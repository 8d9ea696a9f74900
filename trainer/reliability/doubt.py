"""Whose fault an error is, once a run has worked: a machine's, until ranks agree or it comes again.

Before the first commit of a configuration, a full disk, a refused request or a KeyError is taken for what it
looks like: something that a person has to change. Afterwards the same configuration has run, and one node of
hundreds may have a disk that turned read-only, lost its credentials for a minute, or met a broken answer
inside a library. One such rank must not end the run for all:

    it ends with 76      the run starts again, as after any fault, within what the launcher grants
    unless               more than half of the ranks say the same in the same attempt, each for itself; or the
                         same place has failed in REPEATS attempts in a row, and none got further than before

What ranks say is a line each in a file that they share: LDM_FAULTS names it (slurm/train_ldm.sh does), else
it lies in this machine's temporary folder under the name of the job.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from data_pipeline.errors import Failure, GivenUp, RunTaken
from trainer.exit_codes import ExitCode
from trainer.reliability.job import RESTART_COUNTERS, is_restart, job_identity

FAULTS_VARIABLE = "LDM_FAULTS"
"""Environment variable that names the file of faults; on a disk that all nodes see, where there is one."""
REPEATS = 3
_AGREE_S = 0.5
_FINAL = (ExitCode.USER_ERROR, ExitCode.FATAL)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Progress:
    """How far the run was when an error ended it."""

    step: int = 0
    committed: bool = False
    """Whether a checkpoint of this configuration was committed, or taken over."""


@dataclass(frozen=True)
class Fault:
    """One line of the file: what one rank says about one attempt."""

    attempt: str
    rank: int
    step: int
    place: str
    """Class of the error and the function that raised it."""
    share: float | None
    """Part of all ranks that met it, where this one repeats what others found; None: it speaks for itself."""
    node: str = ""
    """Of the rank, as SLURM names it; empty elsewhere."""


def mark(error: BaseException, progress: Progress) -> None:
    """Remember with an error how far the run was."""
    error.__dict__["progress"] = progress


def weighed(
    error: BaseException,
    code: ExitCode,
    *,
    rank: int,
    world_size: int,
    environ: Mapping[str, str] = os.environ,
) -> ExitCode:
    """The exit code of this rank: `code`, or RETRYABLE while a machine may be to blame for the error."""
    progress: Progress = error.__dict__.get("progress", Progress())
    decided = isinstance(error, (RunTaken, GivenUp))  # by the run itself, whatever the machines do
    if code not in _FINAL or decided or not (is_restart(environ) or progress.committed):
        return code
    fault = Fault(
        attempt=_attempt(environ),
        rank=rank,
        step=progress.step,
        place=_place(error),
        share=error.share if isinstance(error, Failure) else None,
        node=environ.get("SLURMD_NODENAME", ""),
    )
    told = _tell(_file(environ), fault)
    agreed, repeated = _agreed(told, fault, world_size), _repeated(told, fault)
    if agreed or repeated:
        logger.error(
            "the run ends: %s",
            "most ranks found the same" if agreed else f"the same place failed {REPEATS} times in a row",
        )
        return code
    logger.error(
        "this run has worked before, so that the machine may be to blame: it is started again, until most "
        "ranks find the same or this place fails %d times in a row",
        REPEATS,
    )
    return ExitCode.RETRYABLE


def named_nodes(environ: Mapping[str, str] = os.environ) -> list[str]:
    """Nodes whose ranks met an error in this attempt that was taken for their machine's fault."""
    path = _file(environ)
    told = _read(path) if path.exists() else []
    own = [each for each in told if each.attempt == _attempt(environ) and each.share is None and each.node]
    return sorted({each.node for each in own})


def _attempt(environ: Mapping[str, str]) -> str:
    return "/".join(environ.get(name, "0") for name in RESTART_COUNTERS)


def _tell(path: Path, fault: Fault) -> list[Fault]:
    """Add a line, give the others a moment, and read what all said; only this one where that does not
    work."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab", buffering=0) as file:
            file.write(json.dumps(asdict(fault)).encode() + b"\n")
        time.sleep(_AGREE_S)
        return _read(path)
    except OSError as error:
        logger.debug("faults cannot be told in %s: %s", path, error)
        return [fault]


def _read(path: Path) -> list[Fault]:
    told = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            told.append(Fault(**json.loads(line)))
        except (ValueError, TypeError):
            continue  # torn: two nodes wrote at once
    return told


def _agreed(told: Sequence[Fault], fault: Fault, world_size: int) -> bool:
    if fault.share is not None:
        return fault.share > 0.5
    voters = {each.rank for each in told if each.attempt == fault.attempt and each.share is None}
    return len(voters) > 1 and 2 * len(voters) > world_size


def _repeated(told: Sequence[Fault], fault: Fault) -> bool:
    attempts: dict[str, list[Fault]] = {}
    for each in told:
        attempts.setdefault(each.attempt, []).append(each)
    attempts.pop(fault.attempt, None)
    earlier = list(attempts.values())[-(REPEATS - 1) :]
    limit = fault.step
    for faults in reversed(earlier):
        # Of attempts that got further each time, none was ended by a place that nobody gets past.
        steps = [each.step for each in faults if each.place == fault.place and each.step >= limit]
        if not steps:
            return False
        limit = min(steps)
    return len(earlier) == REPEATS - 1


def _place(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    where = f"{Path(frames[-1].filename).name}:{frames[-1].name}" if frames else "unknown"
    return f"{type(error).__name__} in {where}"


def _file(environ: Mapping[str, str]) -> Path:
    named = environ.get(FAULTS_VARIABLE)
    if named:
        return Path(named)
    job = hashlib.sha256(job_identity(environ).encode()).hexdigest()[:16]
    return Path(tempfile.gettempdir()) / f"ldm-faults-{os.getuid()}-{job}.jsonl"
