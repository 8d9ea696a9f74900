"""The learned uncertainty of EDM2: its least loss, its gradients, its features, and that it is learned."""

from __future__ import annotations

import math

import pytest
import torch

from trainer.config.io import load_config
from trainer.config.run import ConfigError
from trainer.config.training import DiffusionConfig
from trainer.diffusion.objective import (
    add_noise,
    draw_timesteps,
    loss_per_sample,
    weigh_by_uncertainty,
)
from trainer.diffusion.parameterization import from_x0
from trainer.diffusion.processes import make_process
from trainer.model import LevelUncertainty, build_model
from trainer.rng import Purpose, normal, uniform


def test_the_loss_is_least_where_e_to_the_u_is_the_expected_loss():
    """l / e^u + u (Karras et al. 2024, equation 21): 1 + ln(l) at u = ln(l), with gradient 1 - l / e^u."""
    losses = torch.tensor([1e-3, 0.2, 1.0, 40.0], dtype=torch.float64)
    u = losses.log().requires_grad_()
    total = weigh_by_uncertainty(losses, u)
    torch.testing.assert_close(total, 1 + losses.log())
    (gradient,) = torch.autograd.grad(total.sum(), u)
    torch.testing.assert_close(gradient, torch.zeros(4, dtype=torch.float64), rtol=0, atol=1e-12)
    for offset in (-1.0, 0.3):
        away = (losses.log() + offset).requires_grad_()
        total = weigh_by_uncertainty(losses, away)
        assert (total > 1 + losses.log()).all()
        (gradient,) = torch.autograd.grad(total.sum(), away)
        torch.testing.assert_close(gradient, (1 - torch.tensor(-offset).exp()).double().expand(4))


def test_it_changes_nothing_at_first_and_divides_the_gradient_later():
    network = LevelUncertainty(1 / 1000)
    timesteps = torch.tensor([1, 400, 999])
    assert torch.equal(network(timesteps), torch.zeros(3))
    error = torch.tensor([0.5, 1.0, 2.0], requires_grad=True)
    assert torch.equal(weigh_by_uncertainty(error, network(timesteps)), error)
    torch.nn.init.constant_(network.linear.bias, math.log(4.0))
    (gradient,) = torch.autograd.grad(weigh_by_uncertainty(error, network(timesteps)).sum(), error)
    torch.testing.assert_close(gradient, torch.full((3,), 0.25))


def test_the_features_have_the_law_of_edm2_s_random_ones():
    """Normal frequencies and even phases: E[f(t) f(s)] is about exp(-2 pi^2 (t - s)^2)."""
    network = LevelUncertainty(1.0, num_features=4096)
    times = torch.linspace(-1, 1, 9)
    features = network.features(times)
    products = features @ features.T / 4096
    expected = torch.exp(-2 * math.pi**2 * (times[:, None] - times[None]) ** 2)
    torch.testing.assert_close(products, expected, rtol=0, atol=0.06)


OBJECTIVES = {
    "eps": {},
    "flow": {"process": "flow", "prediction": "velocity", "density": "logit_normal"},
    "edm": {"process": "edm", "prediction": "edm", "density": "log_normal", "sigma_data": 0.5},
}


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_it_learns_the_loss_of_every_level(objective):
    """With the denoiser that answers the mean of the data, of a loss known in closed form."""
    config = DiffusionConfig(**OBJECTIVES[objective], learned_uncertainty=True)
    process, deviation, n = make_process(config), 0.5, 2**13
    ordinals = torch.arange(n)
    latents = deviation * normal(1, ordinals, Purpose.INITIAL, (32, 1, 1))
    noise = normal(0, ordinals, Purpose.NOISE, (32, 1, 1))
    timesteps = draw_timesteps(
        config, uniform(0, ordinals, Purpose.TIMESTEP, ()), torch.zeros_like(ordinals), n
    )
    x = add_noise(process, latents, noise, timesteps)
    coefficients = process.coefficients(timesteps, latents)
    output = from_x0(config.prediction, 0.0 * latents, x, *coefficients, process.sigma_data)
    losses = loss_per_sample(config, process, output, latents, noise, timesteps)
    network = LevelUncertainty(1.0 if objective == "edm" else 1 / 1000)
    optimizer = torch.optim.LBFGS(network.parameters(), max_iter=60, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = weigh_by_uncertainty(losses, network(timesteps)).mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    levels = torch.quantile(timesteps.float(), torch.linspace(0.1, 0.9, 9))
    levels = levels if timesteps.is_floating_point() else levels.round().long()
    alpha, sigma = (c.double() for c in process.coefficients(levels, torch.zeros(9)))
    # The answer is 0 instead of x0: an error of x0 in x0, with its weight in what is predicted.
    weight = {
        "eps": (alpha / sigma) ** 2,
        "flow": sigma**-2,
        "edm": 1 / (sigma * process.sigma_data) ** 2,
    }[objective]
    expected = (weight * deviation**2).log()
    assert (network(levels) - expected).abs().max() < 0.25
    assert expected.max() - expected.min() > 0.5


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_sampling_does_not_see_it(objective):
    """In evaluation the network answers one tensor; its other weights are those of a run without it."""
    settings = [
        "data.image_size=8",
        "first_stage.name=identity",
        "unet={model_channels: 8, channel_multipliers: [1], num_res_blocks: 1, attention_factors: [], "
        "head_dim: 8, num_groups: 4}",
        *(f"diffusion.{key}={value}" for key, value in OBJECTIVES[objective].items()),
    ]
    networks = []
    for extra in ([], ["diffusion.learned_uncertainty=true"]):
        torch.manual_seed(0)
        networks.append(build_model(load_config(None, [*settings, *extra])).network)
    plain, learned = networks
    extra = {"uncertainty.linear.weight", "uncertainty.linear.bias"}
    assert set(learned.state_dict()) - set(plain.state_dict()) == extra
    assert all(torch.equal(value, learned.state_dict()[name]) for name, value in plain.state_dict().items())
    given = torch.randn(2, 3, 8, 8), torch.tensor([0.5, 0.1]), {}, {}
    prediction, u = learned(*given)
    assert u.shape == (2,)
    assert torch.equal(learned.eval()(*given), prediction)


@pytest.mark.parametrize("loss", ["l1", "huber"])
def test_another_distance_is_refused(loss):
    with pytest.raises(ConfigError, match="squared error"):
        load_config(None, ["diffusion.learned_uncertainty=true", f"diffusion.loss={loss}"])


def test_graphs_are_refused():
    with pytest.raises(ConfigError, match=r"diffusion\.learned_uncertainty"):
        load_config(None, ["diffusion.learned_uncertainty=true", "distributed.cuda_graphs=true"])
