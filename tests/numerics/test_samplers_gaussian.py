"""Closed forms: with the exact denoiser of Gaussian data every sampler recovers its mean and variance.

For x0 ~ N(mean, deviation^2) the optimal prediction is linear in x, so each sampler is an affine map of its
Gaussian inputs: x_out = a x_start + sum_i b_i noise_i + c. Its output mean and variance are measured
exactly, by pushing unit vectors through it: no Monte-Carlo error.
"""

from __future__ import annotations

import math

import pytest
import torch

from trainer.config.training import DiffusionConfig
from trainer.diffusion.denoiser import ClassifierFreeGuidance, ignore, no_noise
from trainer.diffusion.editing import ReplacementInpainting, image_to_image_start
from trainer.diffusion.levels import NoiseLevels, make_levels
from trainer.diffusion.parameterization import from_x0
from trainer.diffusion.samplers import SAMPLERS, sample
from trainer.diffusion.schedule import make_schedule

MEAN, DEVIATION = 0.7, 0.5
STOCHASTIC = ("ddpm", "euler_ancestral", "dpmpp_sde")
FIRST_ORDER = ("ddpm", "ddim", "euler", "euler_ancestral")


class GaussianDenoiser:
    """E[x0 | x_t] for x0 ~ N(mean, deviation^2), per element, expressed in any prediction type."""

    def __init__(self, prediction="eps", *, rescaled=False, mean=MEAN, deviation=DEVIATION, **settings):
        self.schedule = make_schedule(
            DiffusionConfig(prediction=prediction, zero_terminal_snr=rescaled, **settings)
        )
        self.prediction = prediction
        self.mean, self.deviation = mean, deviation

    def __call__(self, x, timesteps):
        alpha, sigma = self.schedule.level(float(timesteps[0]))
        gain = alpha * self.deviation**2 / (alpha**2 * self.deviation**2 + sigma**2)
        return from_x0(self.prediction, self.mean + gain * (x - alpha * self.mean), x, alpha, sigma)


def moments(name, denoiser, steps, spacing="trailing", eta=0.0, exact_start=True):
    """Exact (mean, deviation) of the sampler's output for Gaussian inputs.

    Row 0 gets zero for every Gaussian input; row 1 + k gets one for the k-th input only. The start is the
    law of x at the first level, or standard normal as in `sample` (exact_start=False).
    """
    unit = torch.eye(steps + 2, dtype=torch.float64).view(steps + 2, steps + 2, 1, 1, 1).unbind(1)
    levels = make_levels(denoiser.schedule, steps, spacing)
    x = unit[1]
    if exact_start:
        deviation = math.hypot(levels.alphas[0] * denoiser.deviation, levels.sigmas[0])
        x = levels.alphas[0] * denoiser.mean + deviation * x
    out = SAMPLERS[name](denoiser, x, levels, noise=lambda i: unit[2 + i], eta=eta, callback=ignore).flatten()
    return out[0].item(), (out[1:] - out[0]).square().sum().sqrt().item()


@pytest.mark.parametrize("prediction", ["eps", "v", "x0"])
@pytest.mark.parametrize("name", SAMPLERS)
def test_recovers_mean_and_deviation(name, prediction):
    """The mean exactly; the deviation up to an error that falls with the number of steps."""
    coarse = moments(name, GaussianDenoiser(prediction), 100)
    fine = moments(name, GaussianDenoiser(prediction), 400)
    assert coarse[0] == pytest.approx(MEAN, abs=1e-9)
    assert fine[0] == pytest.approx(MEAN, abs=1e-9)
    assert abs(coarse[1] - DEVIATION) < (0.035 if name in FIRST_ORDER else 0.01)
    assert abs(fine[1] - DEVIATION) < abs(coarse[1] - DEVIATION) / 2.5


@pytest.mark.parametrize("spacing", ["leading", "karras"])
@pytest.mark.parametrize("name", SAMPLERS)
def test_recovers_them_with_every_spacing(name, spacing):
    mean, deviation = moments(name, GaussianDenoiser(), 250, spacing)
    # Karras timesteps are real numbers and reach the denoiser in float32.
    assert mean == pytest.approx(MEAN, abs=1e-7)
    assert deviation == pytest.approx(DEVIATION, abs=0.016 if name in FIRST_ORDER else 0.004)


