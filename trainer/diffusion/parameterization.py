"""The three things a UNet may predict, eps, x0 and v, and how each turns into the others."""

from __future__ import annotations

from typing import Literal, TypeVar

from torch import Tensor

Prediction = Literal["eps", "v", "x0"]

Coefficient = TypeVar("Coefficient", Tensor, float)
"""alpha and sigma: [B, 1, 1, 1] in training, one number in a sampler."""


def prediction_target(
    prediction: Prediction, latents: Tensor, noise: Tensor, alpha: Coefficient, sigma: Coefficient
) -> Tensor:
    """What the UNet should output; v = alpha eps - sigma x0 (Salimans and Ho 2022, appendix D)."""
    match prediction:
        case "eps":
            return noise
        case "x0":
            return latents
        case "v":
            return alpha * noise - sigma * latents


def to_x0(
    prediction: Prediction, output: Tensor, x: Tensor, alpha: Coefficient, sigma: Coefficient
) -> Tensor:
    """The clean latents that an output at x = alpha x0 + sigma eps stands for (eps needs alpha > 0)."""
    match prediction:
        case "eps":
            return (x - sigma * output) / alpha
        case "x0":
            return output
        case "v":
            return alpha * x - sigma * output


def to_eps(
    prediction: Prediction, output: Tensor, x: Tensor, alpha: Coefficient, sigma: Coefficient
) -> Tensor:
    """The noise that an output at x = alpha x0 + sigma eps stands for (x0 needs sigma > 0)."""
    match prediction:
        case "eps":
            return output
        case "x0":
            return (x - alpha * output) / sigma
        case "v":
            return alpha * output + sigma * x


def from_x0(prediction: Prediction, x0: Tensor, x: Tensor, alpha: Coefficient, sigma: Coefficient) -> Tensor:
    """The output that stands for clean latents `x0` at x (eps and v need sigma > 0)."""
    match prediction:
        case "eps":
            return (x - alpha * x0) / sigma
        case "x0":
            return x0
        case "v":
            return (alpha * x - x0) / sigma
