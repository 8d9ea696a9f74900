"""Schedules, SNR, loss weights and noising against diffusers (its tables are float32)."""

from __future__ import annotations

import diffusers
import pytest
import torch
from diffusers.training_utils import compute_snr

from trainer.config.training import DiffusionConfig
from trainer.diffusion.objective import add_noise, loss_per_sample, loss_weights
from trainer.diffusion.parameterization import prediction_target
from trainer.diffusion.schedule import make_schedule

RANGES = {  # the beta ranges of the configurations that ship: SD, LDM tables 12 and 15, x4 upscaler
    "sd": (0.00085, 0.012),
    "ldm": (0.0015, 0.0195),
    "churches": (0.0015, 0.0155),
    "layout": (0.0015, 0.0205),
    "upscaler": (1e-4, 0.02),
}


def pair(beta_schedule, betas=(0.00085, 0.012), *, rescaled=False):
    """(our schedule, diffusers' DDPM scheduler) of the same settings."""
    ours = DiffusionConfig(
        beta_schedule=beta_schedule,
        beta_start=betas[0],
        beta_end=betas[1],
        zero_terminal_snr=rescaled,
        prediction="v",
    )
    theirs = diffusers.DDPMScheduler(
        beta_schedule="squaredcos_cap_v2" if beta_schedule == "cosine" else beta_schedule,
        beta_start=betas[0],
        beta_end=betas[1],
        rescale_betas_zero_snr=rescaled,
    )
    return make_schedule(ours), theirs


@pytest.mark.parametrize("rescaled", [False, True])
@pytest.mark.parametrize("betas", RANGES.values(), ids=RANGES.keys())
@pytest.mark.parametrize("beta_schedule", ["linear", "scaled_linear", "cosine"])
def test_alphas_cumprod(beta_schedule, betas, rescaled):
    ours, theirs = pair(beta_schedule, betas, rescaled=rescaled)
    torch.testing.assert_close(ours.alphas_cumprod.float(), theirs.alphas_cumprod, rtol=0, atol=1e-6)
    if not rescaled:
        torch.testing.assert_close(ours.betas.float(), theirs.betas, rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize("beta_schedule", ["linear", "scaled_linear", "cosine"])
def test_snr(beta_schedule):
    ours, theirs = pair(beta_schedule)
    theirs.alphas_cumprod = ours.alphas_cumprod  # float64: the formula, not the rounding of their table
    timesteps = torch.arange(1000)
    expected = compute_snr(theirs, timesteps)
    torch.testing.assert_close(ours.snr.float(), expected.float(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("gamma", [1.0, 5.0])
@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_min_snr_weights_as_in_diffusers_training_scripts(prediction, gamma):
    """min(snr, gamma) / snr for epsilon and / (snr + 1) for v_prediction, computed with compute_snr."""
    ours, theirs = pair("scaled_linear")
    theirs.alphas_cumprod = ours.alphas_cumprod
    timesteps = torch.arange(1000)
    snr = compute_snr(theirs, timesteps)
    expected = torch.stack([snr, gamma * torch.ones_like(snr)], dim=1).min(dim=1)[0]
    expected = expected / (snr if prediction == "eps" else snr + 1)
    config = DiffusionConfig(prediction=prediction, min_snr_gamma=gamma)
    torch.testing.assert_close(loss_weights(config, ours, timesteps), expected.float(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("rescaled", [False, True])
def test_add_noise_and_velocity(rescaled):
    ours, theirs = pair("scaled_linear", rescaled=rescaled)
    theirs.alphas_cumprod = ours.alphas_cumprod
    generator = torch.Generator().manual_seed(0)
    latents, noise = torch.randn(2, 6, 4, 5, 5, generator=generator, dtype=torch.float64)
    timesteps = torch.tensor([0, 1, 250, 500, 998, 999])
    torch.testing.assert_close(
        add_noise(ours, latents, noise, timesteps), theirs.add_noise(latents, noise, timesteps)
    )
    alpha, sigma = ours.coefficients(timesteps, latents)
    torch.testing.assert_close(
        prediction_target("v", latents, noise, alpha, sigma),
        theirs.get_velocity(latents, noise, timesteps),
    )


@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_loss_of_a_training_step(prediction):
    """The batch loss of diffusers' text-to-image script: weighted mean squared error, mean over samples."""
    ours, theirs = pair("scaled_linear")
    generator = torch.Generator().manual_seed(1)
    latents, noise, output = torch.randn(3, 8, 4, 6, 6, generator=generator)
    timesteps = torch.randint(1000, (8,), generator=generator)
    config = DiffusionConfig(prediction=prediction, min_snr_gamma=5.0)
    target = noise if prediction == "eps" else theirs.get_velocity(latents, noise, timesteps)
    snr = compute_snr(theirs, timesteps)
    weights = snr.clamp(max=5.0) / (snr if prediction == "eps" else snr + 1)
    expected = ((output - target) ** 2).mean(dim=(1, 2, 3)) * weights
    actual = loss_per_sample(config, ours, output, latents, noise, timesteps)
    torch.testing.assert_close(actual, expected, rtol=5e-6, atol=0)