SCHEDULES = {
    "scaled_linear": {},
    "linear": {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02},
    "cosine": {"beta_schedule": "cosine"},
    "zero_terminal": {"rescaled": True},
}


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("spacing", ["leading", "trailing", "karras"])
@pytest.mark.parametrize("name", SAMPLERS)
def test_no_schedule_spacing_or_number_of_steps_biases_the_mean(name, spacing, schedule):
    if schedule == "zero_terminal" and spacing != "trailing":
        pytest.skip("refused by check_sampling")
    # A few long steps would magnify the stand-in for alpha = 0, of which the denoiser is not told.
    for steps in (9, 30, 501) if schedule == "zero_terminal" else (1, 2, 9, 30, 501):
        mean, deviation = moments(name, GaussianDenoiser("v", **SCHEDULES[schedule]), steps, spacing)
        # Karras timesteps reach the denoiser in float32.
        assert mean == pytest.approx(MEAN, abs=1e-3 if schedule == "zero_terminal" else 1e-7), steps
        assert math.isfinite(deviation)
    assert deviation == pytest.approx(DEVIATION, abs=0.02)


@pytest.mark.parametrize("name", SAMPLERS)
def test_zero_terminal_snr_removes_the_bias_of_starting_from_unit_noise(name):
    """Lin et al. 2023, section 2: unit noise is not the law of x_T unless alpha_T = 0."""
    biased, _ = moments(name, GaussianDenoiser("v"), 250, exact_start=False)
    unbiased, deviation = moments(name, GaussianDenoiser("v", rescaled=True), 250, exact_start=False)
    # 2e-4: samplers that divide by alpha put 2**-12 in the place of 0.
    assert unbiased == pytest.approx(MEAN, abs=2e-4)
    assert deviation == pytest.approx(DEVIATION, abs=0.017 if name in FIRST_ORDER else 0.004)
    assert (biased < MEAN - 0.01) == (name not in STOCHASTIC)  # stochastic ones forget the start


@pytest.mark.parametrize("steps", [1, 3, 20, 333])
def test_ddpm_is_exact_for_a_point_mass(steps):
    """With one possible x0 the posterior is known, and every number of steps ends exactly on it."""
    mean, deviation = moments("ddpm", GaussianDenoiser("x0", deviation=0.0), steps)
    assert mean == pytest.approx(MEAN, abs=1e-12)
    assert deviation == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler_is_exact_for_a_point_mass(name):
    mean, deviation = moments(name, GaussianDenoiser(deviation=0.0), 12)
    assert mean == pytest.approx(MEAN, abs=1e-9)
    assert deviation == pytest.approx(0.0, abs=1e-9)


def flow_error(name, steps, spacing="karras"):
    """Largest distance from the exact probability-flow map, at the last level before the clean end.

    For Gaussian data the flow keeps the standardised value (x - alpha mean) / deviation of x.
    """
    denoiser = GaussianDenoiser()
    levels = make_levels(denoiser.schedule, steps, spacing)
    levels = NoiseLevels(levels.timesteps[:-1], levels.alphas[:-1], levels.sigmas[:-1])
    z = torch.linspace(-2, 2, 9, dtype=torch.float64).view(9, 1, 1, 1)

    def x_at(i):
        return levels.alphas[i] * MEAN + z * math.hypot(levels.alphas[i] * DEVIATION, levels.sigmas[i])

    out = SAMPLERS[name](denoiser, x_at(0), levels, noise=no_noise, eta=0.0, callback=ignore)
    return (out - x_at(-1)).abs().max().item()


def test_ddim_on_a_gaussian_follows_the_closed_form():
    """DDIM's update of Gaussian data is linear with a factor known in closed form, at every step."""
    denoiser = GaussianDenoiser()
    levels = make_levels(denoiser.schedule, 25, "leading")
    x = torch.linspace(-2, 2, 9, dtype=torch.float64).view(9, 1, 1, 1)
    expected = x
    for i in range(25):
        a, s, a2, s2 = (*_at(levels, i), *_at(levels, i + 1))
        variance = a**2 * DEVIATION**2 + s**2
        factor = (a * a2 * DEVIATION**2 + s * s2) / variance
        expected = a2 * MEAN + factor * (expected - a * MEAN)
    actual = sample("ddim", denoiser, x, num_steps=25)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def _at(levels, i):
    return levels.alphas[i], levels.sigmas[i]


@pytest.mark.parametrize(
    ("name", "order"),
    [("ddim", 1), ("euler", 1), ("heun", 2), ("dpmpp_2m", 2), ("plms", 2), ("unipc", 3)],
)
def test_deterministic_samplers_converge_at_their_order(name, order):
    """Four times the steps: the error falls by 4 ** order (0.75 of the exponent is asked for)."""
    assert flow_error(name, 160) < flow_error(name, 40) / 4 ** (0.75 * order)


