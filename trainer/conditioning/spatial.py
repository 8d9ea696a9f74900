"""Image-like conditions at latent resolution: semantic map (LDM section 4.3.2) and depth (SD2)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.conditioning.base import (
    Condition,
    Conditioning,
    LabelCheck,
    Source,
    TrainedPart,
    replace_dropped,
)
from trainer.config.models import DepthConfig, FirstStageConfig, SemanticMapConfig
from trainer.config.run import ConfigError

UNLABELLED = 255
"""Label of pixels that belong to nothing."""


class ConcatPart(TrainedPart):
    """Passes "concat" [B, C, h, w] on, zeros where dropped; nothing to train."""

    def forward(self, inputs: dict[str, Tensor], drop: Tensor) -> Conditioning:
        """See TrainedPart."""
        return Conditioning(concat=replace_dropped(inputs["concat"], 0.0, drop))


class SemanticMap(Condition):
    """A label map, reduced to few learned channels. Null form: zeros, the same as unlabelled everywhere."""

    def __init__(self, config: SemanticMapConfig, first_stage: FirstStageConfig, index: int) -> None:
        self.check = LabelCheck("semantic_map", "conditioning.semantic_map.num_labels", config.num_labels)
        self.trained = LabelReduction(config.num_labels, config.channels, first_stage.downsampling)
        self.drop_probability = config.drop_probability
        self.guided = config.drop_probability > 0
        self.concat_channels = config.channels

    def prepare(self, source: Source) -> dict[str, Tensor]:
        """Field semantic_map: integer [B, H, W] or [B, 1, H, W] at pixel resolution, 255 unlabelled."""
        labels = source.require("semantic_map")
        self.check(labels, none=UNLABELLED)
        return {"labels": labels.squeeze(1) if labels.ndim == 4 else labels}


class LabelReduction(TrainedPart):
    """One-hot, learned 1x1 reduction, area average to latent resolution.

    A 1x1 convolution of a one-hot map is a table look-up, and it commutes with averaging, so the map of
    num_labels channels is never built. The table starts with unit variance, as latents have.
    """

    def __init__(self, num_labels: int, channels: int, factor: int) -> None:
        super().__init__()
        self.factor = factor
        self.reduction = nn.Embedding(num_labels, channels)

    def forward(self, inputs: dict[str, Tensor], drop: Tensor) -> Conditioning:
        """See TrainedPart."""
        labels = inputs["labels"].to(torch.int64)
        known = (labels >= 0) & (labels < self.reduction.num_embeddings)
        known &= ~drop.view(-1, 1, 1)
        reduced = self.reduction(labels.masked_fill(~known, 0)) * known.unsqueeze(3)  # [B, H, W, C]
        return Conditioning(concat=F.avg_pool2d(reduced.permute(0, 3, 1, 2), self.factor))


class Depth(Condition):
    """Depth-like channels, scaled to [-1, 1] image by image. Null form: zeros."""

    def __init__(self, config: DepthConfig, first_stage: FirstStageConfig, index: int) -> None:
        self.factor = first_stage.downsampling
        self.channels = config.channels
        self.trained = ConcatPart()
        self.drop_probability = config.drop_probability
        self.guided = config.drop_probability > 0
        self.concat_channels = config.channels

    def prepare(self, source: Source) -> dict[str, Tensor]:
        """Field depth: [B, C, H, W], or [B, H, W] for one channel, any number type and any range."""
        depth = source.require("depth").float()
        depth = depth.unsqueeze(1) if depth.ndim == 3 else depth
        if depth.shape[1] != self.channels:
            raise ConfigError(
                f"the field depth has {depth.shape[1]} channels and conditioning.depth.channels is "
                f"{self.channels}; make them equal."
            )
        size = (depth.shape[2] // self.factor, depth.shape[3] // self.factor)
        depth = F.interpolate(depth, size=size, mode="bicubic", align_corners=False)
        low = depth.amin(dim=(1, 2, 3), keepdim=True)
        span = depth.amax(dim=(1, 2, 3), keepdim=True) - low
        # A flat map has no range to stretch: it becomes 0 everywhere, the middle of the scale.
        scaled = torch.where(span > 0, 2.0 * (depth - low) / span.clamp(min=1e-12) - 1.0, 0.0)
        return {"concat": scaled}
