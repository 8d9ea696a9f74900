"""What the ranks of test_step_profile.py run."""

from __future__ import annotations

import torch

from trainer.distributed import collectives
from trainer.distributed.env import DistributedEnv
from trainer.exit_codes import StopRequest
from trainer.metrics.step_profile import StepProfiler
from trainer.reliability.requests import ProfileRequest


def profiled(env: DistributedEnv, run_dir: str) -> list[bool]:
    """Whether this rank records after each of six step boundaries; rank 0 is asked before the second."""
    profiler = StepProfiler(run_dir, env)
    recording = []
    for step in range(1, 7):
        torch.ones(4, 4) @ torch.ones(4, 4)
        if step == 2 and env.is_main:
            profiler.ask(ProfileRequest("abc", steps=2, ranks=(1, 7)))
        agreed = collectives.agree(
            StopRequest.NONE, data_lost=False, save_failed=False, losses=[], profile=profiler.asked
        )
        profiler.turn(step, agreed.profile)
        recording.append(torch.autograd._profiler_enabled())
    profiler.close(6)
    return recording
