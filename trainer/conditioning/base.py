"""What the UNet is told, and what one condition must provide."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Protocol

import torch
from torch import Tensor, nn

from trainer.config.run import ConfigError


@dataclass(frozen=True)
class Conditioning:
    """All that the UNet sees of the conditions. B is the batch, the same in every field."""

    context: Tensor | None = None
    """[B, L, D]: tokens for cross-attention."""
    vector: Tensor | None = None
    """[B, V]: added to the timestep embedding."""
    concat: Tensor | None = None
    """[B, C, h, w]: extra channels beside the noisy latents."""
    class_labels: Tensor | None = None
    """int64 [B]: index into the UNet's own class embedding."""

    def to(self, dtype: torch.dtype) -> Conditioning:
        """The same with floating-point fields in `dtype`."""
        return Conditioning(
            context=None if self.context is None else self.context.to(dtype),
            vector=None if self.vector is None else self.vector.to(dtype),
            concat=None if self.concat is None else self.concat.to(dtype),
            class_labels=self.class_labels,
        )

    def cat(self, other: Conditioning) -> Conditioning:
        """This batch followed by another one of the same kind: both branches of guidance in one call."""
        return Conditioning(
            context=_cat(self.context, other.context),
            vector=_cat(self.vector, other.vector),
            concat=_cat(self.concat, other.concat),
            class_labels=_cat(self.class_labels, other.class_labels),
        )


class LatentEncoder(Protocol):
    """The part of a first stage that conditions need."""

    def latents(self, pixels: Tensor, noise: Tensor | None) -> Tensor:
        """Pixels [B, 3, H, W] in [-1, 1] -> scaled latents [B, z, h, w]; noise None: the mode."""
        ...


@dataclass(frozen=True)
class Source:
    """What conditions are made from: one micro-batch in training, or the user's wishes in sampling."""

    captions: Sequence[str]
    """B captions."""
    ordinals: Tensor
    """int64 [B]: every random draw about a sample is keyed by it. Its device is the device of all results."""
    seed: int
    """Seed of the run."""
    conditions: dict[str, Tensor] = field(default_factory=dict)
    """Task fields by name, first axis B (docs/conditioning.md)."""
    pixels: Tensor | None = None
    """[B, 3, H, W] in [-1, 1]; None when sampling from prompts alone."""
    first_stage: LatentEncoder | None = None
    """Frozen first stage, for conditions that live in latent space."""
    text_chunks: int = 1
    """Parts of a caption that a frozen text tower reads one after the other; training reads one."""

    @property
    def device(self) -> torch.device:
        """Where the results must be."""
        return self.ordinals.device

    def __len__(self) -> int:
        return len(self.ordinals)

    def __post_init__(self) -> None:
        assert len(self.captions) == len(self.ordinals), (len(self.captions), len(self.ordinals))

    def require(self, name: str) -> Tensor:
        """A task field on the right device.

        Raises:
            ConfigError: the samples do not carry it.
        """
        if name not in self.conditions:
            raise ConfigError(
                f"a condition of this model needs the field {name} of every sample and there are "
                f"{', '.join(sorted(self.conditions)) or 'none'}; it must be in the shards (training) or "
                "be given (sampling)."
            )
        return self.conditions[name].to(self.device, non_blocking=True)

    def require_pixels(self, name: str) -> Tensor:
        """The pictures.

        Raises:
            ConfigError: there are none, so the condition `name` cannot be derived from them.
        """
        if self.pixels is None:
            raise ConfigError(
                f"the condition {name} is derived from pictures and there are none here; give the "
                f"condition {name} itself, or pictures, to sample with it."
            )
        return self.pixels


class TrainedPart(nn.Module, ABC):
    """Turns prepared inputs into a contribution. Has parameters only where a condition is learned."""

    @abstractmethod
    def forward(self, inputs: dict[str, Tensor], drop: Tensor) -> Conditioning:
        """Inputs of `Condition.prepare` (first axis B) and bool `drop` [B] -> contribution.

        Rows where drop is True take the null form, whatever their inputs are.
        """


class Condition(ABC):
    """One condition: a frozen part that prepares inputs without gradient, and a part in the trained module.

    A new condition is one subclass in one file, an entry in CONDITIONERS, and a section of
    ConditioningConfig; tests/contracts/test_conditionings.py picks it up.
    """

    trained: TrainedPart
    """Lives in the engine's module together with the UNet."""
    frozen: nn.Module | None = None
    """Weights that are never trained and never stored in checkpoints."""
    drop_probability: float = 0.0
    """Probability of the null form in training."""
    guided: bool = True
    """Classifier-free guidance drops it in the unconditional branch. False for conditions whose null form
    was never trained, such as the picture to be upscaled or inpainted: both branches need them."""
    context_dim: int | None = None
    """Width of its context tokens, if it has some."""
    vector_dim: int = 0
    """Numbers that it adds to the vector."""
    concat_channels: int = 0
    """Channels that it adds to the concatenation."""
    num_classes: int | None = None
    """Number of class labels that the UNet embeds, null class included."""
    joins_width: ClassVar[bool] = False
    """Several of this kind are concatenated along the context width (SDXL's two towers)."""

    @abstractmethod
    def prepare(self, source: Source) -> dict[str, Tensor]:
        """Batch fields -> input tensors of the trained part, each with first axis B, on source.device."""

    def text_tokens(self, caption: str) -> tuple[int, int]:
        """Tokens of a caption, without start and end, and how many of them are read at a time."""
        return 0, 0

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> None:
        """Move the frozen weights."""
        if self.frozen is not None:
            self.frozen.to(device=device, dtype=dtype)


class LabelCheck:
    """Refuses labels that a model has no entry for, in the first batches.

    Looking at values makes the host wait for the device, so later batches are not looked at; there an
    unknown label counts as none.
    """

    def __init__(self, field_name: str, setting: str, num_labels: int, batches: int = 4) -> None:
        self.field_name = field_name
        self.setting = setting
        self.num_labels = num_labels
        self.batches_left = batches

    def __call__(self, labels: Tensor, none: int) -> None:
        """Labels of any shape; `none` is the value that stands for no label.

        Raises:
            ConfigError: a label is neither in 0 .. num_labels - 1 nor `none`.
        """
        if self.batches_left == 0:
            return
        self.batches_left -= 1
        unknown = labels[((labels < 0) | (labels >= self.num_labels)) & (labels != none)]
        if unknown.numel():
            raise ConfigError(
                f"the field {self.field_name} holds the label {unknown.flatten()[0].item():g} and "
                f"{self.setting}={self.num_labels} allows 0 to {self.num_labels - 1}; raise it, or renumber "
                "the labels from 0."
            )


def upload(numbers: Sequence[int | float], device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """Numbers of the host as a tensor on the device; launched like a kernel, nothing waits."""
    tensor = torch.tensor(numbers, dtype=dtype)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def replace_dropped(values: Tensor, null: Tensor | float, drop: Tensor) -> Tensor:
    """Values [B, ...] with the rows where `drop` [B] is True replaced by `null` (broadcast)."""
    mask = drop.view(-1, *(1 for _ in values.shape[1:]))
    if isinstance(null, Tensor):
        return torch.where(mask, null.to(values.dtype), values)
    return values.masked_fill(mask, null)


def freeze(module: nn.Module) -> nn.Module:
    """Evaluation mode, no gradients."""
    return module.eval().requires_grad_(False)


def _cat(first: Tensor | None, second: Tensor | None) -> Tensor | None:
    if first is None or second is None:
        assert first is second, "both batches must carry the same conditions"
        return None
    return torch.cat([first, second])
