"""The autoencoder stage gives the same weights on any number of ranks and at every ZeRO stage."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.integration.ranks import run_ranks
from trainer.weights import read_weights

RANKS = "tests/unit/stages/autoencoder_ranks.py:train_autoencoder"


def train_on(
    folder: Path, world_size: int, engine: str, zero_stage: int, name: str
) -> dict[str, torch.Tensor]:
    """What the ranks leave: weights, latent statistics and the last metrics."""
    output = folder / f"{engine}{zero_stage}{name}{world_size}.safetensors"
    settings = {"engine_name": engine, "zero_stage": zero_stage, "name": name, "output": str(output)}
    run_ranks(RANKS, world_size, settings)
    return read_weights(str(output))[0]


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, torch.Tensor]]:
    """One rank, four micro-batches, plain torch."""
    folder = tmp_path_factory.mktemp("reference")
    return {name: train_on(folder, 1, "torch", 0, name) for name in ("kl", "vq")}


def assert_same(made: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert made.keys() == expected.keys()
    assert any(name.startswith("discriminator.") for name in made)
    assert "autoencoder.logvar" in made
    for name, value in expected.items():
        # Steps are up to 1e-3 long, so a gradient that is wrong by a percent is well above 5e-6. What
        # stays below is rounding, which ReLU and the codebook's choices amplify from step to step.
        torch.testing.assert_close(made[name], value, rtol=2e-3, atol=5e-6, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.slow
def test_two_ranks_equal_one_with_accumulation(
    tmp_path: Path, reference: dict[str, dict[str, torch.Tensor]]
) -> None:
    assert_same(train_on(tmp_path, 2, "torch", 0, "vq"), reference["vq"])


@pytest.mark.parametrize(
    ("engine", "zero_stage", "name"), [("torch", 0, "vq"), ("torch", 0, "kl"), ("deepspeed", 3, "vq")]
)
def test_three_ranks_equal_one(
    tmp_path: Path, reference: dict[str, dict[str, torch.Tensor]], engine: str, zero_stage: int, name: str
) -> None:
    """Of four micro-batches one rank has two; the others' second one weighs nothing, in no statistic."""
    assert_same(train_on(tmp_path, 3, engine, zero_stage, name), reference[name])


@pytest.mark.slow
@pytest.mark.parametrize(("name", "zero_stage"), [("vq", 0), ("kl", 1), ("vq", 2), ("kl", 3)])
def test_zero_stages_equal_plain_torch(
    tmp_path: Path, reference: dict[str, dict[str, torch.Tensor]], name: str, zero_stage: int
) -> None:
    assert_same(train_on(tmp_path, 2, "deepspeed", zero_stage, name), reference[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["kl", "vq"])
def test_fsdp_equals_plain_torch(
    tmp_path: Path, reference: dict[str, dict[str, torch.Tensor]], name: str
) -> None:
    assert_same(train_on(tmp_path, 2, "fsdp", 1, name), reference[name])
