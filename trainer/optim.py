"""Parameter groups and the learning rate as a pure function of the step."""

from __future__ import annotations

import math

from trainer.config.training import OptimizerConfig


def learning_rate(config: OptimizerConfig, step: int, total_steps: int) -> float:
    """Rate of optimizer step `step` (counted from 0): linear warm-up, then the schedule."""
    peak = config.learning_rate
    if step < config.warmup_steps:
        return peak * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return peak
    if config.schedule == "inverse_sqrt":
        reference = max(config.warmup_steps, 1)
        return peak * math.sqrt(reference / max(step + 1, reference))
    span = max(total_steps - config.warmup_steps, 1)
    progress = min((step - config.warmup_steps) / span, 1.0)
    remaining = 1 - progress if config.schedule == "linear" else (1 + math.cos(math.pi * progress)) / 2
    return peak * (config.final_fraction + (1 - config.final_fraction) * remaining)
