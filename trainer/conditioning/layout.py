"""Bounding boxes with labels as tokens of a jointly trained transformer (LDM section 4.3.1)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from trainer.conditioning.base import Condition, Conditioning, LabelCheck, Source, TrainedPart
from trainer.conditioning.transformer import TokenTransformer, token_embedding
from trainer.config.models import FirstStageConfig, LayoutConfig

EMPTY = -1
"""Label of a row that holds no box."""


class Layout(Condition):
    """Each box is three tokens: label, top-left corner, bottom-right corner. Null form: no box at all."""

    def __init__(self, config: LayoutConfig, first_stage: FirstStageConfig, index: int) -> None:
        self.max_boxes = config.max_boxes
        self.check = LabelCheck("layout", "conditioning.layout.num_labels", config.num_labels)
        self.trained = LayoutEncoder(config)
        self.drop_probability = config.drop_probability
        self.context_dim = config.width

    def prepare(self, source: Source) -> dict[str, Tensor]:
        """Field layout: float [B, N, 5], rows (label, x0, y0, x1, y1), corners in [0, 1], label -1: empty.

        More than max_boxes rows are cut (the loader lists large boxes first), fewer are filled up.
        """
        boxes = source.require("layout").float()[:, : self.max_boxes]
        self.check(boxes[..., 0], none=EMPTY)
        return {"boxes": F.pad(boxes, (0, 0, 0, self.max_boxes - boxes.shape[1]), value=float(EMPTY))}


class LayoutEncoder(TrainedPart):
    """Boxes [B, N, 5] -> context [B, 3 N, D]."""

    def __init__(self, config: LayoutConfig) -> None:
        super().__init__()
        self.num_labels = config.num_labels
        self.grid = config.grid
        # One more entry each stands for "no box".
        self.labels = token_embedding(config.num_labels + 1, config.width)
        self.corners = token_embedding(config.grid**2 + 1, config.width)
        self.transformer = TokenTransformer(
            3 * config.max_boxes, config.width, config.layers, config.heads, config.head_dim, config.dropout
        )

    def forward(self, inputs: dict[str, Tensor], drop: Tensor) -> Conditioning:
        """See TrainedPart."""
        labels, corners = self.tokens(inputs["boxes"], drop)
        embedded = torch.cat([self.labels(labels).unsqueeze(2), self.corners(corners)], dim=2)  # [B, N, 3, D]
        return Conditioning(context=self.transformer(embedded.flatten(1, 2)))

    def tokens(self, boxes: Tensor, drop: Tensor) -> tuple[Tensor, Tensor]:
        """Label ids [B, N] and corner ids [B, N, 2] (row * grid + column of the nearest grid point)."""
        labels = boxes[..., 0].round().to(torch.int64)
        points = (boxes[..., 1:].clamp(0, 1) * (self.grid - 1)).round().to(torch.int64)  # [B, N, 4]
        columns, rows = points[..., 0::2], points[..., 1::2]
        absent = (labels < 0) | (labels >= self.num_labels) | drop.unsqueeze(1)
        corners = (rows * self.grid + columns).masked_fill(absent.unsqueeze(2), self.grid**2)
        return labels.masked_fill(absent, self.num_labels), corners
