"""What the ranks of test_validation_ranks.py run: networks of given weights, measured on held-out samples."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor

from trainer.assembly import build_run
from trainer.config.io import load_config
from trainer.distributed.engine import Fragment
from trainer.distributed.env import DistributedEnv
from trainer.reliability.watchdog import Watchdog
from trainer.run import Run
from trainer.validation import validate


def measure(env: DistributedEnv, settings: list[str]) -> dict[str, float]:
    """The figures of one validation, of weights and averages that depend on parameters' names alone."""
    run = build_run(load_config(None, settings), env)
    try:
        scatter(run)
        validate(run, Watchdog(0))
        return run.measured[1]
    finally:
        run.close()


def scatter(run: Run) -> None:
    """Give every trained parameter random values, and its average others."""
    engine = run.stage.engines[run.stage.averaged]
    fragments = engine.fragments()
    for fragment, average in zip(fragments, run.ema.values("decay"), strict=True):
        fragment.master.copy_(values(fragment, "weights"))
        average.copy_(values(fragment, "averages"))
    engine.refresh()


def values(fragment: Fragment, what: str) -> Tensor:
    """This rank's part of the values of a parameter."""
    seed = int.from_bytes(hashlib.sha256(f"{what} {fragment.name}".encode()).digest()[:4], "little")
    whole = torch.randn(torch.Size(fragment.shape).numel(), generator=torch.Generator().manual_seed(seed))
    return 0.1 * whole[fragment.start : fragment.start + fragment.master.numel()]


def several(env: DistributedEnv, runs: dict[str, list[str]]) -> dict[str, Any]:
    """`measure` of several runs, one after another: processes take long to start."""
    return {name: measure(env, settings) for name, settings in runs.items()}
