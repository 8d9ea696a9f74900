"""Rectified flow and EDM against diffusers' schedulers, as exported, and the papers' formulas, written anew.

As in test_samplers.py diffusers' modules see a torch whose float32 is float64, and levels in float64 after
their own were found to agree: agreement to 1e-9 is about formulas. What is exported also runs untouched, in
float32.
"""

from __future__ import annotations

import importlib
import itertools
import math

import diffusers
import pytest
import torch
from diffusers.training_utils import compute_density_for_timestep_sampling, compute_loss_weighting_for_sd3

from trainer.config.training import DiffusionConfig
from trainer.diffusion.levels import make_levels
from trainer.diffusion.objective import add_noise, loss_per_sample, loss_weights, quantile
from trainer.diffusion.processes import at_size, make_process
from trainer.diffusion.samplers import SAMPLERS
from trainer.interop.diffusers_stage import scheduler_to_diffusers

SHAPE = (2, 4, 3, 3)
FLOW = {"process": "flow", "prediction": "velocity"}
EDM = {"process": "edm", "prediction": "edm", "density": "log_normal", "sigma_data": 0.5}


class SmoothDenoiser:
    """A fixed nonlinear function of x and the timestep, in any precision."""

    def __init__(self, **settings) -> None:
        self.config = DiffusionConfig(**settings)
        self.schedule = make_process(self.config)
        self.prediction = self.config.prediction

    def __call__(self, x: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        # Timesteps are float32 there and here; what they are made of is not always.
        unit = 1000 if self.config.process == "flow" else 1
        time = timesteps.to(torch.float32).to(x.dtype).view(-1, 1, 1, 1) / unit
        return torch.sin(1.3 * x + 3 * time) + 0.2 * x * torch.cos(5 * time) - 0.1 * x.roll(1, dims=1)


def noise(index: int) -> torch.Tensor:
    return torch.randn(SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(index))


def ours(name, denoiser, spacing, steps, start=None):
    levels = make_levels(denoiser.schedule, steps, spacing)
    x0s = []
    start = noise(10_000) if start is None else start
    made = SAMPLERS[name](denoiser, start, levels, noise=noise, callback=lambda i, n, x0: x0s.append(x0))
    return levels, made, x0s


class DoublePrecisionTorch:
    """torch, except that float32 means float64."""

    float32 = torch.float64

    def __getattr__(self, name):
        return getattr(torch, name)


@pytest.fixture
def double_precision(monkeypatch):
    for name in (
        "flow_match_euler_discrete",
        "flow_match_heun_discrete",
        "edm_euler",
        "edm_dpmsolver_multistep",
        "dpmsolver_multistep",
        "unipc_multistep",
    ):
        module = importlib.import_module(f"diffusers.schedulers.scheduling_{name}")
        monkeypatch.setattr(module, "torch", DoublePrecisionTorch())


def exported(denoiser, spacing):
    """The scheduler that an export writes, as from_pretrained reads it."""
    described = scheduler_to_diffusers(denoiser.config, spacing)
    cls = getattr(diffusers, described.pop("_class_name"))
    return cls.from_config(described)


def run(scheduler, denoiser, x, timesteps):
    for t in timesteps:
        seen = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        x = scheduler.step(denoiser(seen, t.expand(len(x))), t, x).prev_sample
    return x


def assert_same(ours, theirs, tolerance=1e-9):
    torch.testing.assert_close(ours, theirs.to(ours.dtype), rtol=tolerance, atol=tolerance)


def times(levels):
    """sigma in diffusers' sense, with the clean end."""
    return torch.tensor([t / 1000 for t in levels.timesteps] + [0.0], dtype=torch.float64)


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "karras"])
@pytest.mark.parametrize("steps", [1, 4, 28])
def test_the_exported_flow_scheduler_makes_the_same_trajectory(spacing, shift, steps):
    """Untouched, in float32: what a user of diffusers gets."""
    denoiser = SmoothDenoiser(**FLOW, shift=shift)
    start = noise(10_000).float()
    levels, made, _ = ours("euler", denoiser, spacing, steps, start)
    scheduler = exported(denoiser, spacing)
    given = {"sigmas": [1 - i / steps for i in range(steps)]} if spacing == "trailing" else {}
    scheduler.set_timesteps(steps, **given)
    torch.testing.assert_close(scheduler.sigmas.double(), times(levels), rtol=1e-5, atol=1e-6)
    assert_same(made, run(scheduler, denoiser, start, scheduler.timesteps), 1e-4)


