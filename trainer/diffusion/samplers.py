"""One-step samplers: DDPM, DDIM, Euler, Euler ancestral, Heun. Free functions with one signature.

x is in the scale of training, x = alpha x0 + sigma eps. The three samplers of Karras et al. (2022) work on
y = x / alpha at noise level r = sigma / alpha, where the probability-flow ODE is dy / dr = eps.
"""

from __future__ import annotations

import math

from torch import Tensor

from trainer.diffusion.denoiser import Callback, Denoiser, NoiseSource, evaluate
from trainer.diffusion.levels import NoiseLevels


def sample_ddpm(
    denoiser: Denoiser,
    x: Tensor,
    levels: NoiseLevels,
    *,
    noise: NoiseSource,
    eta: float,
    callback: Callback,
) -> Tensor:
    """Ancestral sampling from q(x_s | x_t, x0), the smaller variance (Ho et al. 2020, equations 6 and 7)."""
    for i in range(len(levels)):
        x0, _ = evaluate(denoiser, x, levels, i)
        alpha, sigma, alpha_next, sigma_next = _interval(levels, i)
        step_alpha = (alpha / alpha_next) ** 2  # product of (1 - beta) between the two levels
        x0_weight = alpha_next * (1.0 - step_alpha) / sigma**2
        x_weight = math.sqrt(step_alpha) * sigma_next**2 / sigma**2
        x = x0_weight * x0 + x_weight * x
        if sigma_next > 0.0:
            x = x + sigma_next / sigma * math.sqrt(1.0 - step_alpha) * noise(i)
        callback(i, len(levels), x0)
    return x


def sample_ddim(
    denoiser: Denoiser,
    x: Tensor,
    levels: NoiseLevels,
    *,
    noise: NoiseSource,
    eta: float,
    callback: Callback,
) -> Tensor:
    """Song, Meng and Ermon 2021, equations 12 and 16: eta 0 is deterministic, eta 1 as noisy as DDPM."""
    for i in range(len(levels)):
        x0, eps = evaluate(denoiser, x, levels, i)
        alpha, sigma, alpha_next, sigma_next = _interval(levels, i)
        deviation = eta * sigma_next / sigma * math.sqrt(1.0 - (alpha / alpha_next) ** 2)
        x = alpha_next * x0 + math.sqrt(max(sigma_next**2 - deviation**2, 0.0)) * eps
        if deviation > 0.0:
            x = x + deviation * noise(i)
        callback(i, len(levels), x0)
    return x


def sample_euler(
    denoiser: Denoiser,
    x: Tensor,
    levels: NoiseLevels,
    *,
    noise: NoiseSource,
    eta: float,
    callback: Callback,
) -> Tensor:
    """Euler steps of the ODE (Karras et al. 2022): in exact arithmetic DDIM with eta 0."""
    levels = levels.finite()
    y = x / levels.alphas[0]
    for i in range(len(levels)):
        x0, slope = evaluate(denoiser, y * levels.alphas[i], levels, i)
        y = y + slope * (levels.ratio(i + 1) - levels.ratio(i))
        callback(i, len(levels), x0)
    return y * levels.alphas[-1]


def sample_euler_ancestral(
    denoiser: Denoiser,
    x: Tensor,
    levels: NoiseLevels,
    *,
    noise: NoiseSource,
    eta: float,
    callback: Callback,
) -> Tensor:
    """Euler to a lower level than wanted, then noise up to it, with DDPM's share of fresh noise."""
    levels = levels.finite()
    y = x / levels.alphas[0]
    for i in range(len(levels)):
        x0, slope = evaluate(denoiser, y * levels.alphas[i], levels, i)
        ratio, ratio_next = levels.ratio(i), levels.ratio(i + 1)
        up = ratio_next / ratio * math.sqrt(ratio**2 - ratio_next**2)
        down = math.sqrt(max(ratio_next**2 - up**2, 0.0))
        y = y + slope * (down - ratio)
        if up > 0.0:
            y = y + up * noise(i)
        callback(i, len(levels), x0)
    return y * levels.alphas[-1]


def sample_heun(
    denoiser: Denoiser,
    x: Tensor,
    levels: NoiseLevels,
    *,
    noise: NoiseSource,
    eta: float,
    callback: Callback,
) -> Tensor:
    """Heun's second-order steps (Karras et al. 2022, algorithm 1), 2 n - 1 evaluations: the last is Euler."""
    levels = levels.finite()
    y = x / levels.alphas[0]
    for i in range(len(levels)):
        x0, slope = evaluate(denoiser, y * levels.alphas[i], levels, i)
        width = levels.ratio(i + 1) - levels.ratio(i)
        if i + 1 < len(levels):
            _, slope_next = evaluate(denoiser, (y + slope * width) * levels.alphas[i + 1], levels, i + 1)
            slope = (slope + slope_next) / 2
        y = y + slope * width
        callback(i, len(levels), x0)
    return y * levels.alphas[-1]


def _interval(levels: NoiseLevels, i: int) -> tuple[float, float, float, float]:
    return levels.alphas[i], levels.sigmas[i], levels.alphas[i + 1], levels.sigmas[i + 1]
