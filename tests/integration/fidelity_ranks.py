"""What the ranks of test_fidelity_ranks.py run."""

from __future__ import annotations

import io
import sys
from contextlib import redirect_stderr

import torch.distributed as dist

from trainer.distributed import env as environment
from trainer.distributed.env import DistributedEnv


def evaluate(env: DistributedEnv, arguments: list[str]) -> list[object]:
    """Exit code and error of `ldm evaluate`, which joins and leaves the process group by itself."""
    from trainer.__main__ import main

    dist.destroy_process_group()  # that of the tests' own start
    environment._environment_before.clear()
    errors = io.StringIO()
    with redirect_stderr(errors):
        code = main(["evaluate", *arguments])
    sys.stderr.write(errors.getvalue())
    environment.initialise(env, timeout_s=60.0)
    said = [line for line in errors.getvalue().splitlines() if line.startswith("ldm: ")]
    return [code, said]
