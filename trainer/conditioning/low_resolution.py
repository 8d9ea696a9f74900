"""The low-resolution picture as extra channels: super-resolution (LDM section 4.4, SD x4 upscaler)."""

from __future__ import annotations

import torch
from torch import Tensor

from trainer.conditioning.base import Condition, Conditioning, Source, TrainedPart, replace_dropped
from trainer.conditioning.degradation import shrink_bicubic, shrink_degraded
from trainer.config.models import FirstStageConfig, LowResolutionConfig
from trainer.config.run import ConfigError
from trainer.pixels import to_unit_range
from trainer.rng import Purpose, normal, randint

SAMPLING_NOISE_LEVEL = 20
"""Noise level of a given picture when nobody names one: enough to hide its compression."""


class LowResolution(Condition):
    """3 channels at latent resolution; with noise augmentation also the noise level as class label.

    Null form: zeros in place of the picture. The noise level stays, since it describes the input.
    """

    def __init__(self, config: LowResolutionConfig, first_stage: FirstStageConfig, index: int) -> None:
        if not 0 <= config.max_noise_level <= config.noise_num_timesteps:
            raise ConfigError(
                f"conditioning.low_resolution.max_noise_level={config.max_noise_level} must lie in 0 .. "
                f"noise_num_timesteps={config.noise_num_timesteps}."
            )
        self.config = config
        self.noise_purpose = Purpose.CONDITION + index
        self.trained = NoisedPicture()
        self.drop_probability = config.drop_probability
        self.guided = config.drop_probability > 0
        self.concat_channels = 3
        self.signal = noise_level_alphas_cumprod(config)
        if config.max_noise_level:
            self.num_classes = config.noise_num_timesteps

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> None:
        """Move the noise-level schedule, which stays float32."""
        self.signal = self.signal.to(device)

    def prepare(self, source: Source) -> dict[str, Tensor]:
        """Field low_resolution: [B, 3, h, w], uint8 or float in [-1, 1]; absent: made from the pixels.

        Field noise_level: integer [B]; absent: random for a picture made here, otherwise 20.
        """
        given = "low_resolution" in source.conditions
        picture = _unit_range(source.require("low_resolution")) if given else self._shrink(source)
        if not self.config.max_noise_level:
            return {"picture": picture}
        level = self._noise_level(source, given)
        signal = self.signal.to(source.device)[level].view(-1, 1, 1, 1)
        noise = normal(source.seed, source.ordinals, Purpose.LOW_RESOLUTION_NOISE, tuple(picture.shape[1:]))
        return {"picture": signal.sqrt() * picture + (1 - signal).sqrt() * noise, "level": level}

    def _shrink(self, source: Source) -> Tensor:
        pixels = source.require_pixels("low_resolution").float()
        if self.config.degradation == "bicubic":
            return shrink_bicubic(pixels, self.config.factor)
        return shrink_degraded(
            pixels,
            self.config.factor,
            seed=source.seed,
            ordinals=source.ordinals,
            noise_purpose=self.noise_purpose,
        )

    def _noise_level(self, source: Source, given: bool) -> Tensor:
        highest = self.config.max_noise_level
        if "noise_level" in source.conditions:
            return source.require("noise_level").to(torch.int64).reshape(len(source)).clamp(0, highest - 1)
        if given:
            return torch.full((len(source),), min(SAMPLING_NOISE_LEVEL, highest - 1), device=source.device)
        return randint(source.seed, source.ordinals, Purpose.LOW_RESOLUTION_LEVEL, highest)


class NoisedPicture(TrainedPart):
    """Picture and noise level as they are; nothing to train."""

    def forward(self, inputs: dict[str, Tensor], drop: Tensor) -> Conditioning:
        """See TrainedPart."""
        picture = replace_dropped(inputs["picture"], 0.0, drop)
        return Conditioning(concat=picture, class_labels=inputs.get("level"))


def noise_level_alphas_cumprod(config: LowResolutionConfig) -> Tensor:
    """Signal power by noise level, float32 [noise_num_timesteps]; linear in sqrt(beta), as the upscaler's."""
    start, end = config.noise_beta_start**0.5, config.noise_beta_end**0.5
    # On the CPU whatever the default device is: the same numbers everywhere.
    betas = torch.linspace(start, end, config.noise_num_timesteps, dtype=torch.float64, device="cpu") ** 2
    return torch.cumprod(1 - betas, dim=0).float()


def _unit_range(picture: Tensor) -> Tensor:
    return to_unit_range(picture) if picture.dtype == torch.uint8 else picture.float()
