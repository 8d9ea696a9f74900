"""What samplers see of a network: a denoiser, and classifier-free guidance, itself a denoiser around one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from trainer.diffusion.levels import NoiseLevels
from trainer.diffusion.parameterization import Prediction, to_eps, to_x0
from trainer.diffusion.processes import Process


class Denoiser(Protocol):
    """A trained network together with its conditioning: (x [B, C, H, W], timesteps [B]) -> prediction."""

    @property
    def schedule(self) -> Process:
        """The forward process that it was trained on."""
        ...

    @property
    def prediction(self) -> Prediction:
        """What it predicts."""
        ...

    def __call__(self, x: Tensor, timesteps: Tensor) -> Tensor:
        """Prediction [B, C, H, W] at x = alpha x0 + sigma eps.

        Timesteps are int64, or float32 with Karras spacing and in continuous time.
        """
        ...


NoiseSource = Callable[[int], Tensor]
"""Step index -> standard normal noise of the shape of x; counter-based, so pictures ignore their batch."""

Callback = Callable[[int, int, Tensor], None]
"""(step index, number of steps, current estimate of x0), after each step."""


Look = Callable[[Tensor, int], tuple[Tensor, Tensor]]
"""(x at level i, i) -> the (x0, eps) that the denoiser sees in it: `evaluate` of one denoiser and levels."""

Step = tuple[Tensor, Tensor]
"""(x at the next level, estimate of x0 made on the way)."""


def no_noise(index: int) -> Tensor:
    """Noise source of deterministic samplers."""
    raise ValueError(f"this sampler is stochastic: pass a noise source (asked for at step {index})")


def ignore(index: int, num_steps: int, x0: Tensor) -> None:
    """Callback that does nothing."""


def evaluate(denoiser: Denoiser, levels: NoiseLevels, x: Tensor, index: int) -> tuple[Tensor, Tensor]:
    """(x0, eps) that the denoiser sees in x at level `index`."""
    timestep = levels.timesteps[index]
    alpha, sigma = levels.alphas[index], levels.sigmas[index]
    if levels.scales:  # the network's own scale is another than the samplers'
        scale = levels.scales[index]
        x, alpha, sigma = scale * x, scale * alpha, scale * sigma
    if timestep.is_integer() and not levels.scales:
        timesteps = torch.full((len(x),), int(timestep), dtype=torch.int64, device=x.device)
    else:
        timesteps = torch.full((len(x),), timestep, dtype=torch.float32, device=x.device)
    output = denoiser(x, timesteps).to(x.dtype)
    given = denoiser.prediction, output, x, alpha, sigma, denoiser.schedule.sigma_data
    return to_x0(*given), to_eps(*given)


class ClassifierFreeGuidance:
    """uncond + scale (cond - uncond) (Ho and Salimans 2022), itself a denoiser of batch B.

    `both` is a denoiser of batch 2 B whose conditioning is the B conditions followed by their null forms,
    so that one pass gives both. Scale 1 is the conditional prediction. `rescale` in [0, 1] pulls the
    deviation of the result back to that of the conditional prediction (Lin et al. 2023, section 3.4).
    """

    def __init__(self, both: Denoiser, scale: float, rescale: float = 0.0) -> None:
        self._both = both
        self._scale = scale
        self._rescale = rescale

    @property
    def schedule(self) -> Process:
        """The forward process of the wrapped denoiser."""
        return self._both.schedule

    @property
    def prediction(self) -> Prediction:
        """What the wrapped denoiser predicts; guidance is linear, so all forms are equivalent."""
        return self._both.prediction

    def __call__(self, x: Tensor, timesteps: Tensor) -> Tensor:
        """Guided prediction [B, C, H, W]."""
        output = self._both(torch.cat([x, x]), torch.cat([timesteps, timesteps]))
        conditional, unconditional = output.chunk(2)
        return guide(conditional, unconditional, self._scale, self._rescale)


def guide(conditional: Tensor, unconditional: Tensor, scale: float, rescale: float = 0.0) -> Tensor:
    """The guided prediction from its two parts, [B, C, H, W]; exactly `conditional` at scale 1, rescale 0."""
    guided = conditional + (scale - 1.0) * (conditional - unconditional)
    if rescale == 0.0:
        return guided
    dims = tuple(range(1, guided.ndim))
    factor = conditional.std(dim=dims, keepdim=True) / guided.std(dim=dims, keepdim=True)
    return guided * (rescale * factor + (1.0 - rescale))
