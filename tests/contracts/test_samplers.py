"""What every entry of SAMPLERS keeps: what it needs, shapes, dtypes, determinism, batch independence."""

from __future__ import annotations

import inspect
from math import log
from typing import get_args

import pytest
import torch

from trainer import rng
from trainer.config.training import DiffusionConfig, SamplerName
from trainer.diffusion.levels import make_levels
from trainer.diffusion.processes import make_process
from trainer.diffusion.samplers import SAMPLERS, sample
from trainer.rng import Purpose

STOCHASTIC = {"ddpm", "euler_ancestral", "dpmpp_sde"}
SHAPE = (4, 6, 5)  # not square: no sampler may assume a size
every_sampler = pytest.mark.parametrize("name", SAMPLERS)
OBJECTIVES = {
    "eps": {},
    "v": {"prediction": "v"},
    "x0": {"prediction": "x0"},
    "flow": {"process": "flow", "prediction": "velocity", "shift": 2.0},
    "flow, x0": {"process": "flow", "prediction": "x0"},
    "edm": {"process": "edm", "prediction": "edm", "density": "log_normal"},
}
in_continuous_time = pytest.mark.parametrize("objective", ["flow", "flow, x0", "edm"])


class Denoiser:
    """A small fixed network on any size, that checks what it is given and counts calls."""

    def __init__(self, *, dtype=torch.float32, **settings):
        self.config = DiffusionConfig(**settings)
        self.schedule = make_process(self.config)
        self.prediction = self.config.prediction
        self.weight = torch.randn(4, 4, 3, 3, generator=torch.Generator().manual_seed(0)) * 0.1
        self.dtype = dtype
        self.discrete = self.config.process == "discrete"
        self.timesteps = []

    def __call__(self, x, timesteps):
        assert timesteps.shape == (len(x),)
        assert timesteps.dtype in ((torch.int64, torch.float32) if self.discrete else (torch.float32,))
        assert (timesteps == timesteps[0]).all()
        low, high = {"discrete": (0, 999), "flow": (1, 1000), "edm": (log(0.002) / 4, log(80) / 4)}[
            self.config.process
        ]
        assert low - 1e-6 <= timesteps[0] <= high + 1e-6
        self.timesteps.append(timesteps[0].item())
        out = torch.tanh(torch.nn.functional.conv2d(x, self.weight, padding=1))
        return out.to(self.dtype)


def counter_noise(ordinals, shape=SHAPE):
    return lambda index: rng.normal(0, ordinals, Purpose.SAMPLER + index, shape)


def run(name, denoiser, ordinals, steps=6, **settings):
    start = rng.normal(0, ordinals, Purpose.INITIAL, SHAPE)
    settings = {"noise": counter_noise(ordinals), **settings}
    return sample(name, denoiser, start, num_steps=steps, **settings)


def test_the_dictionary_is_the_choice_offered_by_the_configuration():
    assert tuple(SAMPLERS) == get_args(SamplerName)


@every_sampler
def test_a_sampler_asks_for_what_it_needs_and_nothing_else(name):
    sampler = SAMPLERS[name]
    assert tuple(inspect.signature(sampler.steps).parameters) == ("look", "x", "levels", *sampler.needs)
    assert set(sampler.needs) <= {"noise", "eta"}


@every_sampler
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("spacing", ["leading", "trailing", "karras"])
@pytest.mark.parametrize("steps", [1, 2, 3, 16])
def test_finite_latents_of_the_same_shape(name, objective, spacing, steps):
    out = run(name, Denoiser(**OBJECTIVES[objective]), torch.arange(2), steps=steps, spacing=spacing)
    assert out.shape == (2, *SHAPE)
    assert out.dtype == torch.float32
    assert out.isfinite().all()
    assert not out.requires_grad


@every_sampler
@pytest.mark.parametrize("prediction", ["v", "x0"])
def test_zero_terminal_snr_is_finite(name, prediction):
    rescaled = Denoiser(prediction=prediction, zero_terminal_snr=True)
    out = run(name, rescaled, torch.arange(2), spacing="trailing")
    assert out.isfinite().all()
    assert out.abs().max() < 50


@every_sampler
def test_a_picture_does_not_depend_on_its_batch(name):
    together = run(name, Denoiser(), torch.arange(5))
    for i in range(5):
        alone = run(name, Denoiser(), torch.tensor([i]))
        torch.testing.assert_close(alone[0], together[i], rtol=1e-4, atol=1e-5)


