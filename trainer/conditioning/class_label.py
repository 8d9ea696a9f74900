"""A class index as one context token (LDM) or as a label that the UNet embeds (ADM, x4 upscaler)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from trainer.conditioning.base import Condition, Conditioning, LabelCheck, Source, TrainedPart
from trainer.config.models import ClassLabelConfig, FirstStageConfig


class ClassLabel(Condition):
    """The null form is one more class, index num_classes."""

    def __init__(self, config: ClassLabelConfig, first_stage: FirstStageConfig, index: int) -> None:
        self.null_class = config.num_classes
        self.check = LabelCheck("class_label", "conditioning.class_label.num_classes", config.num_classes)
        self.drop_probability = config.drop_probability
        if config.inject == "context":
            self.trained: TrainedPart = ClassToken(config.num_classes, config.width)
            self.context_dim = config.width
        else:
            self.trained = ClassIndex(config.num_classes)
            self.num_classes = config.num_classes + 1

    def prepare(self, source: Source) -> dict[str, Tensor]:
        """Field class_label: integer [B] or [B, 1]; -1 is the null class."""
        labels = source.require("class_label").reshape(len(source)).to(torch.int64)
        self.check(labels, none=-1)
        unknown = (labels < 0) | (labels >= self.null_class)
        return {"label": labels.masked_fill(unknown, self.null_class)}


class ClassToken(TrainedPart):
    """One learned token per class."""

    def __init__(self, num_classes: int, width: int) -> None:
        super().__init__()
        self.null_class = num_classes
        self.embedding = nn.Embedding(num_classes + 1, width)

    def forward(self, inputs: dict[str, Tensor], drop: Tensor) -> Conditioning:
        """See TrainedPart."""
        labels = inputs["label"].masked_fill(drop, self.null_class)
        return Conditioning(context=self.embedding(labels).unsqueeze(1))  # [B, 1, D]


class ClassIndex(TrainedPart):
    """The index itself; the UNet owns the embedding."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.null_class = num_classes

    def forward(self, inputs: dict[str, Tensor], drop: Tensor) -> Conditioning:
        """See TrainedPart."""
        return Conditioning(class_labels=inputs["label"].masked_fill(drop, self.null_class))