def test_higher_order_samplers_beat_euler_at_equal_steps():
    for name in ("heun", "dpmpp_2m", "unipc", "plms"):
        assert flow_error(name, 20) < flow_error("euler", 20) / 4


@pytest.mark.parametrize("spacing", ["leading", "trailing", "karras"])
def test_euler_equals_ddim(spacing):
    denoiser = GaussianDenoiser("v")
    x = torch.linspace(-2, 2, 9, dtype=torch.float64).view(9, 1, 1, 1)
    torch.testing.assert_close(
        sample("euler", denoiser, x, num_steps=17, spacing=spacing),
        sample("ddim", denoiser, x, num_steps=17, spacing=spacing),
        rtol=1e-11,
        atol=1e-11,
    )


def test_ddim_with_eta_one_has_the_law_of_ddpm():
    """Same mean and variance as the ancestral sampler with its smaller variance (Song et al. 2021, 4.1)."""
    denoiser = GaussianDenoiser()
    assert moments("ddim", denoiser, 40, eta=1.0) == pytest.approx(moments("ddpm", denoiser, 40), abs=1e-10)


class Both:
    """First half of the batch conditioned (mean 0.7), second half not (mean 0)."""

    conditional, unconditional = GaussianDenoiser(), GaussianDenoiser(mean=0.0)
    schedule, prediction = conditional.schedule, "eps"

    def __call__(self, x, timesteps):
        first, second = x.chunk(2)
        t = timesteps[: len(first)]
        return torch.cat([self.conditional(first, t), self.unconditional(second, t)])


def test_guidance_scale_one_is_the_conditional_prediction():
    plain = moments("ddim", GaussianDenoiser(), 50, exact_start=False)
    assert moments("ddim", ClassifierFreeGuidance(Both(), 1.0), 50, exact_start=False) == plain


def test_guidance_extrapolates_the_mean():
    """Conditional and unconditional data of one variance: scale w has the law of data with mean w * 0.7."""
    expected = moments("ddim", GaussianDenoiser(mean=3.0 * MEAN), 50, exact_start=False)
    guided = moments("ddim", ClassifierFreeGuidance(Both(), 3.0), 50, exact_start=False)
    assert guided == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("name", SAMPLERS)
def test_image_to_image_keeps_the_law_of_the_data(name):
    """Noising data to a level and denoising it again leaves Gaussian data Gaussian, at any strength."""
    denoiser = GaussianDenoiser()
    levels = make_levels(denoiser.schedule, 200, "trailing")
    _, remaining = image_to_image_start(torch.zeros(1), torch.zeros(1), levels, 0.5)
    assert len(remaining) == 100
    variance = (remaining.alphas[0] * DEVIATION) ** 2 + remaining.sigmas[0] ** 2
    # Input: two independent Gaussians, x0 and noise; columns as in `moments`.
    columns = 200 + 3
    eye = torch.eye(columns, dtype=torch.float64)
    latents = (MEAN + DEVIATION * eye[1]).view(-1, 1, 1, 1)
    out = sample(
        name,
        denoiser,
        eye[2].view(-1, 1, 1, 1),
        num_steps=200,
        spacing="trailing",
        latents=latents,
        strength=0.5,
        noise=lambda i: eye[3 + i].view(-1, 1, 1, 1),
    ).flatten()
    assert variance < 1
    assert out[0].item() == pytest.approx(MEAN, abs=1e-9)
    tolerance = 0.02 if name in FIRST_ORDER else 0.005
    assert (out[1:] - out[0]).square().sum().sqrt().item() == pytest.approx(DEVIATION, abs=tolerance)


@pytest.mark.parametrize("prediction", ["eps", "v", "x0"])
@pytest.mark.parametrize("name", SAMPLERS)
def test_inpainting_ends_exactly_on_the_known_latents(name, prediction):
    generator = torch.Generator().manual_seed(0)
    latents, start = torch.randn(2, 2, 3, 4, 4, generator=generator, dtype=torch.float64)
    mask = torch.zeros(2, 1, 4, 4)
    mask[..., 2:] = 1
    denoiser = ReplacementInpainting(GaussianDenoiser(prediction), latents, mask, start)
    out = sample(
        name,
        denoiser,
        start,
        num_steps=20,
        noise=lambda i: torch.randn(latents.shape, generator=generator, dtype=torch.float64),
    )
    torch.testing.assert_close(out[..., :2], latents[..., :2], rtol=0, atol=1e-8)
    assert (out[..., 2:] - latents[..., 2:]).abs().min() > 1e-4
