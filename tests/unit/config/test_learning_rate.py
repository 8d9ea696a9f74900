"""Learning-rate corners."""

from __future__ import annotations

import pytest

from trainer.config.io import load_config
from trainer.config.run import ConfigError
from trainer.config.training import OptimizerConfig


def test_warmup_reaches_the_peak_and_never_starts_at_zero() -> None:
    config = OptimizerConfig(learning_rate=1.0, warmup_steps=4)
    assert [config.rate(s, 100) for s in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_decay_ends_at_the_final_fraction(schedule: str) -> None:
    config = OptimizerConfig(
        learning_rate=2.0,
        warmup_steps=10,
        schedule=schedule,  # type: ignore[arg-type]
        final_fraction=0.1,
    )
    assert config.rate(10, 110) == pytest.approx(2.0)
    assert config.rate(60, 110) == pytest.approx(1.1)
    assert config.rate(110, 110) == pytest.approx(0.2)


def test_inverse_sqrt() -> None:
    config = OptimizerConfig(learning_rate=1.0, warmup_steps=100, schedule="inverse_sqrt")
    assert config.rate(399, 10_000) == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["optimizer.name=muon", "distributed.zero_stage=1"], "has one rate for everything"),
        (["optimizer.name=adafactor"], "has one rate for everything"),
        (["stage=autoencoder", "first_stage.name=kl"], "stage=autoencoder does not have"),
    ],
)
def test_a_rate_of_conditioners_that_cannot_be_is_refused(settings: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        load_config(None, ["optimizer.conditioner_learning_rate=1e-5", *settings])
