"""What the ranks of the layout test run: load what is there, train on, save, compare digests."""

from __future__ import annotations

import dataclasses
import hashlib
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tests.integration.whole_parameters import gather_full
from trainer.checkpoint.manager import CheckpointManager
from trainer.config.run import Config
from trainer.config.training import CheckpointConfig, DistributedConfig, EMAConfig, OptimizerConfig
from trainer.distributed.build import build_engine
from trainer.distributed.engine import Engine
from trainer.distributed.env import DistributedEnv
from trainer.ema import EMA

GLOBAL_BATCH = 12


def train_leg(
    env: DistributedEnv,
    run_dir: str,
    engine: str,
    zero_stage: int,
    first_step: int,
    steps: int,
    precision: str = "fp32",
    asynchronous: bool = True,
    shard_ranks: int = 0,
    optimizer: Literal["adamw", "muon", "adafactor"] = "adamw",
) -> dict[str, Any]:
    """One leg of a run: from the newest checkpoint (if `first_step`) through `steps` steps to the next."""
    config = Config(
        run_dir=run_dir,
        global_batch_size=GLOBAL_BATCH,
        micro_batch_size=1,
        optimizer=OptimizerConfig(learning_rate=1e-2, max_grad_norm=0.5, name=optimizer),
        distributed=DistributedConfig(
            engine=engine, zero_stage=zero_stage, precision=precision, shard_ranks=shard_ranks
        ),
        ema=EMAConfig(decay=0.9, power_stds=(0.1,)),
        checkpoint=CheckpointConfig(asynchronous=asynchronous),
    )
    torch.manual_seed(0 if first_step == 0 else 99)
    networks = {
        "unet": nn.Sequential(nn.Linear(5, 13), nn.SiLU(), nn.Linear(13, 13), nn.SiLU(), nn.Linear(13, 3)),
        "other": nn.Sequential(nn.Linear(5, 3), nn.Tanh(), nn.Linear(3, 1)),
    }
    engines = {name: build_engine(network, config, env) for name, network in networks.items()}
    ema = EMA(config.ema, engines["unet"].fragments())
    manager = CheckpointManager(config, env)
    handle = manager.latest_good()
    if first_step:
        assert handle is not None
        assert handle.step == first_step
        assert manager.load(handle, engines, ema).state == {"step": first_step}
    loaded = _digests(engines, ema)
    outputs = _outputs(engines, ema)
    losses = [_step(env, config, engines, ema, step) for step in range(first_step, first_step + steps)]
    last = first_step + steps
    saved = _digests(engines, ema)
    manager.save(last, engines, ema, state={"step": last}, tensors={}, loss=None)
    manager.wait()
    manager.close()
    return {"loaded": loaded, "outputs": outputs, "losses": losses, "saved": saved}


def _step(env: DistributedEnv, config: Config, engines: dict[str, Engine], ema: EMA, step: int) -> float:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(GLOBAL_BATCH, 5, generator=generator)
    accumulation = config.accumulation(env.world_size)
    total = torch.zeros(())
    for micro in range(accumulation):
        sample = x[micro * env.world_size + env.rank][None]
        for name, engine in engines.items():
            loss = (engine(sample.to(engine.compute_dtype)).float() - sample.sum()).square().mean()
            engine.backward(loss)
            engine.step(1e-2)
            total += loss.detach() * (name == "unet")
    ema.update(step + 1)
    if env.world_size > 1:
        torch.distributed.all_reduce(total)
    return float(total) / GLOBAL_BATCH


def _digests(engines: dict[str, Engine], ema: EMA) -> dict[str, str]:
    """SHA-256 of every whole tensor of state, gathered on rank 0."""
    found: dict[str, str] = {}
    for name, engine in engines.items():
        fragments = engine.fragments()
        views: dict[str, list[Tensor]] = {"master": [f.master for f in fragments]}
        views |= {key: [f.moments[key] for f in fragments] for key in engine.moments}
        if fragments is ema.fragments:
            views |= {profile: ema.values(profile) for profile in ema.profiles}
        for kind, values in views.items():
            parts = [dataclasses.replace(f, master=v) for f, v in zip(fragments, values, strict=True)]
            for parameter, whole in gather_full(engine.parameter_shapes, parts, engine.device):
                digest = hashlib.sha256(whole.contiguous().numpy().tobytes()).hexdigest()
                found[f"{name}.{kind}.{parameter}"] = digest
        for key, whole in engine.whole_state.items():
            found[f"{name}.{key}"] = hashlib.sha256(whole.numpy().tobytes()).hexdigest()
        found[f"{name}.steps"] = str(engine.optimizer_steps)
    return found


def _outputs(engines: dict[str, Engine], ema: EMA) -> list[float]:
    """What the networks compute with the loaded weights and with the averages, on this rank."""
    x = torch.ones(1, 5)
    with torch.no_grad():
        plain = [float(e(x.to(e.compute_dtype)).sum()) for e in engines.values()]
        with ema.swapped(engines["unet"], "decay"), engines["unet"].gathered():
            averaged = float(engines["unet"](x.to(engines["unet"].compute_dtype)).sum())
    return [*plain, averaged]
