"""Power-function averaging profiles: the mathematics of EDM2 (Karras et al. 2024), section 3."""

from __future__ import annotations

import math


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
