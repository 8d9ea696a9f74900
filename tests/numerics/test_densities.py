"""What the timestep densities draw, against their laws in closed form."""

from __future__ import annotations

import math

import pytest
import torch

from trainer import rng
from trainer.config.training import DiffusionConfig
from trainer.diffusion.objective import draw_timesteps, loss_weights
from trainer.diffusion.processes import at_size, make_process
from trainer.rng import Purpose

LIMIT = 5.5  # standard deviations; fixed seeds, false alarm 4e-8 per check for a new seed
N = 2**15


def normal_cdf(x):
    return 0.5 * (1.0 + torch.special.erf(x / math.sqrt(2.0)))


def logit_normal_cdf(t, mean=0.0, deviation=1.0):
    return normal_cdf((torch.log(t / (1 - t)) - mean) / deviation)


def mode_cdf(t, scale):
    """By bisection of t(u), which falls from 1 to 0 (Esser et al. 2024, equation 20)."""
    low, high = torch.zeros_like(t), torch.ones_like(t)
    for _ in range(60):
        u = (low + high) / 2
        above = 1 - u - scale * (torch.cos(math.pi / 2 * u) ** 2 - 1 + u) > t
        low, high = torch.where(above, u, low), torch.where(above, high, u)
    return 1 - (low + high) / 2


def cosmap_cdf(t):
    """The integral of 2 / (pi (1 - 2 t + 2 t^2)) (equation 21)."""
    return (torch.atan(2 * t - 1) + math.pi / 4) * 2 / math.pi


LAWS = {
    "uniform": ({}, lambda t: t),
    "logit_normal": ({"density": "logit_normal"}, logit_normal_cdf),
    "logit_normal, moved": (
        {"density": "logit_normal", "density_mean": -0.5, "density_std": 1.7},
        lambda t: logit_normal_cdf(t, -0.5, 1.7),
    ),
    "mode": ({"density": "mode"}, lambda t: mode_cdf(t, 1.29)),
    "mode, more of the ends": ({"density": "mode", "mode_scale": -0.8}, lambda t: mode_cdf(t, -0.8)),
    "cosmap": ({"density": "cosmap"}, cosmap_cdf),
}
laws = pytest.mark.parametrize(("settings", "cdf"), LAWS.values(), ids=LAWS.keys())
FLOW = {"process": "flow", "prediction": "velocity"}


def draw(config, n=N, slots=None, batch_size=64, first=0):
    uniforms = rng.uniform(0, torch.arange(n) + first, Purpose.TIMESTEP, ())
    return draw_timesteps(
        config, uniforms, torch.zeros(n, dtype=torch.int64) if slots is None else slots, batch_size
    )


def distance(values, cdf):
    """Kolmogorov's, times sqrt(n): above 2.5 with a probability of 7e-6."""
    expected = cdf(values.double().sort()[0])
    grid = torch.arange(1, len(values) + 1, dtype=torch.float64) / len(values)
    return ((expected - grid).abs().max() * len(values) ** 0.5).item()


@laws
def test_times_of_a_flow_have_their_law(settings, cdf):
    timesteps = draw(DiffusionConfig(**FLOW, **settings))
    assert timesteps.dtype == torch.float32
    assert timesteps.min() > 0
    assert timesteps.max() <= 1000
    assert distance(timesteps / 1000, cdf) < 2.5
    assert distance(timesteps / 1000, lambda t: cdf(t.clamp(1e-9, 1 - 1e-9) ** 1.1)) > 2.5  # it can fail


@laws
def test_discrete_timesteps_have_the_same_law(settings, cdf):
    timesteps = draw(DiffusionConfig(num_timesteps=10, **settings))
    assert timesteps.dtype == torch.int64
    edges = cdf(torch.linspace(0, 1, 11, dtype=torch.float64).clamp(1e-12, 1 - 1e-12))
    expected = edges.diff() * N
    counts = torch.bincount(timesteps, minlength=10)
    assert len(counts) == 10
    statistic = ((counts - expected) ** 2 / expected).sum().item()
    assert abs(statistic - 9) < LIMIT * 18**0.5


@laws
def test_the_shift_moves_the_law(settings, cdf):
    """t' = a t / (1 + (a - 1) t) (Esser et al. 2024): P(t' <= s) is P(t <= s / (a - (a - 1) s))."""
    timesteps = draw(DiffusionConfig(**FLOW, **settings, shift=3.0))
    assert distance(timesteps / 1000, lambda s: cdf(s / (3.0 - 2.0 * s))) < 2.5


def test_a_shifted_logit_normal_is_one_with_another_mean():
    """ln(t / (1 - t)) moves by ln(a)."""
    drawn = draw(DiffusionConfig(**FLOW, density="logit_normal", shift=3.0))
    moved = draw(DiffusionConfig(**FLOW, density="logit_normal", density_mean=math.log(3.0)))
    torch.testing.assert_close(drawn, moved, rtol=1e-6, atol=1e-6)


