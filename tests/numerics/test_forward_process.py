"""q(x_t | x_0): moments, composition of single steps, and the identities of eps, x0 and v."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from trainer import rng
from trainer.config.training import DiffusionConfig
from trainer.diffusion.objective import add_noise, offset_noise
from trainer.diffusion.parameterization import from_x0, prediction_target, to_eps, to_x0
from trainer.diffusion.schedule import make_schedule
from trainer.rng import Purpose

PREDICTIONS = ("eps", "v", "x0")


@pytest.mark.parametrize("timestep", [0, 300, 999])
def test_moments_of_q(timestep):
    """Mean alpha x0 and deviation sigma, within 5.5 standard errors of 2^18 draws (false alarm 4e-8)."""
    schedule = make_schedule(DiffusionConfig())
    n = 2**18
    noise = rng.normal(0, torch.arange(n // 64), Purpose.NOISE, (64, 1, 1))
    latents = torch.full((n // 64, 64, 1, 1), 1.7)
    timesteps = torch.full((n // 64,), timestep)
    x = add_noise(schedule, latents, noise, timesteps).double()
    alpha, sigma = schedule.level(float(timestep))
    assert abs(x.mean().item() - alpha * 1.7) < 5.5 * sigma / math.sqrt(n)
    assert abs(x.var().item() - sigma**2) < 5.5 * sigma**2 * math.sqrt(2 / n)


def test_closed_form_equals_the_chain_of_single_steps():
    """x_t = sqrt(1 - beta_t) x_{t-1} + sqrt(beta_t) eps_t composes to alpha_t x_0 + sigma_t eps, exactly."""
    schedule = make_schedule(DiffusionConfig(beta_schedule="linear"))
    signal, variance = 1.0, 0.0
    for t, beta in enumerate(schedule.betas.tolist()):
        signal *= math.sqrt(1 - beta)
        variance = (1 - beta) * variance + beta
        alpha, sigma = schedule.level(float(t))
        assert signal == pytest.approx(alpha, rel=1e-10)
        assert variance == pytest.approx(sigma**2, rel=1e-10)


def test_each_sample_has_its_own_timestep():
    schedule = make_schedule(DiffusionConfig())
    latents, noise = torch.ones(3, 2, 4, 4), torch.zeros(3, 2, 4, 4)
    x = add_noise(schedule, latents, noise, torch.tensor([0, 500, 999]))
    expected = schedule.alphas_cumprod[[0, 500, 999]].sqrt().float().view(3, 1, 1, 1)
    assert torch.equal(x, expected.expand(3, 2, 4, 4))


@pytest.mark.parametrize("rescaled", [False, True])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_every_prediction_gives_back_x0_and_eps(prediction, rescaled):
    schedule = make_schedule(DiffusionConfig(zero_terminal_snr=rescaled, prediction="v"))
    # eps cannot give x0 where alpha = 0: that combination is refused.
    last = 998 if rescaled and prediction == "eps" else 999
    timesteps = torch.tensor([0, 1, 10, 500, 900, last])
    latents, noise = torch.randn(
        2, 6, 4, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )
    alpha, sigma = schedule.coefficients(timesteps, latents)
    x = add_noise(schedule, latents, noise, timesteps)
    target = prediction_target(prediction, latents, noise, alpha, sigma)
    torch.testing.assert_close(to_x0(prediction, target, x, alpha, sigma), latents)
    torch.testing.assert_close(to_eps(prediction, target, x, alpha, sigma), noise)
    torch.testing.assert_close(from_x0(prediction, latents, x, alpha, sigma), target)


@pytest.mark.parametrize(("first", "second"), itertools.permutations(PREDICTIONS, 2))
def test_any_output_means_the_same_in_every_prediction_type(first, second):
    """Not only for oracle outputs: an arbitrary output converts to another type and back unchanged."""
    alpha, sigma = 0.6, 0.8
    x, output = torch.randn(2, 3, 4, 5, 5, dtype=torch.float64)
    x0 = to_x0(first, output, x, alpha, sigma)
    converted = from_x0(second, x0, x, alpha, sigma)
    torch.testing.assert_close(to_x0(second, converted, x, alpha, sigma), x0)
    torch.testing.assert_close(
        to_eps(second, converted, x, alpha, sigma), to_eps(first, output, x, alpha, sigma)
    )
    # x0 and eps always recombine to x.
    torch.testing.assert_close(alpha * x0 + sigma * to_eps(first, output, x, alpha, sigma), x)


def test_offset_noise_is_one_constant_per_channel():
    noise = rng.normal(0, torch.arange(512), Purpose.NOISE, (4, 8, 8))
    offsets = rng.normal(0, torch.arange(512), Purpose.OFFSET_NOISE, (4,))
    changed = offset_noise(noise, offsets, 0.1) - noise
    torch.testing.assert_close(
        changed, (0.1 * offsets)[:, :, None, None].expand(noise.shape), atol=1e-6, rtol=0
    )
    # The mean of a channel: variance 1 / 64 from the noise, plus 0.1^2.
    variance = offset_noise(noise, offsets, 0.1).mean(dim=(2, 3)).var().item()
    expected = 1 / 64 + 0.01
    assert abs(variance - expected) < 5.5 * expected * math.sqrt(2 / 2048)