@pytest.mark.usefixtures("double_precision")
@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "karras"])
@pytest.mark.parametrize("steps", [4, 20])
@pytest.mark.parametrize("name", ["euler", "heun", "dpmpp_2m", "unipc"])
def test_samplers_on_a_flow(name, spacing, shift, steps):
    denoiser = SmoothDenoiser(**FLOW, shift=shift)
    levels, made, _ = ours(name, denoiser, spacing, steps)
    sigmas = times(levels)
    if name in ("euler", "heun"):
        cls = {
            "euler": diffusers.FlowMatchEulerDiscreteScheduler,
            "heun": diffusers.FlowMatchHeunDiscreteScheduler,
        }[name]
        scheduler = cls(shift=shift)
        scheduler.set_timesteps(steps)
    else:
        cls = {"dpmpp_2m": diffusers.DPMSolverMultistepScheduler, "unipc": diffusers.UniPCMultistepScheduler}[
            name
        ]
        scheduler = cls(
            prediction_type="flow_prediction",
            use_flow_sigmas=True,
            flow_shift=shift,
            final_sigmas_type="zero",
        )
        scheduler.set_timesteps(steps)
    timesteps = 1000 * sigmas[:-1]
    if name == "heun":
        sigmas = torch.cat([sigmas[:1], sigmas[1:-1].repeat_interleave(2), sigmas[-1:]])
        timesteps = torch.cat([timesteps[:1], timesteps[1:].repeat_interleave(2)])
    scheduler.sigmas, scheduler.timesteps = sigmas, timesteps
    assert_same(made, run(scheduler, denoiser, noise(10_000), timesteps))


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_their_flow_levels_for_log_snr_samplers_are_our_trailing_ones_nearly(shift):
    """They start at 1 - 1 / T instead of 1, so that the first SNR is not 0."""
    levels = make_levels(make_process(DiffusionConfig(**FLOW, shift=shift)), 25, "trailing")
    scheduler = diffusers.DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift, final_sigmas_type="zero"
    )
    scheduler.set_timesteps(25)
    torch.testing.assert_close(scheduler.sigmas.double(), times(levels), rtol=0, atol=1.1e-3)


def test_the_exported_shift_is_that_of_the_resolution():
    config = DiffusionConfig(**FLOW, shift=3.0, shift_pixels=1024)
    assert scheduler_to_diffusers(at_size(config, 512, 512))["shift"] == pytest.approx(1.5)


@pytest.mark.parametrize("spacing", ["leading", "karras"])
@pytest.mark.parametrize("steps", [2, 18])
def test_the_exported_edm_scheduler_makes_the_same_trajectory(steps, spacing):
    denoiser = SmoothDenoiser(**EDM)
    start = noise(10_000).float()
    levels, made, _ = ours("euler", denoiser, spacing, steps, start)
    scheduler = exported(denoiser, spacing)
    scheduler.set_timesteps(steps)
    ratios = torch.tensor([levels.ratio(i) for i in range(steps + 1)], dtype=torch.float64)
    torch.testing.assert_close(scheduler.sigmas.double(), ratios, rtol=1e-5, atol=1e-8)
    assert_same(made, run(scheduler, denoiser, start * scheduler.init_noise_sigma, scheduler.timesteps), 2e-4)


@pytest.mark.usefixtures("double_precision")
@pytest.mark.parametrize("name", ["euler", "dpmpp_2m"])
@pytest.mark.parametrize("steps", [5, 18])
@pytest.mark.parametrize("spacing", ["karras", "leading"])
def test_samplers_on_edm(name, steps, spacing):
    denoiser = SmoothDenoiser(**EDM)
    levels, made, _ = ours(name, denoiser, spacing, steps)
    cls = {
        "euler": diffusers.EDMEulerScheduler,
        "dpmpp_2m": diffusers.EDMDPMSolverMultistepScheduler,
    }[name]
    described = scheduler_to_diffusers(denoiser.config)
    described = {key: described[key] for key in ("sigma_min", "sigma_max", "sigma_data", "prediction_type")}
    scheduler = cls(**described, sigma_schedule="karras" if spacing == "karras" else "exponential")
    scheduler.set_timesteps(steps)
    ratios = torch.tensor([levels.ratio(i) for i in range(steps + 1)], dtype=torch.float64)
    torch.testing.assert_close(scheduler.sigmas.double(), ratios, rtol=1e-5, atol=1e-8)
    timesteps = torch.tensor(levels.timesteps, dtype=torch.float64)
    scheduler.sigmas, scheduler.timesteps = ratios, timesteps
    start = noise(10_000) * math.sqrt(1 + ratios[0].item() ** 2)
    assert_same(made, run(scheduler, denoiser, start, timesteps))


def karras_denoiser(network, sigma_data):
    """Karras et al. 2022, equation 7 and table 1, as k-diffusion's Denoiser has them: D(x; sigma)."""

    def denoise(x, sigma):
        variance = sigma**2 + sigma_data**2
        c_skip, c_out = sigma_data**2 / variance, sigma * sigma_data / variance**0.5
        c_in, c_noise = 1 / variance**0.5, sigma.log() / 4
        return c_skip * x + c_out * network(c_in * x, c_noise.flatten().expand(len(x)))

    return denoise


