"""Classifier-free guidance as a wrapper around a denoiser."""

from __future__ import annotations

import torch
from torch import Tensor

from trainer.diffusion.denoiser import Denoiser
from trainer.diffusion.parameterization import Prediction
from trainer.diffusion.processes import Process


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
