"""Schedules against their closed forms."""

from __future__ import annotations

import math
from decimal import Decimal, getcontext

import pytest
import torch

from trainer.config.training import DiffusionConfig
from trainer.diffusion.schedule import make_schedule, zero_terminal_snr

ALL = ["linear", "scaled_linear", "cosine"]


@pytest.mark.parametrize("beta_schedule", ALL)
@pytest.mark.parametrize("steps", [2, 10, 1000])
def test_shape_and_order(beta_schedule, steps):
    schedule = make_schedule(DiffusionConfig(beta_schedule=beta_schedule, num_timesteps=steps))
    assert len(schedule) == steps
    assert schedule.betas.dtype == schedule.alphas_cumprod.dtype == torch.float64
    assert (schedule.betas > 0).all()
    assert (schedule.betas < 1).all()
    assert (schedule.alphas_cumprod.diff() < 0).all()


def test_scaled_linear_is_linear_in_the_root_of_beta():
    """What CompVis configurations call "linear"."""
    schedule = make_schedule(DiffusionConfig())
    roots = schedule.betas.sqrt()
    torch.testing.assert_close(roots.diff(), roots.diff()[:1].expand(999), rtol=1e-9, atol=0)
    assert schedule.betas[0].item() == pytest.approx(0.00085, rel=1e-12)
    assert schedule.betas[-1].item() == pytest.approx(0.012, rel=1e-12)


def test_cumulative_product_against_exact_decimals():
    """alpha_t^2 = prod (1 - beta_s), recomputed with 50 decimal digits."""
    getcontext().prec = 50
    schedule = make_schedule(DiffusionConfig(beta_schedule="linear", beta_start=0.0015, beta_end=0.0195))
    product = Decimal(1)
    for t in range(1000):
        product *= 1 - (Decimal("0.0015") + (Decimal("0.0195") - Decimal("0.0015")) * t / 999)
        assert schedule.alphas_cumprod[t].item() == pytest.approx(float(product), rel=1e-12)


def test_cosine_follows_its_formula_until_the_cap():
    """Nichol and Dhariwal 2021, equation 17; only the last betas touch the cap of 0.999."""
    schedule = make_schedule(DiffusionConfig(beta_schedule="cosine"))

    def f(t):
        return math.cos((t / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2

    for t in range(0, 999):
        expected = f(t + 1) / f(0)
        assert schedule.alphas_cumprod[t].item() == pytest.approx(expected, rel=1e-9)
    assert schedule.betas[999].item() == 0.999


@pytest.mark.parametrize("beta_schedule", ALL)
def test_zero_terminal_snr(beta_schedule):
    plain = make_schedule(DiffusionConfig(beta_schedule=beta_schedule))
    schedule = make_schedule(
        DiffusionConfig(beta_schedule=beta_schedule, zero_terminal_snr=True, prediction="v")
    )
    assert schedule.alphas_cumprod[-1] == 0
    assert schedule.snr[-1] == 0
    assert schedule.alphas_cumprod[0].item() == pytest.approx(plain.alphas_cumprod[0].item(), rel=1e-12)
    # alpha is an affine function of the old alpha.
    old, new = plain.alphas_cumprod.sqrt(), schedule.alphas_cumprod.sqrt()
    slope = (new[0] - new[-1]) / (old[0] - old[-1])
    torch.testing.assert_close(new, slope * (old - old[-1]), rtol=1e-9, atol=1e-12)
    # betas belong to the rescaled products.
    torch.testing.assert_close(torch.cumprod(1 - schedule.betas, 0), schedule.alphas_cumprod)
    assert schedule.betas[-1] == 1
    assert torch.equal(zero_terminal_snr(schedule.alphas_cumprod), schedule.alphas_cumprod)


def test_snr_and_sigmas_agree():
    schedule = make_schedule(DiffusionConfig())
    torch.testing.assert_close(schedule.snr, schedule.sigmas**-2)
    alpha, sigma = schedule.coefficients(torch.arange(1000), torch.zeros(1000, 4, 1, 1))
    torch.testing.assert_close(alpha**2 + sigma**2, torch.ones(1000, 1, 1, 1))
    torch.testing.assert_close((alpha / sigma).flatten() ** 2, schedule.snr.float(), rtol=1e-5, atol=0)


def test_sd_noise_range():
    """The sigma range of Stable Diffusion, known from every k-diffusion front end: 0.0292 to 14.6146."""
    sigmas = make_schedule(DiffusionConfig()).sigmas
    assert sigmas[0].item() == pytest.approx(0.0292, abs=5e-5)
    assert sigmas[-1].item() == pytest.approx(14.6146, abs=5e-5)


def test_real_timesteps_interpolate_log_sigma():
    schedule = make_schedule(DiffusionConfig())
    for t in (0, 17, 999):
        alpha, sigma = schedule.level(float(t))
        assert alpha**2 == pytest.approx(schedule.alphas_cumprod[t].item(), rel=1e-12)
        assert alpha**2 + sigma**2 == pytest.approx(1)
    alpha, sigma = schedule.level(400.25)
    expected = 0.75 * schedule.sigmas[400].log() + 0.25 * schedule.sigmas[401].log()
    assert math.log(sigma / alpha) == pytest.approx(expected.item(), rel=1e-12)
