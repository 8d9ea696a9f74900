"""The samplers by name, and one call from noise to latents."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from trainer.config.training import SamplerName
from trainer.diffusion.denoiser import Callback, Denoiser, NoiseSource, Step, evaluate, ignore, no_noise
from trainer.diffusion.editing import image_to_image_start
from trainer.diffusion.levels import NoiseLevels, Spacing, make_levels
from trainer.diffusion.multistep import sample_dpmpp_2m, sample_dpmpp_sde, sample_plms, sample_unipc
from trainer.diffusion.samplers import (
    sample_ddim,
    sample_ddpm,
    sample_euler,
    sample_euler_ancestral,
    sample_heun,
)


@dataclass(frozen=True)
class Sampler:
    """A sampler's steps with what they need bound: called alike, whatever that is."""

    steps: Callable[..., Iterator[Step]]
    """(look, x, levels, and the arguments named in `needs`)."""
    needs: tuple[Literal["noise", "eta"], ...] = ()
    """Arguments beyond the first three."""
    divides_by_alpha: bool = True
    """Zero terminal SNR is replaced by a very small one for it (`NoiseLevels.finite`)."""
    starts_straight: bool = False
    """Of a straight path it takes the pure noise at the start as it is."""

    def __call__(
        self,
        denoiser: Denoiser,
        x: Tensor,
        levels: NoiseLevels,
        *,
        noise: NoiseSource = no_noise,
        eta: float = 0.0,
        callback: Callback = ignore,
    ) -> Tensor:
        """From x [B, C, H, W] at level 0, of variance about 1, to x at the last level, usually clean."""
        if self.divides_by_alpha and not (levels.straight and self.starts_straight):
            levels = levels.finite()
        given = {"noise": noise, "eta": eta}
        steps = self.steps(
            partial(evaluate, denoiser, levels), x, levels, **{name: given[name] for name in self.needs}
        )
        for index, step in enumerate(steps):
            x, x0 = step
            callback(index, len(levels), x0)
        return x


SAMPLERS: dict[SamplerName, Sampler] = {
    "ddpm": Sampler(sample_ddpm, needs=("noise",), divides_by_alpha=False),
    "ddim": Sampler(sample_ddim, needs=("noise", "eta"), divides_by_alpha=False),
    "plms": Sampler(sample_plms),
    "euler": Sampler(sample_euler, starts_straight=True),
    "euler_ancestral": Sampler(sample_euler_ancestral, needs=("noise",)),
    "heun": Sampler(sample_heun, starts_straight=True),
    "dpmpp_2m": Sampler(sample_dpmpp_2m, starts_straight=True),
    "dpmpp_sde": Sampler(sample_dpmpp_sde, needs=("noise",), starts_straight=True),
    "unipc": Sampler(sample_unipc, starts_straight=True),
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
    latents: Tensor | None = None,
    strength: float = 1.0,
) -> Tensor:
    """Latents [B, C, H, W] from standard normal `start_noise` of that shape (any height and width).

    With `latents`, image-to-image: they are noised with `start_noise` and the last `strength` share of the
    steps is run. `noise` is needed by ddpm, euler_ancestral, dpmpp_sde and ddim with eta > 0.
    """
    if name not in SAMPLERS:
        raise ValueError(f"unknown sampler {name!r}; choose one of {', '.join(SAMPLERS)}")
    levels = make_levels(denoiser.schedule, num_steps, spacing)
    x = start_noise
    if latents is not None:
        x, levels = image_to_image_start(latents, start_noise, levels, strength)
    return SAMPLERS[name](denoiser, x, levels, noise=noise, eta=eta)
