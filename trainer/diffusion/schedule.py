"""Noise schedules of the forward process q(x_t | x_0) = N(alpha_t x_0, sigma_t^2), computed in float64."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from trainer.config.training import DiffusionConfig, Spacing

KARRAS_RHO = 7.0
FEW_LEADING = 10
"""With fewer steps "leading" would leave out more than a tenth of the schedule."""


@dataclass(frozen=True)
class NoiseSchedule:
    """T discrete noise levels: alpha_t^2 + sigma_t^2 = 1, alpha_t^2 = prod_{s <= t} (1 - beta_s)."""

    betas: Tensor
    """float64 [T]."""
    alphas_cumprod: Tensor
    """float64 [T], alpha_t^2; falls with t, and is exactly 0 at the end with zero terminal SNR."""

    # As a `Process`:
    lowest: ClassVar[float] = 0.0
    preserves_variance: ClassVar[bool] = True
    straight: ClassVar[bool] = False
    sigma_data: ClassVar[float] = 1.0

    def __len__(self) -> int:
        return len(self.alphas_cumprod)

    @property
    def snr(self) -> Tensor:
        """alpha_t^2 / sigma_t^2, float64 [T]."""
        return self.alphas_cumprod / (1.0 - self.alphas_cumprod)

    @property
    def sigmas(self) -> Tensor:
        """Noise relative to signal, sigma_t / alpha_t, float64 [T] (sigma in Karras et al. 2022)."""
        return ((1.0 - self.alphas_cumprod) / self.alphas_cumprod).sqrt()

    def to(self, device: torch.device | str) -> NoiseSchedule:
        """The same schedule with its tables on `device`."""
        return NoiseSchedule(self.betas.to(device), self.alphas_cumprod.to(device))

    def coefficients(self, timesteps: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """(alpha_t, sigma_t) of int64 `timesteps` [B], each [B, 1, ...] in the dtype of `like` [B, ...]."""
        alphas_cumprod = self.alphas_cumprod.to(timesteps.device)[timesteps]
        shape = (-1, *(1 for _ in like.shape[1:]))
        alpha, sigma = alphas_cumprod.sqrt(), (1.0 - alphas_cumprod).sqrt()
        return alpha.view(shape).to(like.dtype), sigma.view(shape).to(like.dtype)

    def level(self, timestep: float) -> tuple[float, float]:
        """(alpha, sigma) at one real timestep in [0, T - 1]: ln(sigma / alpha) is interpolated linearly."""
        lower = math.floor(timestep)
        fraction = timestep - lower
        alpha_squared = float(self.alphas_cumprod[lower])
        if fraction > 0.0:
            above = float(self.alphas_cumprod[lower + 1])
            log_ratio = (1.0 - fraction) * _log_sigma(alpha_squared) + fraction * _log_sigma(above)
            alpha_squared = 1.0 / (1.0 + math.exp(2.0 * log_ratio))
        return math.sqrt(alpha_squared), math.sqrt(1.0 - alpha_squared)

    def visited(self, num_steps: int, spacing: Spacing) -> tuple[float, ...]:
        """Timesteps of a sampler, falling.

        leading: multiples of T / n, rounded down, plus 1 (the SD convention): from T - T / n + 1 to 1. Fewer
        than ten steps would start where much of the picture should already be visible, so they are trailing.
        trailing: T - 1 first, then down in steps of T / n (Lin et al. 2023, table 2).
        karras: from the largest to the smallest sigma / alpha, evenly in its 7th root (Karras et al. 2022,
        equation 5); timesteps are then real numbers.
        """
        total = len(self)
        if spacing == "karras":
            return _karras_timesteps(self, num_steps)
        if spacing == "trailing" or num_steps < min(FEW_LEADING, total):
            return tuple(float(round(total - i * total / num_steps) - 1) for i in range(num_steps))
        offset = 0 if num_steps == total else 1
        return tuple(float(i * total // num_steps + offset) for i in reversed(range(num_steps)))


def make_schedule(config: DiffusionConfig) -> NoiseSchedule:
    """The schedule of a configuration that passed `check_diffusion`."""
    betas = _betas(config)
    alphas_cumprod = torch.cumprod(1.0 - betas, dim=0)
    if config.zero_terminal_snr:
        alphas_cumprod = zero_terminal_snr(alphas_cumprod)
        previous = torch.cat([torch.ones(1, dtype=torch.float64), alphas_cumprod[:-1]])
        betas = 1.0 - alphas_cumprod / previous
    return NoiseSchedule(betas=betas, alphas_cumprod=alphas_cumprod)


def zero_terminal_snr(alphas_cumprod: Tensor) -> Tensor:
    """Shift and scale alpha_t so that the last is 0 and the first stays (Lin et al. 2023, algorithm 1)."""
    alpha = alphas_cumprod.sqrt()
    first, last = alpha[0], alpha[-1]
    return ((alpha - last) * (first / (first - last))) ** 2


def _betas(config: DiffusionConfig) -> Tensor:
    steps = config.num_timesteps
    match config.beta_schedule:
        case "linear":
            return torch.linspace(config.beta_start, config.beta_end, steps, dtype=torch.float64)
        case "scaled_linear":
            roots = (math.sqrt(config.beta_start), math.sqrt(config.beta_end))
            return torch.linspace(*roots, steps, dtype=torch.float64) ** 2
        case "cosine":
            # Nichol and Dhariwal 2021, equation 17; betas are capped where the ratio nears 0.
            time = torch.arange(steps + 1, dtype=torch.float64) / steps
            alpha_squared = torch.cos((time + 0.008) / 1.008 * (math.pi / 2)) ** 2
            return (1.0 - alpha_squared[1:] / alpha_squared[:-1]).clamp(max=0.999)


def _log_sigma(alpha_squared: float) -> float:
    return 0.5 * (math.log1p(-alpha_squared) - math.log(alpha_squared))


def _karras_timesteps(schedule: NoiseSchedule, num_steps: int) -> tuple[float, ...]:
    sigmas: list[float] = schedule.sigmas.tolist()
    if not math.isfinite(sigmas[-1]):
        raise ValueError("Karras spacing needs a finite last sigma; use trailing with zero terminal SNR")
    if num_steps == 1:
        return (float(len(sigmas) - 1),)
    first, last = sigmas[-1] ** (1.0 / KARRAS_RHO), sigmas[0] ** (1.0 / KARRAS_RHO)
    roots = [first + i / (num_steps - 1) * (last - first) for i in range(num_steps)]
    return tuple(_timestep_of(sigmas, root**KARRAS_RHO) for root in roots)


def _timestep_of(sigmas: list[float], sigma: float) -> float:
    """The real timestep at which ln(sigma), interpolated linearly, has this value (`NoiseSchedule.level`)."""
    lower = max(sum(s <= sigma for s in sigmas) - 1, 0)
    lower = min(lower, len(sigmas) - 2)
    low, high = math.log(sigmas[lower]), math.log(sigmas[lower + 1])
    return lower + min(max((math.log(sigma) - low) / (high - low), 0.0), 1.0)
