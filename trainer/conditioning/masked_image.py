"""Inpainting: a mask and the encoded masked picture as extra channels (LDM section 4.5, SD2 inpainting).

A mask that nobody gives is drawn: brush strokes and boxes in the manner of LaMa (Suvorov et al. 2021).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from trainer.conditioning.base import Condition, Source
from trainer.conditioning.spatial import ConcatPart
from trainer.config.models import FirstStageConfig, MaskedImageConfig
from trainer.config.run import ConfigError
from trainer.rng import Purpose, uniform

MAX_STROKES = 5
VERTICES = 5
"""Straight pieces of one stroke."""
STROKE_WIDTH = (0.04, 0.20)
STROKE_LENGTH = (0.05, 0.40)
"""Of one straight piece. All sizes are shares of the shorter edge of the picture."""
STROKE_TURN = (0.0, 4.0)
"""Direction of a straight piece in radians; every other one is mirrored, so a stroke zigzags."""
MAX_BOXES = 4
BOX_EDGE = (0.10, 0.60)
PER_STROKE = 4 + 2 * VERTICES
PER_BOX = 4
DRAWS = 4 + MAX_STROKES * PER_STROKE + MAX_BOXES * PER_BOX


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


def random_masks(height: int, width: int, *, full_probability: float, seed: int, ordinals: Tensor) -> Tensor:
    """float32 [B, 1, height, width]: 1 where the picture is hidden. A function of (seed, ordinal).

    With full_probability all is hidden; otherwise strokes, boxes, or both, each a third of the time.
    """
    draws = uniform(seed, ordinals, Purpose.MASK, (DRAWS,))
    choice, strokes, boxes = draws.split([4, MAX_STROKES * PER_STROKE, MAX_BOXES * PER_BOX], dim=1)
    y = torch.arange(height, dtype=torch.float32, device=draws.device).view(1, -1, 1) + 0.5
    x = torch.arange(width, dtype=torch.float32, device=draws.device).view(1, 1, -1) + 0.5
    kind, full = choice[:, 0], choice[:, 1]
    stroke_count = _count(choice[:, 2], MAX_STROKES) * (kind < 2 / 3)
    box_count = _count(choice[:, 3], MAX_BOXES) * (kind >= 1 / 3)
    hidden = (full < full_probability).view(-1, 1, 1).expand(-1, height, width).clone()  # bool [B, H, W]
    for i, stroke in enumerate(strokes.unflatten(1, (MAX_STROKES, PER_STROKE)).unbind(1)):
        hidden |= _stroke(stroke, y, x, height, width) & (i < stroke_count).view(-1, 1, 1)
    for i, box in enumerate(boxes.unflatten(1, (MAX_BOXES, PER_BOX)).unbind(1)):
        hidden |= _box(box, y, x, height, width) & (i < box_count).view(-1, 1, 1)
    return hidden.float().unsqueeze(1)


def _stroke(draws: Tensor, y: Tensor, x: Tensor, height: int, width: int) -> Tensor:
    """Pixels within half a brush width of a polyline: bool [B, H, W]. Draws [B, PER_STROKE]."""
    edge = min(height, width)
    column, row = draws[:, 0] * width, draws[:, 1] * height
    radius = _between(draws[:, 2], *STROKE_WIDTH) * edge / 2
    mirrored = draws[:, 3] < 0.5
    inside = torch.zeros(1, dtype=torch.bool, device=draws.device)
    for i in range(VERTICES):
        angle = _between(draws[:, 4 + 2 * i], *STROKE_TURN)
        angle = torch.where(mirrored ^ (i % 2 == 1), 2 * math.pi - angle, angle)
        length = _between(draws[:, 5 + 2 * i], *STROKE_LENGTH) * edge
        # The end is kept inside the picture, or strokes would wander off and hide nothing.
        next_column = (column + length * angle.cos()).clamp(0, width)
        next_row = (row + length * angle.sin()).clamp(0, height)
        distance = _squared_distance(y, x, row, column, next_row, next_column)
        inside = inside | (distance <= radius.view(-1, 1, 1) ** 2)
        column, row = next_column, next_row
    return inside


def _squared_distance(
    y: Tensor, x: Tensor, row: Tensor, column: Tensor, end_row: Tensor, end_column: Tensor
) -> Tensor:
    """From each pixel centre to a straight piece per sample, [B, H, W]."""
    row, column, end_row, end_column = (v.view(-1, 1, 1) for v in (row, column, end_row, end_column))
    down, right = end_row - row, end_column - column
    along = ((y - row) * down + (x - column) * right) / (down**2 + right**2).clamp(min=1e-6)
    along = along.clamp(0, 1)
    return (y - row - along * down) ** 2 + (x - column - along * right) ** 2


def _box(draws: Tensor, y: Tensor, x: Tensor, height: int, width: int) -> Tensor:
    """Pixels of an axis-parallel box inside the picture: bool [B, H, W]. Draws [B, PER_BOX]."""
    edge = min(height, width)
    box_height = _between(draws[:, 0], *BOX_EDGE) * edge
    box_width = _between(draws[:, 1], *BOX_EDGE) * edge
    top = (draws[:, 2] * (height - box_height)).view(-1, 1, 1)
    left = (draws[:, 3] * (width - box_width)).view(-1, 1, 1)
    below = (y >= top) & (y < top + box_height.view(-1, 1, 1))
    return below & (x >= left) & (x < left + box_width.view(-1, 1, 1))


def _count(draw: Tensor, most: int) -> Tensor:
    """1 .. most."""
    return 1 + (draw * most).floor()


def _between(draw: Tensor, low: float, high: float) -> Tensor:
    return low + (high - low) * draw
