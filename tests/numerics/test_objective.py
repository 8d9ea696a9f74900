"""The objective: zero for an oracle, weights in closed form, timesteps that cover what they should."""

from __future__ import annotations

import itertools

import pytest
import torch

from trainer import rng
from trainer.config.training import DiffusionConfig
from trainer.diffusion.objective import add_noise, draw_timesteps, loss_per_sample, loss_weights
from trainer.diffusion.parameterization import from_x0, prediction_target
from trainer.diffusion.schedule import make_schedule
from trainer.rng import Purpose

LIMIT = 5.5  # standard deviations; fixed seeds, false alarm 4e-8 per check for a new seed


def batch(n=6, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    latents, noise = torch.randn(2, n, 4, 5, 5, dtype=dtype, generator=generator)
    return latents, noise, torch.randint(1000, (n,), generator=generator)


@pytest.mark.parametrize("loss", ["l2", "l1", "huber"])
@pytest.mark.parametrize("prediction", ["eps", "v", "x0"])
def test_zero_loss_for_the_oracle_and_only_for_it(prediction, loss):
    config = DiffusionConfig(prediction=prediction, loss=loss)
    schedule = make_schedule(config)
    latents, noise, timesteps = batch()
    alpha, sigma = schedule.coefficients(timesteps, latents)
    oracle = prediction_target(prediction, latents, noise, alpha, sigma)
    assert torch.equal(loss_per_sample(config, schedule, oracle, latents, noise, timesteps), torch.zeros(6))
    oracle = oracle.clone()
    oracle[2] += 0.01
    losses = loss_per_sample(config, schedule, oracle, latents, noise, timesteps)
    assert losses[2] > 0
    assert losses.count_nonzero() == 1


@pytest.mark.parametrize("loss", ["l2", "l1", "huber"])
def test_distances(loss):
    """An error e in every element: e^2, |e|, and huber's two branches around delta = 0.1."""
    config = DiffusionConfig(loss=loss, huber_delta=0.1)
    schedule = make_schedule(config)
    latents, noise, timesteps = batch(2)
    errors = torch.tensor([0.05, 0.4])
    losses = loss_per_sample(config, schedule, noise + errors.view(2, 1, 1, 1), latents, noise, timesteps)
    expected = {"l2": errors**2, "l1": errors, "huber": torch.tensor([0.05**2 / 2, 0.1 * (0.4 - 0.05)])}
    torch.testing.assert_close(losses, expected[loss], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("gamma", [0.5, 5.0])
def test_min_snr_is_the_same_objective_for_every_prediction_type(gamma):
    """One denoiser has the loss min(SNR, gamma) |x0 error|^2, however its output is expressed."""
    latents, noise, _ = batch(1000, torch.float64)
    timesteps = torch.arange(1000)
    estimate = latents + 0.1 * torch.randn(
        latents.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
    )
    schedule = make_schedule(DiffusionConfig())
    expected = (estimate - latents).square().flatten(1).mean(1) * schedule.snr.clamp(max=gamma)
    x = add_noise(schedule, latents, noise, timesteps)
    alpha, sigma = schedule.coefficients(timesteps, latents)
    for prediction in ("eps", "v", "x0"):
        config = DiffusionConfig(prediction=prediction, min_snr_gamma=gamma)
        output = from_x0(prediction, estimate, x, alpha, sigma)
        actual = loss_per_sample(config, schedule, output, latents, noise, timesteps)
        # float32: an error of 1e-7 in v or eps at high noise is one of 1e-5 in x0.
        torch.testing.assert_close(actual.double(), expected, rtol=2e-3, atol=1e-9)


@pytest.mark.parametrize("prediction", ["eps", "v", "x0"])
def test_min_snr_weights_closed_form(prediction):
    schedule = make_schedule(DiffusionConfig())
    timesteps = torch.arange(1000)
    weights = loss_weights(DiffusionConfig(prediction=prediction, min_snr_gamma=5.0), schedule, timesteps)
    for t in (0, 1, 100, 400, 700, 999):
        snr = schedule.alphas_cumprod[t].item() / (1 - schedule.alphas_cumprod[t].item())
        expected = min(snr, 5.0) / {"eps": snr, "v": snr + 1, "x0": 1.0}[prediction]
        assert weights[t].item() == pytest.approx(expected, rel=1e-6)
    assert torch.equal(
        loss_weights(DiffusionConfig(prediction=prediction), schedule, timesteps), torch.ones(1000)
    )
    assert weights.isfinite().all()
    assert (weights > 0).all()


@pytest.mark.parametrize("steps", [10, 1000])
def test_uniform_timesteps(steps):
    config = DiffusionConfig(num_timesteps=steps)
    n = 2**17
    uniforms = rng.uniform(0, torch.arange(n), Purpose.TIMESTEP, ())
    timesteps = draw_timesteps(config, uniforms, torch.zeros(n, dtype=torch.int64), 64)
    assert timesteps.dtype == torch.int64
    counts = torch.bincount(timesteps, minlength=steps).double()
    assert len(counts) == steps
    statistic = ((counts - n / steps) ** 2 / (n / steps)).sum().item()
    assert abs(statistic - (steps - 1)) < LIMIT * (2 * (steps - 1)) ** 0.5


def test_last_timestep_is_reached_but_never_exceeded():
    edge = torch.tensor([0.0, 1 - 2.0**-24])
    for kind in ("uniform", "stratified"):
        config = DiffusionConfig(timesteps=kind, num_timesteps=1000)
        assert draw_timesteps(config, edge, torch.tensor([0, 6]), 7).tolist() == [0, 999]


@pytest.mark.parametrize("global_batch_size", [8, 100, 1000])
def test_stratified_timesteps_cover_one_batch_evenly_and_stay_uniform(global_batch_size):
    config = DiffusionConfig(timesteps="stratified", num_timesteps=1000)
    seen = torch.zeros(1000, dtype=torch.float64)
    first_sample = []
    steps = 200
    for step in range(steps):
        slots = rng.permutation(0, step, Purpose.STRATUM, global_batch_size)
        ordinals = torch.arange(global_batch_size) + step * global_batch_size
        uniforms = rng.uniform(0, ordinals, Purpose.TIMESTEP, ())
        timesteps = draw_timesteps(config, uniforms, slots, global_batch_size)
        # One timestep in each of the N equal parts of [0, T).
        edges = torch.arange(global_batch_size + 1) * 1000 / global_batch_size
        for t, low, high in zip(timesteps.sort()[0].tolist(), *lows_and_highs(edges), strict=True):
            assert int(low) <= t < high
        seen += torch.bincount(timesteps, minlength=1000)
        first_sample.append(timesteps[0].item())
    expected = steps * global_batch_size / 10
    tenths = seen.view(10, 100).sum(1)
    assert ((tenths - expected).abs() < LIMIT * expected**0.5).all()
    # The sample in the first place of the batch meets all noise levels, not one part of them.
    spread = torch.tensor(first_sample).double()
    assert abs(spread.mean().item() - 499.5) < LIMIT * 289 / steps**0.5


def lows_and_highs(edges):
    pairs = list(itertools.pairwise(edges.tolist()))
    return [low for low, _ in pairs], [high for _, high in pairs]


def test_stratified_timesteps_do_not_depend_on_who_holds_which_samples():
    config = DiffusionConfig(timesteps="stratified")
    slots, ordinals = rng.permutation(0, 3, Purpose.STRATUM, 24), torch.arange(24) + 72
    uniforms = rng.uniform(0, ordinals, Purpose.TIMESTEP, ())
    whole = draw_timesteps(config, uniforms, slots, 24)
    for world_size in (2, 3, 4):
        parts = [
            draw_timesteps(
                config,
                rng.uniform(0, ordinals[r::world_size], Purpose.TIMESTEP, ()),
                slots[r::world_size],
                24,
            )
            for r in range(world_size)
        ]
        for r, part in enumerate(parts):
            assert torch.equal(part, whole[r::world_size])


def test_gradients_reach_the_prediction_in_any_precision():
    config = DiffusionConfig(min_snr_gamma=5.0)
    schedule = make_schedule(config)
    latents, noise, timesteps = batch()
    output = torch.zeros_like(latents, dtype=torch.bfloat16, requires_grad=True)
    losses = loss_per_sample(config, schedule, output, latents, noise, timesteps)
    assert losses.dtype == torch.float32
    losses.mean().backward()
    assert output.grad is not None
    assert output.grad.isfinite().all()
    assert output.grad.abs().sum() > 0
