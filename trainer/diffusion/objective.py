"""The training objective as pure functions: noise and timesteps are arguments, nothing is drawn here."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from trainer.config.training import DiffusionConfig
from trainer.diffusion.parameterization import prediction_target
from trainer.diffusion.schedule import NoiseSchedule


def draw_timesteps(
    config: DiffusionConfig, uniforms: Tensor, slots: Tensor, global_batch_size: int
) -> Tensor:
    """Timesteps int64 [B] in [0, T) from `uniforms` [B] in [0, 1).

    uniform: floor(T u). stratified: floor(T (slot + u) / N), so that the N samples of one global batch
    cover [0, T) evenly, each timestep still being uniform over it (Kingma et al. 2021, appendix I.1).
    `slots` int64 [B] are the samples' places in a permutation of range(N) that is new at every step
    (`rng.permutation` keyed by the step): with fixed places one part of the data would always meet the
    same noise levels.
    """
    position = uniforms.to(torch.float64)
    if config.timesteps == "stratified":
        position = (slots.to(torch.float64) + position) / global_batch_size
    return (position * config.num_timesteps).long().clamp_(max=config.num_timesteps - 1)


def offset_noise(noise: Tensor, offsets: Tensor, strength: float) -> Tensor:
    """Noise [B, C, H, W] plus `strength` times standard normal `offsets` [B, C], constant over a channel."""
    return noise + strength * offsets[:, :, None, None]


def add_noise(schedule: NoiseSchedule, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
    """x_t = alpha_t x_0 + sigma_t eps, [B, C, H, W] (Ho et al. 2020, equation 4)."""
    alpha, sigma = schedule.coefficients(timesteps, latents)
    return alpha * latents + sigma * noise


def loss_weights(config: DiffusionConfig, schedule: NoiseSchedule, timesteps: Tensor) -> Tensor:
    """Weight of each sample's loss, float32 [B]; 1 without min-SNR.

    Hang et al. 2023 weight the error of x0 by min(SNR, gamma). One unit of squared error in x0 is SNR
    units in eps and SNR + 1 units in v, hence min(SNR, gamma) / SNR and min(SNR, gamma) / (SNR + 1).
    """
    if config.min_snr_gamma is None:
        return torch.ones(timesteps.shape, device=timesteps.device)
    snr = schedule.snr.to(timesteps.device)[timesteps]
    match config.prediction:
        case "eps":
            weights = (config.min_snr_gamma / snr).clamp(max=1.0)
        case "v":
            weights = snr.clamp(max=config.min_snr_gamma) / (snr + 1.0)
        case "x0":
            weights = snr.clamp(max=config.min_snr_gamma)
    return weights.float()


def loss_per_sample(
    config: DiffusionConfig,
    schedule: NoiseSchedule,
    prediction: Tensor,
    latents: Tensor,
    noise: Tensor,
    timesteps: Tensor,
) -> Tensor:
    """Weighted distance between `prediction` [B, C, H, W] and its target, float32 [B], mean over elements."""
    latents, noise = latents.float(), noise.float()
    alpha, sigma = schedule.coefficients(timesteps, latents)
    target = prediction_target(config.prediction, latents, noise, alpha, sigma)
    distance = _distance(config, prediction.float(), target)
    return distance.flatten(1).mean(dim=1) * loss_weights(config, schedule, timesteps)


def _distance(config: DiffusionConfig, prediction: Tensor, target: Tensor) -> Tensor:
    match config.loss:
        case "l2":
            return functional.mse_loss(prediction, target, reduction="none")
        case "l1":
            return functional.l1_loss(prediction, target, reduction="none")
        case "huber":
            # e^2 / 2 below delta, delta (|e| - delta / 2) above.
            return functional.huber_loss(prediction, target, reduction="none", delta=config.huber_delta)
