"""Averages of the weights, kept in fp32 beside the fragments of master weights that a rank owns."""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from contextlib import contextmanager

import torch
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