@every_sampler
@in_continuous_time
def test_neither_does_one_in_continuous_time_nor_one_in_half_precision(name, objective):
    settings = OBJECTIVES[objective]
    together = run(name, Denoiser(**settings), torch.arange(3), spacing="trailing", steps=16)
    alone = run(name, Denoiser(**settings), torch.tensor([1]), spacing="trailing", steps=16)
    torch.testing.assert_close(alone[0], together[1], rtol=1e-3, atol=1e-4)
    half = run(
        name, Denoiser(dtype=torch.bfloat16, **settings), torch.arange(3), spacing="trailing", steps=16
    )
    assert half.dtype == torch.float32
    assert (half - together).abs().mean() < 0.1 * together.abs().mean()


@every_sampler
@pytest.mark.parametrize("objective", ["flow", "edm"])
def test_image_to_image_in_continuous_time_stays_near(name, objective):
    ordinals = torch.arange(2)
    latents = rng.normal(1, ordinals, Purpose.INITIAL, SHAPE)
    near, far = (
        (run(name, Denoiser(**OBJECTIVES[objective]), ordinals, 20, latents=latents, strength=s) - latents)
        for s in (0.05, 0.9)
    )
    assert near.abs().mean() < 0.15
    assert near.abs().mean() < far.abs().mean() / 2


@every_sampler
def test_repeatable(name):
    assert torch.equal(run(name, Denoiser(), torch.arange(2)), run(name, Denoiser(), torch.arange(2)))


@every_sampler
def test_low_precision_networks_leave_the_state_in_fp32(name):
    out = run(name, Denoiser(dtype=torch.bfloat16), torch.arange(2))
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, run(name, Denoiser(), torch.arange(2)), rtol=0.2, atol=0.2)


@every_sampler
def test_noise_is_asked_for_only_where_it_is_used(name):
    asked = []

    def noise(index):
        asked.append(index)
        return torch.zeros(2, *SHAPE)

    run(name, Denoiser(), torch.arange(2), noise=noise)
    # Never for the last step, which ends on clean latents.
    assert asked == (list(range(5)) if name in STOCHASTIC else [])
    if name in STOCHASTIC:
        with pytest.raises(ValueError, match="stochastic"):
            sample(name, Denoiser(), torch.zeros(2, *SHAPE), num_steps=6)


def test_eta_makes_ddim_stochastic_and_nothing_else():
    for name in SAMPLERS:
        plain, noisy = (run(name, Denoiser(), torch.arange(2), eta=eta) for eta in (0.0, 1.0))
        assert torch.equal(plain, noisy) == (name != "ddim")


@every_sampler
def test_callback_sees_every_step_and_the_estimate(name):
    seen = []
    denoiser, ordinals = Denoiser(), torch.arange(2)
    x = rng.normal(0, ordinals, Purpose.INITIAL, SHAPE)
    levels = make_levels(denoiser.schedule, 6)
    noise, see = counter_noise(ordinals), lambda i, n, x0: seen.append((i, n, x0))
    out = SAMPLERS[name](denoiser, x, levels, noise=noise, callback=see)
    assert [(i, n) for i, n, _ in seen] == [(i, 6) for i in range(6)]
    assert all(x0.shape == out.shape for _, _, x0 in seen)
    assert torch.equal(out, run(name, denoiser, ordinals))


@every_sampler
def test_number_of_evaluations(name):
    denoiser = Denoiser()
    run(name, denoiser, torch.arange(1), steps=8)
    assert len(denoiser.timesteps) == {"heun": 15, "plms": 9}.get(name, 8)
    assert denoiser.timesteps == sorted(denoiser.timesteps, reverse=True)


@every_sampler
def test_image_to_image_with_little_strength_stays_near(name):
    ordinals = torch.arange(2)
    latents = rng.normal(1, ordinals, Purpose.INITIAL, SHAPE)
    near, far = (
        (run(name, Denoiser(), ordinals, 20, latents=latents, strength=s) - latents).abs().mean()
        for s in (0.05, 0.9)
    )
    assert near < 0.15
    assert near < far / 2


def test_unknown_sampler():
    with pytest.raises(ValueError, match="dpmpp_2m"):
        sample("ddmi", Denoiser(), torch.zeros(1, *SHAPE), num_steps=3)  # type: ignore[arg-type]
