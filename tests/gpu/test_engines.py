"""DeepSpeed and the plain engine on one GPU in bf16: the same losses, state that survives a save."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from trainer.checkpoint.manager import CheckpointManager
from trainer.config.models import UNetConfig
from trainer.config.run import Config
from trainer.config.training import DistributedConfig, EMAConfig
from trainer.distributed.build import build_engine
from trainer.distributed.engine import Engine
from trainer.distributed.env import DistributedEnv
from trainer.ema import EMA
from trainer.models.unet import UNet

SMALL = UNetConfig(
    model_channels=32,
    channel_multipliers=(1, 2),
    num_res_blocks=1,
    attention_factors=(1, 2),
    head_dim=16,
    num_groups=8,
)
ACCUMULATION = 2
RATE = 1e-3


def make_config(run_dir: Path, **distributed: Any) -> Config:
    return Config(
        run_dir=str(run_dir),
        global_batch_size=2 * ACCUMULATION,
        micro_batch_size=2,
        ema=EMAConfig(decay=0.9),
        distributed=DistributedConfig(precision="bf16", **distributed),
    )


def make_engine(config: Config, env: DistributedEnv) -> Engine:
    torch.manual_seed(0)
    unet = UNet(SMALL, in_channels=4, out_channels=4, context_dim=24)
    for parameter in unet.parameters():  # zeroed outputs would hide everything behind them
        torch.nn.init.normal_(parameter, std=0.05)
    return build_engine(unet, config, env)


def train(engine: Engine, ema: EMA | None, first: int, last: int) -> list[float]:
    """Loss of each micro-batch of the optimizer steps first .. last - 1, a function of the step alone."""
    losses: list[Tensor] = []
    for step in range(first, last):
        for micro in range(ACCUMULATION):
            drawn = torch.Generator(engine.device).manual_seed(100 * step + micro)

            def normal(*shape: int, drawn: torch.Generator = drawn) -> Tensor:
                return torch.randn(shape, generator=drawn, device=engine.device).to(engine.compute_dtype)

            x = normal(2, 4, 16, 16).contiguous(memory_format=torch.channels_last)
            timesteps = torch.tensor([step, 500], device=engine.device)
            loss = (engine(x, timesteps, normal(2, 7, 24)).float() - x.float()).square().mean()
            engine.backward(loss)
            engine.step(RATE)
            losses.append(loss.detach())
        if ema is not None:
            ema.update(step + 1)
    return [float(loss) for loss in losses]


def state(engine: Engine, ema: EMA) -> list[Tensor]:
    """Copies of masters, moments and averages."""
    parts = []
    for fragment in engine.fragments():
        parts += [fragment.master, *(fragment.moments[key] for key in sorted(fragment.moments))]
    return [part.clone() for part in (*parts, *ema.values("decay"))]


def assert_same_gradients(one: Engine, other: Engine) -> None:
    """As Adam's first moments have added them up."""
    for mine, theirs in zip(one.fragments(), other.fragments(), strict=True):
        added = theirs.moments["exp_avg"]
        assert float((mine.moments["exp_avg"] - added).norm()) < 5e-2 * float(added.norm()) + 1e-6


@pytest.mark.parametrize("layout", [*({"zero_stage": stage} for stage in range(4)), {"engine": "fsdp"}])
def test_sharded_engines_train_as_the_plain_one(
    layout: dict[str, Any], env: DistributedEnv, tmp_path: Path
) -> None:
    plain = train(make_engine(make_config(tmp_path, engine="torch"), env), None, 0, 4)
    sharded = train(make_engine(make_config(tmp_path, **layout), env), None, 0, 4)
    assert plain[-1] < plain[0]
    assert sharded == pytest.approx(plain, rel=2e-2)


@pytest.mark.parametrize("engine_name", ["deepspeed", "fsdp", "torch"])
def test_a_saved_run_goes_on_as_if_it_had_not_stopped(
    engine_name: str, env: DistributedEnv, tmp_path: Path
) -> None:
    config = make_config(tmp_path, engine=engine_name)
    engine = make_engine(config, env)
    ema = EMA(config.ema, engine.fragments())
    manager = CheckpointManager(config, env)
    train(engine, ema, 0, 3)
    wanted = state(engine, ema)
    manager.save(3, {"unet": engine}, ema, state={"note": "x"}, tensors={}, loss=None)
    unbroken = train(engine, ema, 3, 6)  # goes on while the checkpoint is written
    manager.wait()

    again = make_engine(config, env)
    its_ema = EMA(config.ema, again.fragments())
    handle = manager.latest_good()
    assert handle is not None
    manager.load(handle, {"unet": again}, its_ema)
    manager.close()
    assert again.optimizer_steps == 3
    for mine, stored in zip(state(again, its_ema), wanted, strict=True):
        assert torch.equal(mine, stored)
    # Convolutions may add their gradients' parts in another order.
    assert train(again, its_ema, 3, 6) == pytest.approx(unbroken, rel=1e-2)


@pytest.mark.parametrize("graphs", [False, True], ids=["eager", "graphs"])
@pytest.mark.parametrize("engine_name", ["deepspeed", "torch"])
def test_kernels_kept_channels_last_keep_losses(
    engine_name: str, graphs: bool, env: DistributedEnv, tmp_path: Path
) -> None:
    """Their gradients reach the flat vector in its own order, whichever way they lie."""
    settings = {"engine": engine_name, "cuda_graphs": graphs}
    flat = make_engine(make_config(tmp_path, **settings, channels_last_kernels=False), env)
    kept = make_engine(make_config(tmp_path, **settings), env)
    losses = train(flat, None, 0, 4)
    assert losses[-1] < losses[0]
    assert train(kept, None, 0, 4) == pytest.approx(losses, rel=1e-2)
    assert_same_gradients(kept, flat)


def test_compiled_regions_keep_losses_under_deepspeed(env: DistributedEnv, tmp_path: Path) -> None:
    plain = train(make_engine(make_config(tmp_path, zero_stage=1), env), None, 0, 3)
    compiled = train(make_engine(make_config(tmp_path, zero_stage=1, compile=True), env), None, 0, 3)
    assert compiled == pytest.approx(plain, rel=2e-2)


@pytest.mark.parametrize("stage", [1, 2])
def test_graphs_keep_losses_and_gradients_under_deepspeed(
    stage: int, env: DistributedEnv, tmp_path: Path
) -> None:
    """Adam makes the same step of twice a gradient; its moments do not."""
    plain = make_engine(make_config(tmp_path, zero_stage=stage), env)
    graphed = make_engine(make_config(tmp_path, zero_stage=stage, cuda_graphs=True), env)
    losses = train(plain, None, 0, 4)
    assert losses[-1] < losses[0]
    # Convolutions may add their gradients' parts in another order.
    assert train(graphed, None, 0, 4) == pytest.approx(losses, rel=1e-2)
    assert_same_gradients(graphed, plain)
