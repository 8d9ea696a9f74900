"""What the ranks of test_fidelity_ranks.py run."""

from __future__ import annotations

import io
import os
import sys
from contextlib import redirect_stderr

from trainer.distributed.env import DistributedEnv, shutdown


def evaluate(env: DistributedEnv, arguments: list[str]) -> list[object]:
    """Exit code and error of `ldm evaluate`, which joins and leaves the process group by itself."""
    from trainer.__main__ import main

    shutdown()  # leaves the group of the tests' own start, whose store may still listen on its port
    for name, value in env.variables().items():
        os.environ[name] = value
    os.environ["MASTER_PORT"] = str(env.master_port + 1)
    errors = io.StringIO()
    with redirect_stderr(errors):
        code = main(["evaluate", *arguments])
    sys.stderr.write(errors.getvalue())
    return [code, [line for line in errors.getvalue().splitlines() if line.startswith("ldm: ")]]
