"""Averages against closed forms; swapping in and out leaves nothing behind."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from trainer.config.run import Config
from trainer.config.training import DistributedConfig, EMAConfig
from trainer.distributed.env import DistributedEnv
from trainer.distributed.torch_engine import TorchEngine
from trainer.ema import EMA, exponent_from_std, power_decay, power_profile, std_from_exponent


def make_engine(precision: str = "fp32") -> TorchEngine:
    config = Config(
        global_batch_size=1,
        micro_batch_size=1,
        distributed=DistributedConfig(engine="torch", precision=precision),  # type: ignore[arg-type]
    )
    torch.manual_seed(0)
    return TorchEngine(nn.Linear(3, 2), config, DistributedEnv.detect({}))


def set_weights(engine: TorchEngine, value: float) -> None:
    for fragment in engine.fragments():
        fragment.master.fill_(value)
    engine.refresh()


def trajectory(step: int) -> float:
    return 1.0 + 0.3 * step + (step % 3)


def test_constant_decay_equals_the_weighted_sum() -> None:
    engine = make_engine()
    set_weights(engine, trajectory(0))
    ema = EMA(EMAConfig(decay=0.9, warmup=False), engine.fragments())
    for step in range(1, 21):
        set_weights(engine, trajectory(step))
        ema.update(step)
    expected = 0.9**20 * trajectory(0) + sum(0.1 * 0.9 ** (20 - s) * trajectory(s) for s in range(1, 21))
    assert ema.values("decay")[0][0].item() == pytest.approx(expected, rel=1e-6)


def test_warmup_follows_its_formula_until_the_decay() -> None:
    ema = EMA(EMAConfig(decay=0.9, warmup=True), make_engine().fragments())
    assert [ema.decay("decay", step) for step in (1, 2, 10)] == [2 / 11, 3 / 12, 11 / 20]
    assert ema.decay("decay", 80) == ema.decay("decay", 10_000) == 0.9


@pytest.mark.parametrize("std", [0.05, 0.1, 0.2])
def test_power_profile_equals_its_closed_form(std: float) -> None:
    engine, steps = make_engine(), 40
    ema = EMA(EMAConfig(decay=0.0, power_stds=(std,)), engine.fragments())
    for step in range(1, steps + 1):
        set_weights(engine, trajectory(step))
        ema.update(step)
    power = exponent_from_std(std) + 1
    # The product of (1 - 1/t)^power telescopes: step s weighs (s/T)^power - ((s-1)/T)^power.
    expected = sum(
        ((s / steps) ** power - ((s - 1) / steps) ** power) * trajectory(s) for s in range(1, steps + 1)
    )
    assert ema.profiles == (power_profile(std),)
    assert ema.values(power_profile(std))[0][0].item() == pytest.approx(expected, rel=1e-5)


def test_published_exponents() -> None:
    # EDM2, section 3.1: gamma = 6.94 has a width of 10 % and gamma = 16.97 one of 5 %.
    assert exponent_from_std(0.10) == pytest.approx(6.94, abs=0.005)
    assert exponent_from_std(0.05) == pytest.approx(16.97, abs=0.005)
    for std in (0.002, 0.01, 0.28):
        assert std_from_exponent(exponent_from_std(std)) == pytest.approx(std, rel=1e-9)
    assert power_decay(1, 3.0) == 0.0
    with pytest.raises(ValueError, match=r"0\.2886"):
        exponent_from_std(0.3)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_swapping_computes_with_the_average_and_restores_every_bit(precision: str) -> None:
    engine = make_engine(precision)
    ema = EMA(EMAConfig(decay=0.5, warmup=False), engine.fragments())
    set_weights(engine, 1.1)
    ema.update(1)
    weights = [fragment.master.clone() for fragment in engine.fragments()]
    averages = [value.clone() for value in ema.values("decay")]
    compute = engine.module.weight.clone()
    with ema.swapped(engine, "decay"):
        expected = averages[0].to(engine.compute_dtype)
        assert torch.equal(engine.module.weight.flatten(), expected)
        with pytest.raises(AssertionError):
            ema.update(2)
    assert all(torch.equal(f.master, w) for f, w in zip(engine.fragments(), weights, strict=True))
    assert all(torch.equal(v, a) for v, a in zip(ema.values("decay"), averages, strict=True))
    assert torch.equal(engine.module.weight, compute)


def test_an_error_inside_swaps_back() -> None:
    engine = make_engine()
    ema = EMA(EMAConfig(decay=0.5), engine.fragments())
    set_weights(engine, 3.0)
    with pytest.raises(RuntimeError, match="inside"), ema.swapped(engine, "decay"):
        raise RuntimeError("inside")
    assert (engine.module.weight == 3.0).all()
