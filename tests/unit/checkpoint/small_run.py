"""A one-rank run around a small network, without a process group."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from trainer.checkpoint.manager import CheckpointManager
from trainer.config.run import Config
from trainer.config.training import CheckpointConfig, DistributedConfig, EMAConfig, OptimizerConfig
from trainer.distributed.env import DistributedEnv
from trainer.distributed.torch_engine import TorchEngine
from trainer.ema import EMA


def small_network(width: int = 4) -> nn.Module:
    """Two layers."""
    return nn.Sequential(nn.Linear(3, width), nn.Tanh(), nn.Linear(width, 2))


@dataclass
class SmallRun:
    """Engine, averages and manager."""

    config: Config
    engine: TorchEngine
    ema: EMA
    manager: CheckpointManager

    def train(self, steps: int) -> None:
        """Deterministic updates."""
        for _ in range(steps):
            step = self.engine.optimizer_steps
            x = torch.randn(2, 3, generator=torch.Generator().manual_seed(step))
            self.engine.backward(self.engine(x).square().mean())
            self.engine.step(0.05)
            self.ema.update(step + 1)

    def save(self, state: dict[str, Any] | None = None, loss: float | None = None) -> None:
        """A checkpoint of now, committed."""
        self.begin_save(state, loss)
        self.manager.wait()

    def begin_save(self, state: dict[str, Any] | None = None, loss: float | None = None) -> None:
        """A checkpoint of now."""
        self.manager.save(
            self.engine.optimizer_steps,
            {"unet": self.engine},
            self.ema,
            state=state or {"note": "x"},
            tensors={"latent_scale": torch.full((4,), 0.5)},
            loss=loss,
        )

    def everything(self) -> list[torch.Tensor]:
        """Copies of all state: masters, moments, averages."""
        fragments = self.engine.fragments()
        parts = [f.master for f in fragments]
        parts += [f.moments[key] for f in fragments for key in sorted(f.moments)]
        parts += [value for profile in self.ema.profiles for value in self.ema.values(profile)]
        return [part.clone() for part in parts]


def build_small_run(
    run_dir: str,
    *,
    asynchronous: bool = False,
    keep_last: int = 2,
    keep_every: int = 0,
    keep_best: int = 0,
    width: int = 4,
    ema: EMAConfig | None = None,
    optimizer: OptimizerConfig | None = None,
    seed: int = 0,
) -> SmallRun:
    """A run with everything new."""
    config = Config(
        run_dir=run_dir,
        global_batch_size=2,
        micro_batch_size=2,
        optimizer=optimizer or OptimizerConfig(),
        distributed=DistributedConfig(engine="torch", precision="fp32"),
        checkpoint=CheckpointConfig(
            asynchronous=asynchronous, keep_last=keep_last, keep_every=keep_every, keep_best=keep_best
        ),
        ema=ema or EMAConfig(decay=0.9, power_stds=(0.1,)),
    )
    env = DistributedEnv.detect({})
    torch.manual_seed(seed)
    engine = TorchEngine(small_network(width), config, env)
    return SmallRun(config, engine, EMA(config.ema, engine.fragments()), CheckpointManager(config, env))
