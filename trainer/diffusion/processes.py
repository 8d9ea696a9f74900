"""Forward processes in continuous time: the straight path of rectified flow, and EDM's; which one a run has.

A process says what latents become at the timestep that the network is told: x = alpha x0 + sigma eps. The
discrete one (`schedule.NoiseSchedule`) reads alpha and sigma in a table, these two compute them, so their
timesteps are real numbers. Nothing else of training or sampling knows which one it has:

    drawn       `objective.draw_timesteps`: one uniform number per sample through the quantiles of a density
    noised      `Process.coefficients`
    predicted   `parameterization`
    weighted    `objective.loss_weights`
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import ClassVar, Protocol, Self

import torch
from torch import Tensor

from trainer.config.training import DiffusionConfig, Spacing
from trainer.diffusion.schedule import KARRAS_RHO, make_schedule


class Process(Protocol):
    """x = alpha x0 + sigma eps, with alpha and sigma by timestep."""

    @property
    def lowest(self) -> float:
        """The timestep with the least noise."""
        ...

    @property
    def preserves_variance(self) -> bool:
        """Whether alpha^2 + sigma^2 = 1, exactly."""
        ...

    @property
    def straight(self) -> bool:
        """Whether alpha + sigma = 1, so that x moves on a line where eps - x0 is constant."""
        ...

    @property
    def sigma_data(self) -> float:
        """Deviation of x0 that the edm prediction is preconditioned for; 1 where nothing is."""
        ...

    def __len__(self) -> int:
        """The most steps that a sampler may make."""
        ...

    def to(self, device: torch.device | str) -> Self:
        """The same with what it holds on `device`."""
        ...

    def coefficients(self, timesteps: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """(alpha, sigma) at `timesteps` [B], each [B, 1, ...] in the dtype of `like` [B, ...]."""
        ...

    def level(self, timestep: float) -> tuple[float, float]:
        """(alpha, sigma) at one timestep."""
        ...

    def visited(self, num_steps: int, spacing: Spacing) -> tuple[float, ...]:
        """The timesteps at which a sampler of `num_steps` steps, 1 .. len(self), looks; falling."""
        ...


@dataclass(frozen=True)
class StraightPath:
    """Rectified flow: x = (1 - t) x0 + t eps for t in (0, 1].

    (Liu et al. 2022; Esser et al. 2024, equation 13.) The timestep is T t, as in SD3 and diffusers.
    """

    num_timesteps: int
    shift: float

    # As a `Process`:
    preserves_variance: ClassVar[bool] = False
    straight: ClassVar[bool] = True
    sigma_data: ClassVar[float] = 1.0

    @property
    def lowest(self) -> float:
        """T times the shifted 1 / T, the last of T equal steps."""
        return self.num_timesteps * shifted(1.0 / self.num_timesteps, self.shift)

    def __len__(self) -> int:
        return self.num_timesteps

    def to(self, device: torch.device | str) -> StraightPath:
        """Itself: there are no tables."""
        return self

    def coefficients(self, timesteps: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """See `Process`; computed in float64."""
        t = _for_broadcast(timesteps.to(torch.float64) / self.num_timesteps, like)
        return (1.0 - t).to(like.dtype), t.to(like.dtype)

    def level(self, timestep: float) -> tuple[float, float]:
        """See `Process`."""
        t = timestep / self.num_timesteps
        return 1.0 - t, t

    def visited(self, num_steps: int, spacing: Spacing) -> tuple[float, ...]:
        """Timesteps of a sampler, falling, from pure noise.

        leading: evenly from 1 to the lowest level, then shifted, as diffusers' flow scheduler does by itself.
        trailing: 1, 1 - 1 / n, ... 1 / n, then shifted, as Flux does. karras: evenly in the 7th root of t
        between the ends of leading (that scheduler's `use_karras_sigmas`).
        """
        ends = 1.0, self.lowest / self.num_timesteps
        match spacing:
            case "leading":
                times = [shifted(t, self.shift) for t in _evenly(*ends, num_steps)]
            case "trailing":
                times = [shifted(1.0 - i / num_steps, self.shift) for i in range(num_steps)]
            case "karras":
                times = _karras(1.0, shifted(ends[1], self.shift), num_steps)
        return tuple(self.num_timesteps * t for t in times)


@dataclass(frozen=True)
class PreconditionedProcess:
    """EDM: x0 + sigma eps, seen by the network times c_in = 1 / sqrt(sigma^2 + sigma_data^2).

    (Karras et al. 2022, table 1 and equation 7.) The timestep is c_noise = ln(sigma) / 4.
    """

    sigma_data: float
    sigma_min: float
    sigma_max: float
    most_steps: int

    # As a `Process`:
    preserves_variance: ClassVar[bool] = False
    straight: ClassVar[bool] = False

    @property
    def lowest(self) -> float:
        """That of sigma_min."""
        return math.log(self.sigma_min) / 4.0

    def __len__(self) -> int:
        return self.most_steps

    def to(self, device: torch.device | str) -> PreconditionedProcess:
        """Itself: there are no tables."""
        return self

    def coefficients(self, timesteps: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """(c_in, sigma c_in), see `Process`; computed in float64."""
        sigma = _for_broadcast((4.0 * timesteps.to(torch.float64)).exp(), like)
        scale = (sigma.square() + self.sigma_data**2).rsqrt()
        return scale.to(like.dtype), (sigma * scale).to(like.dtype)

    def level(self, timestep: float) -> tuple[float, float]:
        """See `Process`."""
        sigma = math.exp(4.0 * timestep)
        scale = 1.0 / math.hypot(sigma, self.sigma_data)
        return scale, sigma * scale

    def visited(self, num_steps: int, spacing: Spacing) -> tuple[float, ...]:
        """Timesteps of a sampler, falling, from sigma_max.

        karras: to sigma_min, evenly in the 7th root (Karras et al. 2022, equation 5). leading: the same ends,
        evenly in ln(sigma). trailing: likewise in n steps of which the last does not reach sigma_min.
        """
        first, last = math.log(self.sigma_max), math.log(self.sigma_min)
        match spacing:
            case "karras":
                logs = [math.log(sigma) for sigma in _karras(self.sigma_max, self.sigma_min, num_steps)]
            case "leading":
                logs = _evenly(first, last, num_steps)
            case "trailing":
                logs = [first + i / num_steps * (last - first) for i in range(num_steps)]
        return tuple(value / 4.0 for value in logs)


def make_process(config: DiffusionConfig) -> Process:
    """The process of a configuration that passed `check_diffusion`; see `at_size` for pictures of a size."""
    match config.process:
        case "discrete":
            return make_schedule(config)
        case "flow":
            return StraightPath(config.num_timesteps, config.shift)
        case "edm":
            return PreconditionedProcess(
                config.sigma_data, config.sigma_min, config.sigma_max, config.num_timesteps
            )


def at_size(config: DiffusionConfig, height: int, width: int) -> DiffusionConfig:
    """The same for pictures of height x width pixels: with the shift that belongs to them.

    The same noise hides less of a larger picture, by sqrt(m / n) for m instead of n pixels (Esser et al.
    2024, equation 23): the shift is `shift` at shift_pixels squared, and grows with the root of the area.
    """
    if config.shift_pixels is None:
        return config
    shift = config.shift * math.sqrt(height * width) / config.shift_pixels
    return dataclasses.replace(config, shift=shift)


def shifted(t: float, shift: float) -> float:
    """a t / (1 + (a - 1) t): the time with a times the sigma / alpha (Esser et al. 2024, equation 23)."""
    return shift * t / (1.0 + (shift - 1.0) * t)


def _evenly(first: float, last: float, count: int) -> list[float]:
    """`count` numbers from first to last; the first alone."""
    return [first + i / max(count - 1, 1) * (last - first) for i in range(count)]


def _karras(first: float, last: float, count: int) -> list[float]:
    roots = _evenly(first ** (1.0 / KARRAS_RHO), last ** (1.0 / KARRAS_RHO), count)
    return [root**KARRAS_RHO for root in roots]


def _for_broadcast(values: Tensor, like: Tensor) -> Tensor:
    """[B] -> [B, 1, ...]."""
    return values.view(-1, *(1 for _ in like.shape[1:]))
