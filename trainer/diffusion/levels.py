"""The noise levels that a sampler visits: which timesteps, and alpha and sigma at each."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Literal

from trainer.config.training import Spacing as Spacing
from trainer.diffusion.processes import Process

Final = Literal["clean", "first"]

MIN_ALPHA = 2.0**-12
"""Stands for the alpha = 0 of zero terminal SNR in samplers that divide by it (sigma / alpha = 4096)."""


@dataclass(frozen=True)
class NoiseLevels:
    """n timesteps at which the denoiser is evaluated, and the n + 1 levels that they lie between.

    Whatever the process, alpha^2 + sigma^2 = 1 here: every process turns into every other one by a change of
    scale (Karras et al. 2022, section 2), so samplers know one, and `denoiser.evaluate` the network's.
    """

    timesteps: tuple[float, ...]
    """n timesteps, falling; of the discrete process whole numbers except with Karras spacing."""
    alphas: tuple[float, ...]
    """n + 1: signal at each timestep, then at the end."""
    sigmas: tuple[float, ...]
    """n + 1: noise at each timestep, then at the end."""
    scales: tuple[float, ...] = ()
    """n + 1: x as the network is trained on, divided by x here; empty: 1."""
    straight: bool = False
    """Whether the ODE is that of the straight path, so that one-step solvers go along it."""

    def __len__(self) -> int:
        return len(self.timesteps)

    def ratio(self, index: int) -> float:
        """sigma / alpha."""
        return self.sigmas[index] / self.alphas[index]

    def log_snr(self, index: int) -> float:
        """lambda = ln(alpha / sigma) (half the log SNR), infinite at a clean end, -infinite at pure noise."""
        if self.sigmas[index] == 0.0:
            return math.inf
        if self.alphas[index] == 0.0:
            return -math.inf
        return math.log(self.alphas[index]) - math.log(self.sigmas[index])

    def line(self, index: int) -> tuple[float, float]:
        """(c, r): along r the ODE of y = x / c is dy / dr = eps (or eps - x0, where it is straight).

        (alpha, sigma / alpha), as in Karras et al. 2022, equation 4; on the straight path (alpha + sigma,
        sigma / (alpha + sigma)), where y is its own x and r its time.
        """
        alpha, sigma = self.alphas[index], self.sigmas[index]
        return (alpha + sigma, sigma / (alpha + sigma)) if self.straight else (alpha, sigma / alpha)

    def tail(self, start: int) -> NoiseLevels:
        """The levels from step `start` on."""
        return dataclasses.replace(
            self,
            timesteps=self.timesteps[start:],
            alphas=self.alphas[start:],
            sigmas=self.sigmas[start:],
            scales=self.scales[start:],
        )

    def finite(self) -> NoiseLevels:
        """The same levels with a small alpha in the place of 0, which only the first can have.

        Small ones that are not 0, as the cosine schedule has them, stay: raised to one value they would
        coincide, and samplers divide by the distance of neighbours too.
        """
        if self.alphas[0] > 0.0:
            return self
        alpha = min(MIN_ALPHA, self.alphas[1] / 2)  # neighbours of a long schedule may lie below MIN_ALPHA
        sigma = math.sqrt(1.0 - alpha * alpha)
        return dataclasses.replace(self, alphas=(alpha, *self.alphas[1:]), sigmas=(sigma, *self.sigmas[1:]))


def make_levels(
    process: Process, num_steps: int, spacing: Spacing = "leading", final: Final = "clean"
) -> NoiseLevels:
    """`num_steps` levels of a process, as its `visited` spaces them, then the end.

    The end is clean (alpha 1, sigma 0), or the lowest level ("first": CompVis' samplers and diffusers'
    set_alpha_to_one=False leave that much noise in).
    """
    process = process.to("cpu")  # levels are read one by one: no synchronisation per read
    total = len(process)
    if not 1 <= num_steps <= total:
        raise ValueError(f"the number of sampler steps must lie between 1 and {total}, not {num_steps}")
    timesteps = process.visited(num_steps, spacing)
    levels = [process.level(timestep) for timestep in timesteps]
    levels.append((1.0, 0.0) if final == "clean" else process.level(process.lowest))
    scales: tuple[float, ...] = ()
    if not process.preserves_variance:
        scales = tuple(math.hypot(alpha, sigma) for alpha, sigma in levels)
        levels = [(a / scale, s / scale) for (a, s), scale in zip(levels, scales, strict=True)]
    return NoiseLevels(
        timesteps, tuple(a for a, _ in levels), tuple(s for _, s in levels), scales, process.straight
    )
