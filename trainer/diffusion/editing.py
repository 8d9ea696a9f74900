"""Sampling from an existing picture: image-to-image starts, and inpainting by replacement."""

from __future__ import annotations

import torch
from torch import Tensor

from trainer.diffusion.denoiser import Denoiser
from trainer.diffusion.levels import NoiseLevels
from trainer.diffusion.parameterization import Prediction, from_x0
from trainer.diffusion.processes import Process


def image_to_image_start(
    latents: Tensor, noise: Tensor, levels: NoiseLevels, strength: float
) -> tuple[Tensor, NoiseLevels]:
    """Noised `latents` and the levels still to visit: the last `strength` share of the steps, at least one.

    (SDEdit, Meng et al. 2022.) Strength 1 visits every level, starting from almost pure noise.
    """
    if not 0.0 < strength <= 1.0:
        raise ValueError(f"strength={strength} must lie above 0 and at most at 1")
    start = len(levels) - max(1, int(len(levels) * strength))
    remaining = levels.tail(start)
    return remaining.alphas[0] * latents + remaining.sigmas[0] * noise, remaining


class ReplacementInpainting:
    """A denoiser that knows the latents outside a mask (Song et al. 2021, appendix I.2).

    Before each evaluation the known part of x is replaced by the known latents at that noise level, and the
    prediction there by the one that stands for them: any sampler then ends on exactly these latents
    outside the mask. For models trained without mask channels; one that has them needs none of this.
    """

    def __init__(self, denoiser: Denoiser, latents: Tensor, mask: Tensor, noise: Tensor) -> None:
        """`latents` and `noise` [B, C, H, W]; `mask` [B, 1, H, W], 1 where the picture is to be made."""
        self._denoiser = denoiser
        self._latents = latents
        self._unknown = mask.bool()
        self._noise = noise

    @property
    def schedule(self) -> Process:
        """The forward process of the wrapped denoiser."""
        return self._denoiser.schedule

    @property
    def prediction(self) -> Prediction:
        """What the wrapped denoiser predicts."""
        return self._denoiser.prediction

    def __call__(self, x: Tensor, timesteps: Tensor) -> Tensor:
        """Prediction [B, C, H, W]; all samples are at the same timestep, as in every sampler."""
        alpha, sigma = self.schedule.level(float(timesteps[0]))
        known = alpha * self._latents + sigma * self._noise
        output = self._denoiser(torch.where(self._unknown, x, known), timesteps)
        certain = from_x0(self.prediction, self._latents, x, alpha, sigma, self.schedule.sigma_data)
        return torch.where(self._unknown, output.to(x.dtype), certain)