def test_heun_on_edm_is_algorithm_1_of_the_paper():
    """Deterministic sampling with sigma(t) = t and s(t) = 1, in the units of the paper."""
    denoiser = SmoothDenoiser(**EDM)
    levels, made, _ = ours("heun", denoiser, "karras", 10)
    denoise = karras_denoiser(denoiser, 0.5)
    # Equation 5, written again.
    sigmas = torch.tensor(
        [(80 ** (1 / 7) + i / 9 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7 for i in range(10)] + [0.0],
        dtype=torch.float64,
    )
    x = noise(10_000) * math.sqrt(1 + 80**2)
    for sigma, sigma_next in itertools.pairwise(sigmas):
        slope = (x - denoise(x, sigma)) / sigma
        x_next = x + (sigma_next - sigma) * slope
        if sigma_next > 0:
            slope_next = (x_next - denoise(x_next, sigma_next)) / sigma_next
            x_next = x + (sigma_next - sigma) * (slope + slope_next) / 2
        x = x_next
    assert levels.timesteps[0] == pytest.approx(math.log(80) / 4)
    assert_same(made, x, 1e-8)


@pytest.mark.parametrize("sigma_data", [0.5, 1.0])
def test_the_loss_of_edm_is_the_paper_s(sigma_data):
    """lambda(sigma) |D(y + n; sigma) - y|^2, lambda = (sigma^2 + d^2) / (sigma d)^2 (section 5)."""
    config = DiffusionConfig(**{**EDM, "sigma_data": sigma_data})
    process = make_process(config)
    network = SmoothDenoiser(**EDM)
    generator = torch.Generator().manual_seed(0)
    latents, drawn = torch.randn(2, 16, 4, 3, 3, generator=generator, dtype=torch.float64)
    timesteps = (torch.randn(16, generator=generator) * 1.2 - 1.2) / 4
    sigma = (4 * timesteps.double()).exp().view(-1, 1, 1, 1)
    noisy = latents + sigma * drawn
    c_in = 1 / (sigma**2 + sigma_data**2).sqrt()
    torch.testing.assert_close(add_noise(process, latents, drawn, timesteps), c_in * noisy)
    variance = sigma**2 + sigma_data**2
    raw = network(c_in * noisy, timesteps)
    denoised = sigma_data**2 / variance * noisy + sigma * sigma_data / variance.sqrt() * raw
    expected = (variance / (sigma * sigma_data) ** 2 * (denoised - latents) ** 2).flatten(1).mean(1)
    actual = loss_per_sample(config, process, raw.float(), latents, drawn, timesteps)
    torch.testing.assert_close(actual.double(), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("weighting", ["uniform", "sigma_sqrt", "cosmap"])
def test_the_loss_of_a_flow_is_that_of_diffusers_sd3_training_script(weighting):
    """(1 - sigma) x0 + sigma eps, target eps - x0, weighted, mean (train_dreambooth_sd3.py)."""
    config = DiffusionConfig(**FLOW, weighting=weighting, shift=3.0)
    process = make_process(config)
    network = SmoothDenoiser(**FLOW)
    generator = torch.Generator().manual_seed(0)
    latents, drawn = torch.randn(2, 16, 4, 3, 3, generator=generator)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    indices = torch.randint(1000, (16,), generator=generator)
    timesteps, sigmas = scheduler.timesteps[indices], scheduler.sigmas[indices].view(-1, 1, 1, 1)
    noisy = (1.0 - sigmas) * latents + sigmas * drawn
    torch.testing.assert_close(add_noise(process, latents, drawn, timesteps), noisy, rtol=1e-5, atol=1e-6)
    prediction = network(noisy, timesteps)
    weights = compute_loss_weighting_for_sd3({"uniform": "none"}.get(weighting, weighting), sigmas)
    expected = (weights * (prediction - (drawn - latents)) ** 2).reshape(16, -1).mean(1)
    actual = loss_per_sample(config, process, prediction, latents, drawn, timesteps)
    torch.testing.assert_close(actual, expected, rtol=2e-5, atol=1e-6)
    assert (loss_weights(config, process, timesteps) == 1).all() == (weighting == "uniform")


@pytest.mark.parametrize(
    ("density", "scheme"), [("logit_normal", "logit_normal"), ("mode", "mode"), ("uniform", "none")]
)
def test_densities_are_diffusers_functions_of_the_same_draws(density, scheme, monkeypatch):
    config = DiffusionConfig(**FLOW, density=density, density_mean=None, density_std=None)
    u = torch.rand(1000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(torch, "rand", lambda **_: u)
    monkeypatch.setattr(torch, "normal", lambda mean, std, **_: mean + std * torch.special.ndtri(u))
    theirs = compute_density_for_timestep_sampling(scheme, 1000, logit_mean=0, logit_std=1, mode_scale=1.29)
    torch.testing.assert_close(quantile(config, u), theirs, rtol=1e-12, atol=1e-12)
