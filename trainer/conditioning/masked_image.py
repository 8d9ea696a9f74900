"""Inpainting: a mask and the encoded masked picture as extra channels (LDM section 4.5, SD2 inpainting)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from trainer.conditioning.base import Condition, Source
from trainer.conditioning.masks import random_masks
from trainer.conditioning.spatial import ConcatPart
from trainer.config.models import FirstStageConfig, MaskedImageConfig
from trainer.config.run import ConfigError


class MaskedImage(Condition):
    """Channels: the mask (1 = hidden), then the latents of the picture with hidden pixels grey.

    In the form of LDM's published model the mask is -1 or 1 and hidden pixels are black. Null form: zeros.
    """

    def __init__(self, config: MaskedImageConfig, first_stage: FirstStageConfig, index: int) -> None:
        self.config = config
        self.trained = ConcatPart()
        self.drop_probability = config.drop_probability
        self.guided = config.drop_probability > 0
        self.concat_channels = config.mask_channels + first_stage.channels

    def prepare(self, source: Source) -> dict[str, Tensor]:
        """Pixels, and the field mask: [B, H, W] or [B, 1, H, W], not zero = hidden; absent: drawn."""
        pixels = source.require_pixels("masked_image")
        assert source.first_stage is not None, "masked_image needs the first stage"
        mask = self._mask(source, pixels)
        ldm = self.config.form == "ldm"
        visible = pixels * (1 - mask) - (mask if ldm else 0)
        # The mode, not a sample: a condition should not carry noise that the first stage adds.
        latents = source.first_stage.latents(visible, None)
        small = F.interpolate(mask, size=latents.shape[2:], mode="nearest")
        small = small * 2 - 1 if ldm else small
        small = small.expand(-1, self.config.mask_channels, -1, -1)
        return {"concat": torch.cat([small, latents.float()], dim=1)}

    def _mask(self, source: Source, pixels: Tensor) -> Tensor:
        """float32 [B, 1, H, W], exactly 0 or 1."""
        height, width = pixels.shape[2:]
        if "mask" not in source.conditions:
            return random_masks(
                height,
                width,
                full_probability=self.config.full_mask_probability,
                seed=source.seed,
                ordinals=source.ordinals,
            )
        mask = source.require("mask")
        mask = mask.unsqueeze(1) if mask.ndim == 3 else mask
        if tuple(mask.shape) != (len(source), 1, height, width):
            raise ConfigError(
                f"the field mask has shape {tuple(mask.shape)} and the pictures are {height} x {width}; give "
                f"one mask of that size per picture."
            )
        return (mask >= 0.5).float() if mask.is_floating_point() else (mask != 0).float()
