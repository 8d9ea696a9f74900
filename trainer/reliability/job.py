"""Which job a process belongs to, and whether it still is: names across restarts and machines. Small."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from data_pipeline.processes import process_status

JOB_VARIABLE = "LDM_JOB"
"""Environment variable that names a job across its restarts; set by launchers, or by a person's scheduler."""
JOB_FOLDER_VARIABLE = "LDM_JOB_DIR"
"""Environment variable that names the folder of a job of slurm/train_ldm.sh."""
RESTARTS_VARIABLE = "LDM_RESTARTS"
"""Environment variable that tells a rank how often its launcher has restarted the run."""
STARTS_VARIABLE = "LDM_STARTS"
"""Environment variable that says how often the ranks of a job have been started before: for an unfit node an
attempt may end before any is. Where it is set, no other counter is asked."""
RESTART_COUNTERS = (RESTARTS_VARIABLE, "SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT")
"""Environment variables that say how often the same command has been started again."""


def job_identity(environ: Mapping[str, str] = os.environ, *, launcher: int | None = None) -> str:
    """A name of this job that its restarts and requeues share, and no other job has.

    Args:
        launcher: process that starts the ranks anew, where that is one of ours.
    """
    if environ.get(JOB_VARIABLE):
        return environ[JOB_VARIABLE]
    if environ.get("SLURM_JOB_ID"):
        return f"SLURM job {environ['SLURM_JOB_ID']} of {environ.get('SLURM_CLUSTER_NAME') or 'this cluster'}"
    if launcher is not None:
        return f"launcher {process_identity(launcher)}"
    # torchrun's agent, or the shell: two ranks 0 under one shell need two ports.
    return f"parent {process_identity(os.getppid())} port {environ.get('MASTER_PORT', '')}"


def is_restart(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether the same command has run before, so that its URLs are known to be right."""
    starts = environ.get(STARTS_VARIABLE, "")
    if starts:
        return starts != "0"
    return any(environ.get(name, "0") not in ("", "0") for name in RESTART_COUNTERS)


def process_identity(pid: int) -> str:
    """MACHINE/PID/START: the same for this process alone, in whatever container; START is 0 if it is gone."""
    return f"{machine()}/{pid}/{_started(pid)}"


def machine() -> str:
    """This boot of this kernel and the namespace in which process ids mean something; empty where unknown."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _started(pid: int) -> int:
    """Clock ticks from boot to a process's start; 0 if it is gone, or only its status is left."""
    known = process_status(pid)
    return 0 if known is None or known[0] in "ZX" else known[1]


def is_gone(process: str) -> bool:
    """Whether a process is known to have ended: only one of this machine and container can be asked."""
    where, pid, began = process.rsplit("/", 2)
    return bool(where) and where == machine() and _started(int(pid)) != int(began)
