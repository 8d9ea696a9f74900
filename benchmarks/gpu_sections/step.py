"""One whole optimizer step in this process, on one batch again and again: the card without a loader."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from gpu_sections.recipe import Setup
from gpu_sections.timing import forget, measure, peak_gib, profile_kinds
from trainer.assembly import build_run
from trainer.distributed.env import DistributedEnv, initialise, shutdown

LEARNING_RATE = 1e-5


def plain(setup: Setup) -> None:
    """As configured by default."""
    whole_step(setup, [])


def compiled(setup: Setup) -> None:
    """With `distributed.compile`."""
    whole_step(setup, ["distributed.compile=true"])


def graphs(setup: Setup) -> None:
    """With `distributed.cuda_graphs`."""
    if setup.device.type != "cuda":
        setup.report(skipped="no GPU, no CUDA graphs")
        return
    whole_step(setup, ["distributed.cuda_graphs=true"])


def whole_step(setup: Setup, overrides: Sequence[str]) -> None:
    """Encode, forward, backward, clip, AdamW and EMA of 2 micro-batches: time, phases, memory, kernels."""
    micro = setup.batch(32)
    config = setup.config(
        overrides=[
            f"run_dir={setup.work}/run-{setup.result.stem}",
            f"global_batch_size={2 * micro}",
            f"micro_batch_size={micro}",
            "distributed.ranks=1",
            "logging.wandb=disabled",
            "logging.progress_bar=false",
            "data.workers=1",
            *overrides,
        ]
    )
    env = DistributedEnv.detect()
    if setup.small:
        env = dataclasses.replace(env, device=setup.device)
    env = initialise(env, timeout_s=600.0)
    run = build_run(config, env)
    batches = run.open_loader()
    batch = next(batches).to(env.device)
    batches.close()
    taken = 0

    def step() -> None:
        nonlocal taken
        run.stage.train_step(batch, taken, LEARNING_RATE)
        taken += 1
        with run.timer("optimizer"):
            run.ema.update(taken)

    for _ in range(1 if setup.small else 3):
        step()
    forget()
    run.timer.take()
    repeats = setup.repeats // 2
    times = measure(step, env.device, repeats=repeats, warm_up=0)
    phases = {
        f"{name}_ms": 1e3 * s / (repeats + (env.device.type == "cuda"))
        for name, s in run.timer.take().items()
    }
    setup.report(**times, **phases, images_per_s=2e3 * micro / times["ms"], peak_gib=peak_gib())
    setup.report(kernels=profile_kinds(step, env.device, top=60))
    run.close()
    shutdown()
