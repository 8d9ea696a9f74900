"""One-step samplers: DDPM, DDIM, Euler, Euler ancestral, Heun. Each yields once per level that it leaves.

A sampler takes (look, x at level 0, levels), and noise or eta only where it has a use for them;
`sampling.Sampler` binds the rest. x = alpha x0 + sigma eps with alpha^2 + sigma^2 = 1, whatever the process.
The samplers of Karras et al. (2022) work on y = x / alpha at noise level r = sigma / alpha, where the
probability-flow ODE is dy / dr = eps; Euler and Heun go along the path itself where it is straight
(`NoiseLevels.line`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from torch import Tensor

from trainer.diffusion.denoiser import Look, NoiseSource, Step
from trainer.diffusion.levels import NoiseLevels


def sample_ddpm(look: Look, x: Tensor, levels: NoiseLevels, noise: NoiseSource) -> Iterator[Step]:
    """Ancestral sampling from q(x_s | x_t, x0), the smaller variance (Ho et al. 2020, equations 6 and 7)."""
    for i in range(len(levels)):
        x0, _ = look(x, i)
        alpha, sigma, alpha_next, sigma_next = _interval(levels, i)
        step_alpha = (alpha / alpha_next) ** 2  # product of (1 - beta) between the two levels
        x0_weight = alpha_next * (1.0 - step_alpha) / sigma**2
        x_weight = math.sqrt(step_alpha) * sigma_next**2 / sigma**2
        x = x0_weight * x0 + x_weight * x
        if sigma_next > 0.0:
            x = x + sigma_next / sigma * math.sqrt(1.0 - step_alpha) * noise(i)
        yield x, x0


def sample_ddim(look: Look, x: Tensor, levels: NoiseLevels, noise: NoiseSource, eta: float) -> Iterator[Step]:
    """Song, Meng and Ermon 2021, equations 12 and 16: eta 0 is deterministic, eta 1 as noisy as DDPM."""
    for i in range(len(levels)):
        x0, eps = look(x, i)
        alpha, sigma, alpha_next, sigma_next = _interval(levels, i)
        deviation = eta * sigma_next / sigma * math.sqrt(1.0 - (alpha / alpha_next) ** 2)
        x = alpha_next * x0 + math.sqrt(max(sigma_next**2 - deviation**2, 0.0)) * eps
        if deviation > 0.0:
            x = x + deviation * noise(i)
        yield x, x0


def sample_euler(look: Look, x: Tensor, levels: NoiseLevels) -> Iterator[Step]:
    """Euler steps of the ODE (Karras et al. 2022): in exact arithmetic DDIM with eta 0."""
    c, r = levels.line(0)
    y = x / c
    for i in range(len(levels)):
        x0, slope = _slope(look, y * c, i, levels)
        r_before, (c, r) = r, levels.line(i + 1)
        y = y + slope * (r - r_before)
        yield y * c, x0


def sample_euler_ancestral(look: Look, x: Tensor, levels: NoiseLevels, noise: NoiseSource) -> Iterator[Step]:
    """Euler to a lower level than wanted, then noise up to it, with DDPM's share of fresh noise."""
    y = x / levels.alphas[0]
    for i in range(len(levels)):
        x0, slope = look(y * levels.alphas[i], i)
        ratio, ratio_next = levels.ratio(i), levels.ratio(i + 1)
        up = ratio_next / ratio * math.sqrt(ratio**2 - ratio_next**2)
        down = math.sqrt(max(ratio_next**2 - up**2, 0.0))
        y = y + slope * (down - ratio)
        if up > 0.0:
            y = y + up * noise(i)
        yield y * levels.alphas[i + 1], x0


def sample_heun(look: Look, x: Tensor, levels: NoiseLevels) -> Iterator[Step]:
    """Heun's second-order steps (Karras et al. 2022, algorithm 1), 2 n - 1 evaluations: the last is Euler."""
    c, r = levels.line(0)
    y = x / c
    for i in range(len(levels)):
        x0, slope = _slope(look, y * c, i, levels)
        r_before, (c, r) = r, levels.line(i + 1)
        width = r - r_before
        if i + 1 < len(levels):
            _, slope_next = _slope(look, (y + slope * width) * c, i + 1, levels)
            slope = (slope + slope_next) / 2
        y = y + slope * width
        yield y * c, x0


def _slope(look: Look, x: Tensor, i: int, levels: NoiseLevels) -> tuple[Tensor, Tensor]:
    """(x0, dy / dr) at level i, along `NoiseLevels.line`."""
    x0, eps = look(x, i)
    return x0, eps - x0 if levels.straight else eps


def _interval(levels: NoiseLevels, i: int) -> tuple[float, float, float, float]:
    return levels.alphas[i], levels.sigmas[i], levels.alphas[i + 1], levels.sigmas[i + 1]
