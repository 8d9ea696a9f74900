"""Averages after the fact: exact where theory says so, close to the directly kept ones elsewhere."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from trainer.checkpoint.manager import CheckpointManager
from trainer.cli.ema import reconstruct
from trainer.config.io import load_config
from trainer.config.run import Config, ConfigError
from trainer.config.training import DistributedConfig, EMAConfig
from trainer.distributed.env import DistributedEnv
from trainer.distributed.torch_engine import TorchEngine
from trainer.ema import EMA, Profile, exponent_from_std, fit, inner_product
from trainer.weights import read_weights

STEPS, EVERY = 400, 40
STORED = (0.05, 0.1)


def stored_profiles() -> list[Profile]:
    return [
        Profile(exponent_from_std(std), step) for std in STORED for step in range(EVERY, STEPS + 1, EVERY)
    ]


@pytest.mark.parametrize(
    ("a", "b"), [((3.0, 10), (6.0, 20)), ((16.97, 20), (6.94, 20)), ((0.0, 5), (2.0, 9))]
)
def test_inner_product_equals_numerical_integration(a: tuple[float, int], b: tuple[float, int]) -> None:
    t = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000 * min(a[1], b[1])
    densities = [(gamma + 1) * t**gamma / step ** (gamma + 1) for gamma, step in (a, b)]
    expected = float((densities[0] * densities[1]).mean() * min(a[1], b[1]))
    assert inner_product(Profile(*a), Profile(*b)) == pytest.approx(expected, rel=1e-6)


def test_a_stored_profile_is_found_exactly() -> None:
    profiles = stored_profiles()
    coefficients, error = fit(profiles, profiles[7])
    assert error < 1e-5
    assert coefficients[7] == pytest.approx(1.0, abs=1e-4)


@pytest.mark.parametrize("std", [0.06, 0.075, 0.12])
def test_other_profiles_are_fitted_and_keep_constants(std: float) -> None:
    coefficients, error = fit(stored_profiles(), Profile(exponent_from_std(std), STEPS))
    assert error < 0.02
    assert coefficients.sum() == pytest.approx(1.0, abs=1e-9)


def position(step: int) -> float:
    """A smooth path of the one weight."""
    return 2.0 + (step / STEPS) ** 2 - 0.5 * step / STEPS


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, EMA]:
    """A run with snapshots, and what directly kept averages came to."""
    config = Config(
        run_dir=str(tmp_path_factory.mktemp("run")),
        global_batch_size=1,
        micro_batch_size=1,
        distributed=DistributedConfig(engine="torch", precision="fp32"),
        ema=EMAConfig(decay=0.99, power_stds=STORED, snapshot_every=EVERY),
    )
    env = DistributedEnv.detect({})
    engine = TorchEngine(nn.Linear(2, 1), config, env)
    ema = EMA(config.ema, engine.fragments())
    truth = EMA(EMAConfig(decay=0.0, power_stds=(0.05, 0.075, 0.15)), engine.fragments())
    manager = CheckpointManager(config, env)
    for step in range(1, STEPS + 1):
        for fragment in engine.fragments():
            fragment.master.fill_(position(step))
        ema.update(step)
        truth.update(step)
        if step % EVERY == 0:
            manager.save_snapshot(step, {"unet": engine}, ema, tensors={"latent_scale": torch.ones(4)})
    manager.wait()
    manager.close()
    return config.run_dir, truth


@pytest.mark.parametrize("std", [0.05, 0.075, 0.15])
def test_reconstruction_matches_the_kept_average(run: tuple[str, EMA], std: float, tmp_path: Path) -> None:
    run_dir, truth = run
    made = reconstruct(run_dir, str(tmp_path / "ema.safetensors"), std=std)
    tensors, metadata = read_weights(made.destination)
    assert metadata["profile"] == f"power_{std:g}"
    assert json.loads(metadata["config"])["run_dir"] == run_dir
    assert tensors["latent_scale"].tolist() == [1, 1, 1, 1]
    expected = truth.values(f"power_{std:g}")[0][0].item()
    # Over the whole path the weight moves by 0.5: the tolerance is 0.2 % of that.
    assert tensors["weight"].flatten().tolist() == pytest.approx([expected] * 2, abs=1e-3)
    assert made.num_averages == 1 if std == 0.05 else made.num_averages > 1


def test_snapshots_of_no_average_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"ema\.power_stds names none; set it"):
        load_config(None, ["ema.snapshot_every=100"])
    load_config(None, ["ema.snapshot_every=100", "ema.power_stds=[0.1]"])


def test_mistakes_are_explained(run: tuple[str, EMA], tmp_path: Path) -> None:
    target = str(tmp_path / "ema.safetensors")
    with pytest.raises(ConfigError, match="snapshot_every"):
        reconstruct(str(tmp_path), target, std=0.1)
    with pytest.raises(ConfigError, match="later step"):
        reconstruct(run[0], target, std=0.1, step=3)
    with pytest.raises(ConfigError, match=r"0\.2886"):
        reconstruct(run[0], target, std=0.5)
    with pytest.raises(ConfigError, match=r"newest snapshot of .* is of step 400.*until step 401"):
        reconstruct(run[0], target, std=0.1, step=401)
    for destination in ("", str(tmp_path / "ema.pt")):
        with pytest.raises(ConfigError, match=r"name a file or folder|let it end in .safetensors"):
            reconstruct(run[0], destination, std=0.1)
    assert list(tmp_path.iterdir()) == []
    made = reconstruct(run[0], str(tmp_path / "there"), std=0.05, step=STEPS)
    assert made.destination == str(tmp_path / "there/weights.safetensors")
