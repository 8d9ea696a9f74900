"""The training objective as pure functions: noise and timesteps are arguments, nothing is drawn here."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from trainer.config.training import DiffusionConfig
from trainer.diffusion.parameterization import prediction_target
from trainer.diffusion.processes import Process
from trainer.diffusion.schedule import NoiseSchedule


def draw_timesteps(
    config: DiffusionConfig, uniforms: Tensor, slots: Tensor, global_batch_size: int
) -> Tensor:
    """Timesteps [B] from `uniforms` [B], multiples of 2^-24 in [0, 1): int64 in [0, T), or float32.

    The quantile function of the density turns a uniform number u into what is drawn, so that one draw per
    sample serves every density. timesteps=stratified replaces u by (slot + u) / N first, so that the N
    samples of one global batch cover the density evenly, each still having it (Kingma et al. 2021, appendix
    I.1).
    `slots` int64 [B] are the samples' places in a permutation of range(N) that is new at every step
    (`rng.permutation` keyed by the step): with fixed places one part of the data would always meet the
    same noise levels.
    """
    position = uniforms.to(torch.float64)
    if config.process != "discrete" or config.density != "uniform":
        position = position + 2.0**-25  # the middle of its cell: quantiles at 0 may be infinite
    if config.timesteps == "stratified":
        position = (slots.to(torch.float64) + position) / global_batch_size
    drawn = quantile(config, position)
    match config.process:
        case "discrete":  # floor(T u)
            return (drawn * config.num_timesteps).long().clamp_(max=config.num_timesteps - 1)
        case "flow":
            moved = config.shift * drawn / (1.0 + (config.shift - 1.0) * drawn)
            return (config.num_timesteps * moved).float()
        case "edm":
            return (drawn / 4.0).float()


def quantile(config: DiffusionConfig, u: Tensor) -> Tensor:
    """What a uniform number `u` (float64 [B], in (0, 1)) draws: t in (0, 1), or edm's ln(sigma); monotonic.

    logit_normal: ln(t / (1 - t)) is normal (Esser et al. 2024, equation 19).
    mode: 1 - u - s (cos(pi u / 2)^2 - 1 + u) (equation 20).
    cosmap: 1 - 1 / (tan(pi u / 2) + 1) (equation 21).
    log_normal: ln(sigma) is normal (Karras et al. 2022, table 1).
    """
    mean, deviation = config.density_mean, config.density_std
    match config.density:
        case "uniform":
            return u
        case "logit_normal":
            logit = (mean or 0.0) + (1.0 if deviation is None else deviation) * torch.special.ndtri(u)
            return logit.sigmoid()
        case "mode":
            return 1.0 - u - config.mode_scale * ((math.pi / 2 * u).cos().square() - 1.0 + u)
        case "cosmap":
            return 1.0 - 1.0 / ((math.pi / 2 * u).tan() + 1.0)
        case "log_normal":
            if mean is None:
                mean = math.log(2.0 * config.sigma_data) - 1.2
            return mean + (1.2 if deviation is None else deviation) * torch.special.ndtri(u)


def falls(config: DiffusionConfig) -> bool:
    """Whether `quantile` falls: small numbers then draw much noise."""
    low, high = quantile(config, torch.tensor([0.25, 0.75], dtype=torch.float64)).tolist()
    return bool(high < low)


def offset_noise(noise: Tensor, offsets: Tensor, strength: float) -> Tensor:
    """Noise [B, C, H, W] plus `strength` times standard normal `offsets` [B, C], constant over a channel."""
    return noise + strength * offsets[:, :, None, None]


def add_noise(process: Process, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
    """x_t = alpha_t x_0 + sigma_t eps, [B, C, H, W] (Ho et al. 2020, equation 4)."""
    alpha, sigma = process.coefficients(timesteps, latents)
    return alpha * latents + sigma * noise


def loss_weights(config: DiffusionConfig, process: Process, timesteps: Tensor) -> Tensor:
    """Weight of each sample's loss, float32 [B]; 1 unless min-SNR or `weighting` say otherwise.

    Hang et al. 2023 weight the error of x0 by min(SNR, gamma). One unit of squared error in x0 is SNR
    units in eps and SNR + 1 units in v, hence min(SNR, gamma) / SNR and min(SNR, gamma) / (SNR + 1).
    On the straight path sigma_sqrt is 1 / t^2 (of t >= 1 / T: it has no bound) and cosmap
    2 / (pi (1 - 2 t + 2 t^2)) (Esser et al. 2024, equation 21, as diffusers' training scripts weight).
    EDM's weight (sigma^2 + d^2) / (sigma d)^2 of the error of x0 is 1 for that of F (Karras et al. 2022,
    section 5).
    """
    if config.weighting != "uniform":
        t = timesteps.to(torch.float64) / config.num_timesteps
        if config.weighting == "sigma_sqrt":
            return t.clamp(min=1.0 / config.num_timesteps).pow(-2).float()
        return (2.0 / (math.pi * (1.0 - 2.0 * t + 2.0 * t * t))).float()
    if config.min_snr_gamma is None:
        return torch.ones(timesteps.shape, device=timesteps.device)
    assert isinstance(process, NoiseSchedule), "min-SNR is for the discrete process"
    snr = process.snr.to(timesteps.device)[timesteps]
    match config.prediction:
        case "eps":
            weights = (config.min_snr_gamma / snr).clamp(max=1.0)
        case "v":
            weights = snr.clamp(max=config.min_snr_gamma) / (snr + 1.0)
        case _:
            weights = snr.clamp(max=config.min_snr_gamma)
    return weights.float()


def loss_per_sample(
    config: DiffusionConfig,
    process: Process,
    prediction: Tensor,
    latents: Tensor,
    noise: Tensor,
    timesteps: Tensor,
) -> Tensor:
    """Weighted distance between `prediction` [B, C, H, W] and its target, float32 [B], mean over elements."""
    latents, noise = latents.float(), noise.float()
    alpha, sigma = process.coefficients(timesteps, latents)
    target = prediction_target(config.prediction, latents, noise, alpha, sigma, process.sigma_data)
    distance = _distance(config, prediction.float(), target)
    return distance.flatten(1).mean(dim=1) * loss_weights(config, process, timesteps)


def weigh_by_uncertainty(losses: Tensor, uncertainty: Tensor) -> Tensor:
    """loss / e^u + u, [B]: least where e^u is the expected loss at that level.

    (Karras et al. 2024, equation 21.) Every level then has the same gradient, however hard; u is learned
    with the network, from the same loss, whose gradient in u is 1 - loss / e^u.
    """
    return losses * (-uncertainty).exp() + uncertainty


def _distance(config: DiffusionConfig, prediction: Tensor, target: Tensor) -> Tensor:
    match config.loss:
        case "l2":
            return functional.mse_loss(prediction, target, reduction="none")
        case "l1":
            return functional.l1_loss(prediction, target, reduction="none")
        case "huber":
            # e^2 / 2 below delta, delta (|e| - delta / 2) above.
            return functional.huber_loss(prediction, target, reduction="none", delta=config.huber_delta)
