"""What the ranks of test_gradient_bytes.py run: optimizer steps under each engine, their bytes counted."""

from __future__ import annotations

from collections import Counter
from typing import Any, Literal

import torch
from torch import nn

from benchmarks.collective_calls import count_calls
from trainer.config.run import Config
from trainer.config.training import DistributedConfig, OptimizerConfig
from trainer.distributed.build import build_engine
from trainer.distributed.env import DistributedEnv

ACCUMULATION = 4
WIDTH = 96


def bytes_of_a_step(env: DistributedEnv, cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of the second step of each case: bytes that this rank sends per parameter, and which calls they are."""
    calls: Counter[str] = Counter()
    count_calls(calls)
    return [_second_step(env, calls, **case) for case in cases]


def _second_step(
    env: DistributedEnv,
    calls: Counter[str],
    *,
    optimizer: Literal["adamw", "adafactor"] = "adamw",
    **distributed: Any,
) -> dict[str, Any]:
    config = Config(
        global_batch_size=ACCUMULATION * env.world_size,
        micro_batch_size=1,
        optimizer=OptimizerConfig(name=optimizer),
        distributed=DistributedConfig(**distributed),
    )
    torch.manual_seed(0)
    layers = [layer for _ in range(4) for layer in (nn.Linear(WIDTH, WIDTH), nn.Tanh())]
    engine = build_engine(nn.Sequential(*layers), config, env)
    sample = torch.randn(1, WIDTH, dtype=engine.compute_dtype)
    during: list[int] = []
    handle = next(engine.module.children()).register_full_backward_hook(
        lambda *_: during.append(calls["reduce_scatter_tensor"] + calls["reduce_scatter_single"])
    )
    for _ in range(2):
        calls.clear()
        for _ in range(ACCUMULATION):
            engine.backward(engine(sample).float().square().mean())
            engine.step(1e-3)
    handle.remove()
    moved = calls.pop("bytes")
    parameters = sum(torch.Size(shape).numel() for shape in engine.parameter_shapes.values())
    return {"bytes": moved / parameters, "calls": dict(calls), "while backward ran": during[-1]}
