"""The samplers by name, and one call from noise to latents."""

from __future__ import annotations

import torch
from torch import Tensor

from trainer.config.training import SamplerName
from trainer.diffusion.denoiser import Callback, Denoiser, NoiseSource, Sampler, ignore, no_noise
from trainer.diffusion.editing import image_to_image_start
from trainer.diffusion.levels import Final, Spacing, make_levels
from trainer.diffusion.multistep import sample_dpmpp_2m, sample_dpmpp_sde, sample_plms, sample_unipc
from trainer.diffusion.samplers import (
    sample_ddim,
    sample_ddpm,
    sample_euler,
    sample_euler_ancestral,
    sample_heun,
)

SAMPLERS: dict[SamplerName, Sampler] = {
    "ddpm": sample_ddpm,
    "ddim": sample_ddim,
    "plms": sample_plms,
    "euler": sample_euler,
    "euler_ancestral": sample_euler_ancestral,
    "heun": sample_heun,
    "dpmpp_2m": sample_dpmpp_2m,
    "dpmpp_sde": sample_dpmpp_sde,
    "unipc": sample_unipc,
}


@torch.no_grad()
def sample(
    name: SamplerName,
    denoiser: Denoiser,
    start_noise: Tensor,
    *,
    num_steps: int,
    spacing: Spacing = "leading",
    eta: float = 0.0,
    noise: NoiseSource = no_noise,
    callback: Callback = ignore,
    latents: Tensor | None = None,
    strength: float = 1.0,
    final: Final = "clean",
) -> Tensor:
    """Latents [B, C, H, W] from standard normal `start_noise` of that shape (any height and width).

    With `latents`, image-to-image: they are noised with `start_noise` and the last `strength` share of the
    steps is run. `noise` is needed by ddpm, euler_ancestral, dpmpp_sde and ddim with eta > 0.
    """
    if name not in SAMPLERS:
        raise ValueError(f"unknown sampler {name!r}; choose one of {', '.join(SAMPLERS)}")
    levels = make_levels(denoiser.schedule, num_steps, spacing, final)
    x = start_noise
    if latents is not None:
        x, levels = image_to_image_start(latents, start_noise, levels, strength)
    return SAMPLERS[name](denoiser, x, levels, noise=noise, eta=eta, callback=callback)
