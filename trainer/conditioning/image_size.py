"""Original size, crop corner and target size as Fourier features (SDXL, section 2.2)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from trainer.conditioning.base import Condition, Conditioning, Source, TrainedPart, replace_dropped, upload
from trainer.config.models import FirstStageConfig, ImageSizeConfig

NUMBERS = 6
"""Original height and width, crop top and left, target height and width: SDXL's order."""


class ImageSize(Condition):
    """Six numbers in the vector condition. Null form: zeros."""

    def __init__(self, config: ImageSizeConfig, first_stage: FirstStageConfig, index: int) -> None:
        self.trained = FourierFeatures(config.width)
        self.drop_probability = config.drop_probability
        self.guided = config.drop_probability > 0
        self.vector_dim = NUMBERS * config.width

    def prepare(self, source: Source) -> dict[str, Tensor]:
        """Field size: [B, 6], any number type, in pixels. The loader always makes it; see `uncropped`."""
        return {"numbers": source.require("size").float()}


class FourierFeatures(TrainedPart):
    """Cosines, then sines, at geometric frequencies from 1 to 1e-4, number by number."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def forward(self, inputs: dict[str, Tensor], drop: Tensor) -> Conditioning:
        """See TrainedPart."""
        numbers = inputs["numbers"].float()  # [B, 6]; pixel counts are not exact in bf16
        half = self.width // 2
        steps = torch.arange(half, dtype=torch.float32, device=numbers.device)
        angles = numbers.unsqueeze(2) * torch.exp(-math.log(10_000.0) * steps / half)  # [B, 6, half]
        features = torch.cat([angles.cos(), angles.sin()], dim=2).flatten(1)  # [B, 6 * width]
        return Conditioning(vector=replace_dropped(features, 0.0, drop))


def uncropped(batch: int, height: int, width: int, device: torch.device | str = "cpu") -> Tensor:
    """The field size [batch, 6] of pictures that were neither resized nor cropped, for sampling."""
    numbers = upload([height, width, 0, 0, height, width], torch.device(device), torch.float32)
    return numbers.expand(batch, NUMBERS)
