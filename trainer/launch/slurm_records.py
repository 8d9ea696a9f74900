"""What the folder of a SLURM job tells: what was submitted, how its attempts ended, what a restart took.

The job's script (slurm/train_ldm.sh) and slurm_job.py keep in it, over requeues:

    submission.json, config.yaml, code/    what was submitted, once
    attempts.jsonl                         a line per attempt that has ended: the one owner of what happened
    attempt-K/launched.json                when the script called srun for the ranks
    attempt-K/start.json                   when rank 0 had made its first step, and what took how long
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data_pipeline.storage.urls import is_local, local_path

_UNKNOWN: dict[str, Any] = {
    **{"allocation": 0, "ran": True, "committed": None, "then": "requeue"},
    **{"gone": [], "suspect": [], "sick": []},
}
"""What records of earlier versions do not say."""
ATTEMPTS, SUBMISSION = "attempts.jsonl", "submission.json"
"""Files in a job's folder."""
_BEFORE_RESTORE = ("imports and checks", "process group")
_FIRST_STEP = ("first batch", "first save", "first step")


def read_attempts(job_dir: Path) -> list[dict[str, Any]]:
    """Every finished attempt of a job, oldest first."""
    path = job_dir / ATTEMPTS
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines()
    return [{**_UNKNOWN, **json.loads(line)} for line in lines if line]


def read_submission(job_dir: Path) -> dict[str, Any] | None:
    """What was submitted; None before it has been copied."""
    path = job_dir / SUBMISSION
    if not path.exists():
        return None
    submission: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return submission


def run_folder(submission: Mapping[str, Any]) -> str:
    """URL of the run, or its absolute path."""
    run_dir = str(submission["run_dir"])
    return str(Path(submission["working_directory"]) / local_path(run_dir)) if is_local(run_dir) else run_dir


def baseline(submission: Mapping[str, Any] | None) -> int:
    """The newest committed step before the job's first attempt."""
    return 0 if submission is None else int(submission.get("committed", 0))


def recovery(job_dir: Path, number: int) -> dict[str, float] | None:
    """Seconds from a fault to the first new step of attempt `number` in the same allocation, by part.

    The parts add up to all of it: `detect` (the script sees what SLURM told it), `kill` (the other ranks end,
    or are ended), `judge`, `check` (of the nodes), `srun` (until rank 0's process exists), `import`,
    `rendezvous`, `restore` and `first step`. None where this attempt follows no fault there, or has made no
    step.
    """
    folder = job_dir / f"attempt-{number}"
    before = next((attempt for attempt in read_attempts(job_dir) if attempt["attempt"] == number - 1), None)
    if before is None or before["then"] != "restart" or before["fault"] is None:
        return None
    try:
        launched, start = (
            json.loads((folder / name).read_text(encoding="utf-8"))
            for name in ("launched.json", "start.json")
        )
    except (FileNotFoundError, ValueError):
        return None
    parts, began = start["parts"], start["time"] - start["age"]
    return {
        "detect": before["seen"] - before["fault"],
        "kill": before["ended"] - before["seen"],
        "judge": before["judged"] - before["ended"],
        "check": launched["time"] - before["judged"],
        "srun": began - launched["time"],
        "import": parts.get("imports and checks", 0.0),
        "rendezvous": parts.get("process group", 0.0),
        "restore": sum(parts[name] for name in parts if name not in (*_BEFORE_RESTORE, *_FIRST_STEP)),
        "first step": sum(parts.get(name, 0.0) for name in _FIRST_STEP),
    }


def recovery_sentence(job_dir: Path, number: int) -> str | None:
    """`recovery` in words."""
    parts = recovery(job_dir, number)
    if parts is None:
        return None
    told = ", ".join(f"{name} {seconds:.1f}" for name, seconds in parts.items())
    return f"attempt {number} made its first step {sum(parts.values()):.1f} s after the fault: {told}"
