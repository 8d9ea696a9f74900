"""The noise levels that a sampler visits: which timesteps, and alpha and sigma at each."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from trainer.diffusion.schedule import NoiseSchedule

Spacing = Literal["leading", "trailing", "karras"]
Final = Literal["clean", "first"]

KARRAS_RHO = 7.0
MIN_ALPHA = 2.0**-12
"""Stands for the alpha = 0 of zero terminal SNR in samplers that divide by it (sigma / alpha = 4096)."""
FEW_LEADING = 10
"""With fewer steps "leading" would leave out more than a tenth of the schedule."""


@dataclass(frozen=True)
class NoiseLevels:
    """n timesteps at which the denoiser is evaluated, and the n + 1 levels that they lie between."""

    timesteps: tuple[float, ...]
    """n timesteps, falling; whole numbers except with Karras spacing."""
    alphas: tuple[float, ...]
    """n + 1: signal at each timestep, then at the end."""
    sigmas: tuple[float, ...]
    """n + 1: noise at each timestep, then at the end."""

    def __len__(self) -> int:
        return len(self.timesteps)

    def ratio(self, index: int) -> float:
        """sigma / alpha."""
        return self.sigmas[index] / self.alphas[index]

    def log_snr(self, index: int) -> float:
        """lambda = ln(alpha / sigma) (half the log SNR), infinite at a clean end."""
        if self.sigmas[index] == 0.0:
            return math.inf
        return math.log(self.alphas[index]) - math.log(self.sigmas[index])

    def tail(self, start: int) -> NoiseLevels:
        """The levels from step `start` on."""
        return NoiseLevels(self.timesteps[start:], self.alphas[start:], self.sigmas[start:])

    def finite(self) -> NoiseLevels:
        """The same levels with a small alpha in the place of 0, which only the first can have.

        Small ones that are not 0, as the cosine schedule has them, stay: raised to one value they would
        coincide, and samplers divide by the distance of neighbours too.
        """
        if self.alphas[0] > 0.0:
            return self
        alpha = min(MIN_ALPHA, self.alphas[1] / 2)  # neighbours of a long schedule may lie below MIN_ALPHA
        return NoiseLevels(
            self.timesteps, (alpha, *self.alphas[1:]), (math.sqrt(1.0 - alpha * alpha), *self.sigmas[1:])
        )


def make_levels(
    schedule: NoiseSchedule, num_steps: int, spacing: Spacing = "leading", final: Final = "clean"
) -> NoiseLevels:
    """`num_steps` levels of a schedule of T timesteps, then the end.

    leading: multiples of T / n, rounded down, plus 1 (the SD convention): from T - T / n + 1 to 1. Fewer than
    ten steps would start where much of the picture should already be visible, so they are trailing.
    trailing: T - 1 first, then down in steps of T / n (Lin et al. 2023, table 2).
    karras: from the largest to the smallest sigma / alpha, evenly in its 7th root (Karras et al. 2022,
    equation 5); timesteps are then real numbers.
    The end is clean (alpha 1, sigma 0), or the schedule's first level ("first": CompVis' samplers and
    diffusers' set_alpha_to_one=False leave that much noise in).
    """
    schedule = schedule.to("cpu")  # levels are read one by one: no synchronisation per read
    total = len(schedule)
    if not 1 <= num_steps <= total:
        raise ValueError(f"the number of sampler steps must lie between 1 and {total}, not {num_steps}")
    if spacing == "karras":
        timesteps = _karras_timesteps(schedule, num_steps)
    elif spacing == "trailing" or num_steps < min(FEW_LEADING, total):
        timesteps = tuple(float(round(total - i * total / num_steps) - 1) for i in range(num_steps))
    else:
        offset = 0 if num_steps == total else 1
        timesteps = tuple(float(i * total // num_steps + offset) for i in reversed(range(num_steps)))
    levels = [schedule.level(timestep) for timestep in timesteps]
    levels.append((1.0, 0.0) if final == "clean" else schedule.level(0.0))
    return NoiseLevels(timesteps, tuple(a for a, _ in levels), tuple(s for _, s in levels))


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
