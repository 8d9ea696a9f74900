"""`ldm doctor`: checks of this configuration on these machines, in seconds, before days of training."""

from __future__ import annotations

import logging
from collections.abc import Callable

from trainer.config.run import Config
from trainer.distributed.env import DistributedEnv, initialise, shutdown
from trainer.doctor.check import Check
from trainer.doctor.gradients import check_gradients
from trainer.doctor.inputs import check_networks, check_samples, check_shards, check_storage
from trainer.doctor.machine import check_all_reduce, check_clocks, check_disk, check_memory, check_versions
from trainer.exit_codes import ExitCode

logger = logging.getLogger(__name__)

CHECKS: tuple[Callable[[Config, DistributedEnv], list[Check]], ...] = (
    check_versions,
    check_clocks,
    check_all_reduce,
    check_gradients,
    check_storage,
    check_shards,
    check_samples,
    check_networks,
    check_memory,
    check_disk,
)
"""In order of how much of the rest they explain. All are collective."""


def run_doctor(config: Config, env: DistributedEnv) -> list[Check]:
    """All checks; the same list on every rank. Collective; the process group must be initialised."""
    return [check for examine in CHECKS for check in examine(config, env)]


def diagnose(config: Config, env: DistributedEnv) -> ExitCode:
    """Run the checks as a whole process, and show the table: what `ldm doctor` starts on each rank."""
    env = initialise(env, config.distributed.timeout_s)
    try:
        checks = run_doctor(config, env)
    finally:
        shutdown()
    if env.is_main:
        logger.info("doctor, %d ranks on %s:\n%s", env.world_size, env.device.type, format_table(checks))
    failed = [check for check in checks if not check.passed]
    if failed and all(check.machine for check in failed):
        # Another attempt, perhaps on other nodes; it goes without a doctor, since restarts have none.
        return ExitCode.RETRYABLE
    return ExitCode.USER_ERROR if failed else ExitCode.DONE


def format_table(checks: list[Check]) -> str:
    """Name, pass or FAIL, and what was measured; the remedy below each failure."""
    width = max(len(check.name) for check in checks)
    lines = []
    for check in checks:
        lines.append(f"{check.name:{width}}  {'pass' if check.passed else 'FAIL'}  {check.detail}")
        if not check.passed:
            lines.append(f"{'':{width}}        -> {check.remedy}")
    failures = sum(not check.passed for check in checks)
    lines.append(f"{len(checks) - failures} of {len(checks)} checks passed")
    return "\n".join(lines)
