"""Averages of the weights, kept in fp32 beside the fragments of master weights that a rank owns.

Power-function averages that a run stored give one of any other width afterwards (`fit`).
"""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trainer.config.training import EMAConfig
from trainer.distributed.engine import Engine, Fragment

DECAY_PROFILE = "decay"
"""The profile with a constant decay, which is sampled and exported by default."""


def profile_names(config: EMAConfig) -> list[str]:
    """Names of the averages that a run keeps, `decay` first."""
    return ([DECAY_PROFILE] if config.decay > 0 else []) + [power_profile(std) for std in config.power_stds]


def power_profile(std: float) -> str:
    """Name of the power-function profile of this relative width: 0.05 -> "power_0.05"."""
    return f"power_{std:g}"


class EMA:
    """Several averages at once of the weights behind `fragments`.

    Each rank averages what it owns, so that N ranks share the memory and the work. `decay` has a
    constant decay with warm-up; each of `power_stds` adds a power-function profile (Karras et al.
    2024, "Analyzing and Improving the Training Dynamics of Diffusion Models", section 3.1).
    """

    def __init__(self, config: EMAConfig, fragments: Sequence[Fragment]) -> None:
        self.fragments = fragments
        self._config = config
        self._masters = [fragment.master for fragment in fragments]
        self._exponents = {power_profile(std): exponent_from_std(std) for std in config.power_stds}
        self._averages = {
            name: [master.clone() for master in self._masters] for name in profile_names(config)
        }
        self._swapped: str | None = None

    @property
    def profiles(self) -> tuple[str, ...]:
        """Names of the averages, `decay` first."""
        return tuple(self._averages)

    def values(self, profile: str) -> list[Tensor]:
        """fp32 averages [n] of one profile, in the order of `fragments`; views, not copies."""
        assert self._swapped is None, "the averages are swapped in"
        return self._averages[profile]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Average in the weights of optimizer step `step` (1 is the first)."""
        assert self._swapped is None, "the averages are swapped in"
        for name, average in self._averages.items():
            if average:
                torch._foreach_lerp_(average, self._masters, 1.0 - self.decay(name, step))

    def decay(self, profile: str, step: int) -> float:
        """Weight that the old average keeps at optimizer step `step` (1 is the first)."""
        if profile != DECAY_PROFILE:
            return power_decay(step, self._exponents[profile])
        if self._config.warmup:
            return min(self._config.decay, (1 + step) / (10 + step))
        return self._config.decay

    @contextmanager
    def swapped(self, engine: Engine, profile: str) -> Generator[None]:
        """Inside, the engine computes with the averages. Collective.

        Averages and master weights change places, one fragment at a time: nothing is copied whole,
        and afterwards the weights are what they were, bit for bit.
        """
        assert engine.fragments() is self.fragments, "another engine's averages"
        assert self._swapped is None, "the averages are swapped in already"
        self._swap(profile)
        self._swapped = profile
        try:
            engine.refresh()
            yield
        finally:
            self._swap(profile)
            self._swapped = None
            engine.refresh()

    @torch.no_grad()
    def _swap(self, profile: str) -> None:
        for master, average in zip(self._masters, self._averages[profile], strict=True):
            held = master.clone()
            master.copy_(average)
            average.copy_(held)


def exponent_from_std(std: float) -> float:
    """gamma of the profile whose response has the relative width `std`.

    The response at the end of training to the weights at relative time t is proportional to
    t^gamma; its standard deviation is sqrt((gamma + 1) / ((gamma + 2)^2 (gamma + 3))).

    Raises:
        ValueError: no profile has this width.
    """
    if not 0 < std < 0.2886:  # gamma = 0, a plain mean, has 1 / sqrt(12) = 0.2887
        raise ValueError(f"a relative width of {std} is not between 0 and 0.2886.")
    low, high = 0.0, 1e8
    while high - low > 1e-12 * max(1.0, high):
        middle = (low + high) / 2
        if std_from_exponent(middle) > std:
            low = middle
        else:
            high = middle
        if middle in (low, high) and math.nextafter(low, high) >= high:
            break
    return (low + high) / 2


def std_from_exponent(gamma: float) -> float:
    """Relative width of the profile t^gamma; the inverse of `exponent_from_std`."""
    return math.sqrt((gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3)))


def power_decay(step: int, gamma: float) -> float:
    """Weight of the old average at update `step` (1 is the first): (1 - 1/step)^(gamma + 1).

    The first update forgets the initial weights (section 3.1).
    """
    return (1.0 - 1.0 / step) ** (gamma + 1.0)


@dataclass(frozen=True)
class Profile:
    """Weights t^gamma over (0, step], normalised: a power-function average as of `step`."""

    gamma: float
    step: int


def fit(stored: Sequence[Profile], wanted: Profile) -> tuple[NDArray[np.float64], float]:
    """Coefficients of the stored profiles, which add up to 1, and the relative error of the fit.

    Karras et al. 2024, section 3.2 and algorithm 3: the wanted profile is fitted, in the least squares
    sense, by a linear combination of the stored ones; the same combination of the stored averages is then the
    average that would have been kept.
    """
    gram = np.array([[inner_product(a, b) for b in stored] for a in stored])
    target = np.array([inner_product(a, wanted) for a in stored])
    # Minimise |sum of x_i p_i - p|^2 with sum of x_i = 1, so that weights that do not change stay.
    size = len(stored)
    scale = 1.0 / np.sqrt(np.diag(gram))
    system = np.zeros((size + 1, size + 1))
    system[:size, :size] = gram * np.outer(scale, scale)
    system[:size, size] = system[size, :size] = scale
    right = np.append(target * scale, 1.0)
    coefficients = np.linalg.lstsq(system, right, rcond=1e-13)[0][:size] * scale
    squared = inner_product(wanted, wanted) + coefficients @ gram @ coefficients - 2 * coefficients @ target
    error = float(np.sqrt(max(0.0, squared) / inner_product(wanted, wanted)))
    return coefficients, error


def inner_product(a: Profile, b: Profile) -> float:
    """Integral of the product of two normalised profiles over their common time."""
    shorter = min(a.step, b.step)
    # In logarithms: the powers overflow for narrow profiles and long runs.
    exponent = a.gamma * np.log(shorter / a.step) + b.gamma * np.log(shorter / b.step)
    factor = (a.gamma + 1) * (b.gamma + 1) / (a.gamma + b.gamma + 1)
    return float(factor * np.exp(exponent) * shorter / (a.step * b.step))
