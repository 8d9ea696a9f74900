"""The plain engine on one rank: boundaries, rates, bad gradients, fragments, bf16 masters."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.integration.whole_parameters import whole_weights
from trainer.config.run import Config
from trainer.config.training import DistributedConfig, OptimizerConfig
from trainer.distributed.env import DistributedEnv
from trainer.distributed.torch_engine import TorchEngine


def make_engine(precision: str = "fp32", accumulation: int = 2) -> TorchEngine:
    config = Config(
        global_batch_size=2 * accumulation,
        micro_batch_size=2,
        optimizer=OptimizerConfig(max_grad_norm=0.0, weight_decay=0.0),
        distributed=DistributedConfig(engine="torch", precision=precision),  # type: ignore[arg-type]
    )
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    network[0].bias.requires_grad_(False)
    return TorchEngine(network, config, DistributedEnv.detect({}))


def micro_step(engine: TorchEngine, rate: float = 0.1, scale: float = 1.0) -> torch.Tensor | None:
    engine.backward(scale * engine(torch.ones(2, 3, dtype=engine.compute_dtype)).float().square().mean())
    return engine.step(rate)


def test_updates_at_the_boundary_only() -> None:
    engine = make_engine()
    before = engine.module[0].weight.clone()
    assert micro_step(engine) is None
    assert torch.equal(engine.module[0].weight, before)
    norm = micro_step(engine)
    assert norm is not None
    assert norm > 0
    assert not torch.equal(engine.module[0].weight, before)
    assert engine.optimizer_steps == 1


def test_frozen_parameters_are_not_trained() -> None:
    engine = make_engine(accumulation=1)
    before = engine.module[0].bias.clone()
    micro_step(engine)
    assert torch.equal(engine.module[0].bias, before)
    assert "0.bias" not in engine.parameter_shapes


def test_the_rate_is_that_of_the_step() -> None:
    engine = make_engine(accumulation=1)
    before = engine.module[2].bias.clone()
    micro_step(engine, rate=0.25)
    # Adam's first step has the size of the rate, whatever the gradient.
    assert (engine.module[2].bias - before).abs().tolist() == pytest.approx([0.25, 0.25], rel=1e-4)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_gradient_changes_nothing_and_is_reported(bad: float) -> None:
    engine = make_engine(accumulation=1)
    before = [fragment.master.clone() for fragment in engine.fragments()]
    norm = micro_step(engine, scale=bad)
    assert norm is not None
    assert not torch.isfinite(norm)
    assert engine.optimizer_steps == 0
    assert all(torch.equal(f.master, b) for f, b in zip(engine.fragments(), before, strict=True))
    good = micro_step(engine)
    assert good is not None
    assert torch.isfinite(good)


def test_moments_exist_before_the_first_step() -> None:
    for fragment in make_engine().fragments():
        assert fragment.moments.keys() == {"exp_avg", "exp_avg_sq"}
        assert all((moment == 0).all() for moment in fragment.moments.values())


def test_steps_set_is_what_adam_corrects_with() -> None:
    engine, again = make_engine(accumulation=1), make_engine(accumulation=1)
    for _ in range(3):
        micro_step(engine)
    for source, target in zip(engine.fragments(), again.fragments(), strict=True):
        target.master.copy_(source.master)
        for key, moment in source.moments.items():
            target.moments[key].copy_(moment)
    again.optimizer_steps = engine.optimizer_steps
    again.refresh(moments=True)
    micro_step(engine)
    micro_step(again)
    for left, right in zip(engine.fragments(), again.fragments(), strict=True):
        assert torch.equal(left.master, right.master)


def test_bf16_keeps_fp32_masters_that_small_updates_move() -> None:
    engine = make_engine("bf16", accumulation=1)
    assert engine.module[2].weight.dtype == torch.bfloat16
    torch.manual_seed(0)
    initial = nn.Linear(3, 4).weight.detach()  # the first layer's draw
    assert torch.equal(engine.fragments()[0].master, initial.flatten())
    before = engine.fragments()[0].master.clone()
    micro_step(engine, rate=1e-6)
    assert not torch.equal(engine.fragments()[0].master, before)


def test_fragments_make_whole_parameters() -> None:
    engine = make_engine()
    full = whole_weights(engine)
    assert {name: tuple(value.shape) for name, value in full.items()} == engine.parameter_shapes
    assert torch.equal(full["2.weight"], engine.module[2].weight)
