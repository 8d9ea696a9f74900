"""How a rank knows that the run has been started before."""

from __future__ import annotations

import os
from collections.abc import Mapping

RESTARTS_VARIABLE = "LDM_RESTARTS"
"""Environment variable that tells a rank how often its launcher has restarted the run."""

_COUNTERS = (RESTARTS_VARIABLE, "SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT")


def is_restart(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether the same command has run before, so that its URLs are known to be right."""
    return any(environment.get(name, "0") not in ("", "0") for name in _COUNTERS)
