"""Closed forms for every objective: the exact denoiser of Gaussian data, in training and in sampling.

For x0 ~ N(mean, deviation^2) the best prediction at x = alpha x0 + sigma eps is linear in x. It is what each
objective's loss asks for, whatever density draws the levels, and with it every sampler is an affine map of
its Gaussian inputs, whose mean and deviation are measured exactly (see test_samplers_gaussian.py).
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from trainer import rng
from trainer.config.training import DiffusionConfig
from trainer.diffusion.denoiser import no_noise
from trainer.diffusion.levels import make_levels
from trainer.diffusion.objective import add_noise, draw_timesteps, loss_per_sample, loss_weights
from trainer.diffusion.parameterization import from_x0, prediction_target, to_eps, to_x0
from trainer.diffusion.processes import make_process
from trainer.diffusion.samplers import SAMPLERS
from trainer.rng import Purpose

MEAN, DEVIATION = 0.7, 0.5
LIMIT = 5.5  # standard deviations
FIRST_ORDER = ("ddpm", "ddim", "euler", "euler_ancestral")

OBJECTIVES = {
    "eps": {},
    "v": {"prediction": "v"},
    "x0": {"prediction": "x0"},
    "flow": {"process": "flow", "prediction": "velocity"},
    "flow, shifted": {"process": "flow", "prediction": "velocity", "shift": 3.0},
    "flow, x0": {"process": "flow", "prediction": "x0"},
    "edm": {"process": "edm", "prediction": "edm", "density": "log_normal", "sigma_data": 0.5},
    "edm, other deviation": {"process": "edm", "prediction": "edm", "density": "log_normal"},
}
every_objective = pytest.mark.parametrize("objective", OBJECTIVES)


class GaussianDenoiser:
    """The exact prediction, per element, for any process."""

    def __init__(self, **settings):
        self.config = DiffusionConfig(**settings)
        self.schedule = make_process(self.config)
        self.prediction = self.config.prediction

    def __call__(self, x, timesteps):
        alpha, sigma = self.schedule.level(float(timesteps[0]))
        return from_x0(self.prediction, best_x0(x, alpha, sigma), x, alpha, sigma, self.schedule.sigma_data)


def best_x0(x, alpha, sigma):
    """E[x0 | x]."""
    gain = alpha * DEVIATION**2 / (alpha**2 * DEVIATION**2 + sigma**2)
    return MEAN + gain * (x - alpha * MEAN)


def moments(name, denoiser, steps, spacing):
    """Exact (mean, deviation) of what a sampler makes of the law of x at its first level."""
    unit = torch.eye(steps + 2, dtype=torch.float64).view(steps + 2, steps + 2, 1, 1, 1).unbind(1)
    levels = make_levels(denoiser.schedule, steps, spacing)
    deviation = math.hypot(levels.alphas[0] * DEVIATION, levels.sigmas[0])
    x = levels.alphas[0] * MEAN + deviation * unit[1]
    out = SAMPLERS[name](denoiser, x, levels, noise=lambda i: unit[2 + i]).flatten()
    return out[0].item(), (out[1:] - out[0]).square().sum().sqrt().item()


@every_objective
@pytest.mark.parametrize("spacing", ["leading", "trailing", "karras"])
@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler_recovers_mean_and_deviation_of_every_objective(name, spacing, objective):
    denoiser = GaussianDenoiser(**OBJECTIVES[objective])
    # Those that divide by alpha put a small one in the place of a flow's 0: the denoiser is not told.
    stands_in = denoiser.schedule.straight and name in ("plms", "euler_ancestral")
    errors = []
    for steps in (1, 2, 9, 40, 300):
        if name == "plms" and stands_in and steps < 40:
            continue  # a first step that long: docs/numerics.md
        mean, deviation = moments(name, denoiser, steps, spacing)
        # Real timesteps reach the denoiser in float32.
        assert mean == pytest.approx(MEAN, abs=2e-3 if stands_in else 1e-6), steps
        assert math.isfinite(deviation)
        errors.append(abs(deviation - DEVIATION))
    assert errors[-1] < (0.015 if name in FIRST_ORDER else 0.004)
    assert errors[-1] < max(errors) / 5


def test_a_flow_starts_from_pure_noise():
    """Unit noise is the law of x at t = 1: nothing is biased by starting from it."""
    levels = make_levels(make_process(DiffusionConfig(**OBJECTIVES["flow"])), 20, "trailing")
    assert (levels.alphas[0], levels.sigmas[0]) == (0.0, 1.0)
    assert levels.timesteps[0] == 1000.0
    assert levels.log_snr(0) == -math.inf


@pytest.mark.parametrize(("name", "order"), [("euler", 1), ("heun", 2), ("dpmpp_2m", 2), ("unipc", 2)])
@pytest.mark.parametrize("objective", ["flow", "flow, shifted", "edm"])
def test_deterministic_samplers_converge_at_their_order(name, order, objective):
    """The flow keeps (x - alpha mean) / deviation of x; four times the steps, 4 ** order times the exactness.

    (0.7 of the exponent is asked for.) From half of the steps on, where they are short.
    """

    def error(steps):
        denoiser = GaussianDenoiser(**OBJECTIVES[objective])
        levels = make_levels(denoiser.schedule, steps, "trailing").tail(steps // 2)
        z = torch.linspace(-2, 2, 9, dtype=torch.float64).view(9, 1, 1, 1)
        start = levels.alphas[0] * MEAN + z * math.hypot(levels.alphas[0] * DEVIATION, levels.sigmas[0])
        seen = []

        def look(_, __, x0):
            seen.append(x0)

        SAMPLERS[name](denoiser, start, levels, noise=no_noise, callback=look)
        i = len(levels) * 3 // 4
        deviation = math.hypot(levels.alphas[i] * DEVIATION, levels.sigmas[i])
        exact = best_x0(levels.alphas[i] * MEAN + z * deviation, levels.alphas[i], levels.sigmas[i])
        return (seen[i] - exact).abs().max().item()

    assert error(320) < error(80) / 4 ** (0.7 * order)


def test_euler_on_a_flow_is_the_textbook_s_step_and_ddim():
    """x + (t' - t) u(x, t), with u the velocity."""
    denoiser = GaussianDenoiser(process="flow", prediction="velocity", shift=2.0)
    levels = make_levels(denoiser.schedule, 7, "trailing")
    start = torch.linspace(-2, 2, 9, dtype=torch.float64).view(9, 1, 1, 1)
    times = [t / 1000 for t in levels.timesteps] + [0.0]
    x = start
    for t, t_next in itertools.pairwise(times):
        x = x + (t_next - t) * denoiser(x, torch.full((9,), 1000 * t))
    for name in ("euler", "ddim"):
        made = SAMPLERS[name](denoiser, start, levels)
        torch.testing.assert_close(made, x, rtol=1e-12, atol=1e-12)


TRAINED = {
    name: settings | density
    for name, settings, density in (
        (f"{objective}, {density}", settings, {"density": density})
        for objective, settings in OBJECTIVES.items()
        for density in ("uniform", "logit_normal", "mode", "cosmap", "log_normal")
        if (density == "log_normal") == ("edm" in objective)
    )
}


def batch(config, n):
    """Latents, noise and timesteps of a training step over Gaussian data."""
    ordinals = torch.arange(n)
    latents = MEAN + DEVIATION * rng.normal(1, ordinals, Purpose.INITIAL, (1, 1, 1))
    noise = rng.normal(0, ordinals, Purpose.NOISE, (1, 1, 1))
    uniforms = rng.uniform(0, ordinals, Purpose.TIMESTEP, ())
    return latents, noise, draw_timesteps(config, uniforms, torch.zeros(n, dtype=torch.int64), n)


@pytest.mark.parametrize("settings", TRAINED.values(), ids=TRAINED.keys())
def test_the_loss_asks_for_the_exact_denoiser_whatever_is_drawn(settings):
    """Its gradient, and that of its slope in x, vanish on average at E[target | x], and only there."""
    config = DiffusionConfig(**settings)
    process = make_process(config)
    n = 2**15
    latents, noise, timesteps = batch(config, n)
    x = add_noise(process, latents, noise, timesteps)
    alpha, sigma = process.coefficients(timesteps, latents.double())
    best = from_x0(
        config.prediction, best_x0(x.double(), alpha, sigma), x.double(), alpha, sigma, process.sigma_data
    )
    for offset in (0.0, 0.1):
        output = (best + offset).float().requires_grad_()
        losses = loss_per_sample(config, process, output, latents, noise, timesteps)
        (gradient,) = torch.autograd.grad(losses.sum(), output)
        assert gradient.isfinite().all()
        for weight in (torch.ones_like(x), x):
            terms = (gradient * weight).double()
            score = terms.mean() / (terms.std() / n**0.5)
            if offset == 0.0:
                assert abs(score) < LIMIT
        if offset:
            assert (gradient.double().mean() / (gradient.double().std() / n**0.5)) > LIMIT


@every_objective
def test_any_output_means_the_same_x0_and_noise(objective):
    """x = alpha x0 + sigma eps holds for what an output stands for, and its target stands for the truth."""
    config = DiffusionConfig(**OBJECTIVES[objective])
    process = make_process(config)
    generator = torch.Generator().manual_seed(0)
    x, output, latents, noise = torch.randn(4, 8, 4, 3, 3, generator=generator, dtype=torch.float64)
    timesteps = batch(config, 8)[2]
    alpha, sigma = process.coefficients(timesteps, x)
    known = alpha, sigma, process.sigma_data
    x0, eps = (f(config.prediction, output, x, *known) for f in (to_x0, to_eps))
    torch.testing.assert_close(alpha * x0 + sigma * eps, x, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(from_x0(config.prediction, x0, x, *known), output, rtol=1e-6, atol=1e-6)
    x = add_noise(process, latents, noise, timesteps)
    target = prediction_target(config.prediction, latents, noise, *known)
    torch.testing.assert_close(to_x0(config.prediction, target, x, *known), latents, rtol=1e-6, atol=1e-6)
    assert torch.equal(
        loss_per_sample(config, process, target.float(), latents.float(), noise.float(), timesteps) < 1e-9,
        torch.ones(8, dtype=torch.bool),
    )


def test_the_variance_of_what_edm_shows_the_network_is_one():
    """Karras et al. 2022, appendix B.6: c_in and c_out keep input and target at unit variance."""
    config = DiffusionConfig(
        process="edm", prediction="edm", density="log_normal", sigma_data=0.5, density_std=1.2
    )
    process = make_process(config)
    latents, noise, timesteps = batch(config, 2**15)
    latents = latents - MEAN
    alpha, sigma = process.coefficients(timesteps, latents)
    for values in (
        add_noise(process, latents, noise, timesteps),
        prediction_target("edm", latents, noise, alpha, sigma, 0.5),
    ):
        assert values.std().item() == pytest.approx(1.0, abs=LIMIT / (2 * 2**15) ** 0.5)
    assert torch.equal(loss_weights(config, process, timesteps), torch.ones(2**15))