def test_the_shift_follows_the_resolution():
    config = DiffusionConfig(**FLOW, shift=3.0, shift_pixels=1024)
    assert at_size(config, 1024, 1024).shift == pytest.approx(3.0)
    assert at_size(config, 512, 512).shift == pytest.approx(1.5)
    assert at_size(config, 512, 2048).shift == pytest.approx(3.0)  # the same number of pixels
    assert at_size(DiffusionConfig(**FLOW, shift=3.0), 64, 64).shift == 3.0
    # The same standard error of the mean of a constant picture's pixels at both sizes, as the paper derives.
    small, large = (make_process(at_size(config, edge, edge)) for edge in (512, 1024))
    for t_small, t_large in zip(
        small.visited(9, "trailing")[1:], large.visited(9, "trailing")[1:], strict=True
    ):
        (a, s), (b, r) = small.level(t_small), large.level(t_large)
        assert s / a / 512 == pytest.approx(r / b / 1024)


def test_sigma_of_edm_is_log_normal():
    config = DiffusionConfig(
        process="edm", prediction="edm", density="log_normal", density_mean=-0.4, density_std=1.0
    )
    timesteps = draw(config)
    assert timesteps.dtype == torch.float32
    log_sigma = 4 * timesteps.double()
    assert distance(log_sigma, lambda x: normal_cdf(x + 0.4)) < 2.5
    alpha, sigma = make_process(config).coefficients(timesteps, torch.zeros(N, 1, 1, 1, dtype=torch.float64))
    torch.testing.assert_close((sigma / alpha).flatten(), log_sigma.exp(), rtol=1e-9, atol=0)


def test_edm_draws_the_paper_s_levels_relative_to_the_data():
    """Unset: ln(sigma) of mean -1.2 at sigma_data 0.5, and the same noise relative to other data."""
    edm = {"process": "edm", "prediction": "edm", "density": "log_normal"}
    paper = draw(DiffusionConfig(**edm, sigma_data=0.5))
    assert (4 * paper.double()).mean().item() == pytest.approx(-1.2, abs=LIMIT * 1.2 / N**0.5)
    assert (4 * paper.double()).std().item() == pytest.approx(1.2, abs=LIMIT * 1.2 / (2 * N) ** 0.5)
    doubled = draw(DiffusionConfig(**edm, sigma_data=1.0))
    torch.testing.assert_close(4 * (doubled - paper), torch.full((N,), math.log(2.0)), rtol=1e-5, atol=1e-5)


ALL = [{**FLOW, **settings} for settings, _ in LAWS.values()] + [
    {"density": "logit_normal"},
    {"process": "edm", "prediction": "edm", "density": "log_normal"},
]


@pytest.mark.parametrize("settings", ALL)
def test_stratified_draws_cover_the_density_once_per_batch(settings):
    """One in each of N parts of equal probability; so the same sorted draws from batch to batch, nearly."""
    config = DiffusionConfig(timesteps="stratified", **settings)
    n = 64
    edges = DiffusionConfig(**settings)
    for step in range(5):
        slots = rng.permutation(0, step, Purpose.STRATUM, n)
        drawn = draw(config, n, slots, n, first=step * n).sort()[0]
        parts = torch.arange(n + 1, dtype=torch.float64) / n
        cells = draw_timesteps(edges, parts.clamp(max=1 - 2.0**-24), torch.zeros(n + 1), n).sort()[0]
        assert (drawn >= cells[:-1] - 1e-4 * cells[:-1].abs()).all()
        assert (drawn <= cells[1:] + 1e-4 * cells[1:].abs()).all()


@pytest.mark.parametrize("settings", ALL)
def test_draws_do_not_depend_on_who_holds_which_samples(settings):
    config = DiffusionConfig(timesteps="stratified", **settings)
    slots, ordinals = rng.permutation(0, 3, Purpose.STRATUM, 24), torch.arange(24) + 72
    whole = draw_timesteps(config, rng.uniform(0, ordinals, Purpose.TIMESTEP, ()), slots, 24)
    for world_size in (2, 3, 8):
        for r in range(world_size):
            part = rng.uniform(0, ordinals[r::world_size], Purpose.TIMESTEP, ())
            assert torch.equal(draw_timesteps(config, part, slots[r::world_size], 24), whole[r::world_size])


@pytest.mark.parametrize("settings", ALL)
def test_the_extreme_draws_are_finite_and_inside(settings):
    for timesteps in ("uniform", "stratified"):
        config = DiffusionConfig(timesteps=timesteps, **settings)
        edge = torch.tensor([0.0, 1 - 2.0**-24])
        drawn = draw_timesteps(config, edge, torch.tensor([0, 2**20 - 1]), 2**20)
        alpha, sigma = make_process(config).coefficients(drawn, torch.zeros(2, 1, 1, 1))
        assert drawn.isfinite().all()
        assert alpha.isfinite().all()
        assert (sigma > 0).all()


@pytest.mark.parametrize("weighting", ["sigma_sqrt", "cosmap"])
def test_weights_of_a_flow(weighting):
    config = DiffusionConfig(**FLOW, weighting=weighting)
    times = torch.tensor([1e-6, 0.001, 0.25, 0.5, 1.0], dtype=torch.float64)
    weights = loss_weights(config, make_process(config), (1000 * times).float())
    expected = {
        "sigma_sqrt": [1e6, 1e6, 16.0, 4.0, 1.0],
        "cosmap": [2 / (math.pi * (1 - 2 * t + 2 * t * t)) for t in times.tolist()],
    }[weighting]
    torch.testing.assert_close(weights, torch.tensor(expected), rtol=1e-5, atol=0)
