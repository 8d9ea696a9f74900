"""What a UNet may predict, and how each turns into the others.

eps       the noise
x0        the clean latents
v         alpha eps - sigma x0, where alpha^2 + sigma^2 = 1 (Salimans and Ho 2022, appendix D)
velocity  eps - x0, the direction of the straight path (Liu et al. 2022, equation 1; our time runs to noise)
edm       F with D(x) = c_skip x + c_out F(c_in x), D the estimate of x0 (Karras et al. 2022, equation 7 and
          table 1); with x = c_in (x0 + s eps), alpha = c_in, sigma = c_in s and sigma_data = d that is
          F = sigma x0 / d - d alpha eps: -v of the latents x0 / d
"""

from __future__ import annotations

from typing import TypeVar

from torch import Tensor

from trainer.config.training import Prediction as Prediction

Coefficient = TypeVar("Coefficient", Tensor, float)
"""alpha and sigma: [B, 1, 1, 1] in training, one number in a sampler."""


def prediction_target(
    prediction: Prediction,
    latents: Tensor,
    noise: Tensor,
    alpha: Coefficient,
    sigma: Coefficient,
    sigma_data: float = 1.0,
) -> Tensor:
    """What the UNet should output for x0 = `latents` and eps = `noise`."""
    match prediction:
        case "eps":
            return noise
        case "x0":
            return latents
        case "v":
            return alpha * noise - sigma * latents
        case "velocity":
            return noise - latents
        case "edm":
            return sigma / sigma_data * latents - sigma_data * alpha * noise


def to_x0(
    prediction: Prediction,
    output: Tensor,
    x: Tensor,
    alpha: Coefficient,
    sigma: Coefficient,
    sigma_data: float = 1.0,
) -> Tensor:
    """The clean latents that an output at x = alpha x0 + sigma eps stands for (eps needs alpha > 0)."""
    match prediction:
        case "eps":
            return (x - sigma * output) / alpha
        case "x0":
            return output
        case "v":
            return alpha * x - sigma * output
        case "velocity":
            return (x - sigma * output) / (alpha + sigma)
        case "edm":
            return sigma_data * (sigma_data * alpha * x + sigma * output)


def to_eps(
    prediction: Prediction,
    output: Tensor,
    x: Tensor,
    alpha: Coefficient,
    sigma: Coefficient,
    sigma_data: float = 1.0,
) -> Tensor:
    """The noise that an output at x = alpha x0 + sigma eps stands for (x0 needs sigma > 0)."""
    match prediction:
        case "eps":
            return output
        case "x0":
            return (x - alpha * output) / sigma
        case "v":
            return alpha * output + sigma * x
        case "velocity":
            return (x + alpha * output) / (alpha + sigma)
        case "edm":
            return sigma * x - sigma_data * alpha * output


def from_x0(
    prediction: Prediction,
    x0: Tensor,
    x: Tensor,
    alpha: Coefficient,
    sigma: Coefficient,
    sigma_data: float = 1.0,
) -> Tensor:
    """The output that stands for clean latents `x0` at x (all but x0 need sigma > 0)."""
    match prediction:
        case "eps":
            return (x - alpha * x0) / sigma
        case "x0":
            return x0
        case "v":
            return (alpha * x - x0) / sigma
        case "velocity":
            return (x - (alpha + sigma) * x0) / sigma
        case "edm":
            return (x0 / sigma_data - sigma_data * alpha * x) / sigma
