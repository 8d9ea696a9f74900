"""The conditions by name, and the conditioner made of those that a configuration contains."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from trainer.conditioning.base import Condition, Conditioning, LatentEncoder, Source
from trainer.conditioning.class_label import ClassLabel
from trainer.conditioning.image_size import ImageSize
from trainer.conditioning.low_resolution import LowResolution
from trainer.conditioning.masked_image import MaskedImage
from trainer.conditioning.spatial import Depth, SemanticMap
from trainer.conditioning.transformer import Layout, TextTransformer
from trainer.config.models import TOWERS, ConditioningConfig, FirstStageConfig, OpenCLIPConfig
from trainer.config.run import ConfigError
from trainer.rng import Purpose, uniform


def _openclip(config: OpenCLIPConfig, first_stage: FirstStageConfig, index: int) -> Condition:
    # open_clip takes four seconds to import, which every rank of a run without it would pay for.
    from trainer.conditioning.openclip import OpenCLIP

    return OpenCLIP(config, first_stage, index)


CONDITIONERS: dict[str, Callable[[Any, FirstStageConfig, int], Condition]] = {
    "openclip": _openclip,
    "openclip_second": _openclip,
    "text_transformer": TextTransformer,
    "class_label": ClassLabel,
    "layout": Layout,
    "semantic_map": SemanticMap,
    "low_resolution": LowResolution,
    "masked_image": MaskedImage,
    "depth": Depth,
    "image_size": ImageSize,
}
"""Section of ConditioningConfig -> what makes its condition from (section, first stage, index). The index is
the entry's position here and in ConditioningConfig: random draws and seeded weights are keyed by it."""
TEXT = ("openclip", "openclip_second", "text_transformer")
"""The conditions that read captions."""


def require_activations(config: ConditioningConfig) -> None:
    """Raise ConfigError where a tower would compute otherwise than its weights were trained (its activation).

    For runs that begin: what was trained so goes on, and is drawn from, as it is.
    """
    towers = {name: getattr(config, name) for name in TOWERS if getattr(config, name) is not None}
    if towers:
        from trainer.conditioning.open_clip_towers import require_activation

        for name, tower in towers.items():
            require_activation(name, tower)


class FrozenConditions:
    """The untrained half: frozen towers and the derivation of inputs. Not a module, so never registered."""

    def __init__(self, conditions: Mapping[str, Condition]) -> None:
        self._conditions = dict(conditions)

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> FrozenConditions:
        """Move the frozen weights, and set their floating-point type."""
        for condition in self._conditions.values():
            condition.to(device, dtype)
        return self

    def modules(self) -> dict[str, nn.Module]:
        """Frozen modules by condition."""
        return {name: c.frozen for name, c in self._conditions.items() if c.frozen is not None}

    @torch.no_grad()
    def prepare(
        self,
        captions: Sequence[str],
        conditions: dict[str, Tensor],
        pixels: Tensor | None,
        *,
        first_stage: LatentEncoder | None,
        seed: int,
        ordinals: Tensor,
        text_chunks: int = 1,
    ) -> dict[str, Tensor]:
        """Inputs of the trained half, named "<condition>.<input>", each with first axis B.

        Args:
            captions: B captions.
            conditions: task fields, first axis B.
            pixels: [B, 3, H, W] in [-1, 1]; None to sample from prompts or given conditions alone.
            first_stage: encodes what lives in latent space; None where no condition needs it.
            seed: seed of the run.
            ordinals: int64 [B]; results are on their device.
            text_chunks: parts of a caption that frozen towers read, each as long as they can.

        Raises:
            ConfigError: a condition misses its field or the pictures.
        """
        source = Source(captions, ordinals, seed, conditions, pixels, first_stage, text_chunks)
        return {
            f"{name}.{key}": value
            for name, condition in self._conditions.items()
            for key, value in condition.prepare(source).items()
        }


class TrainedConditions(nn.Module):
    """The half that lives in the engine's module: one part per condition, merged into one Conditioning."""

    def __init__(self, conditions: Mapping[str, Condition]) -> None:
        super().__init__()
        self.parts = nn.ModuleDict({name: c.trained for name, c in conditions.items()})
        self._joins_width = {name for name, c in conditions.items() if c.joins_width}

    def forward(self, inputs: dict[str, Tensor], drop: dict[str, Tensor]) -> Conditioning:
        """Inputs of FrozenConditions.prepare and bool [B] per condition -> what the UNet sees."""
        made: dict[str, Conditioning] = {}
        for name, part in self.parts.items():
            prefix = f"{name}."
            own = {k.removeprefix(prefix): v for k, v in inputs.items() if k.startswith(prefix)}
            made[name] = part(own, drop[name])
        contexts = [
            c.context for n, c in made.items() if n not in self._joins_width and c.context is not None
        ]
        towers = [c.context for n, c in made.items() if n in self._joins_width and c.context is not None]
        if towers:
            contexts.insert(0, torch.cat(towers, dim=2))  # [B, L, D1 + D2]
        labels = [c.class_labels for c in made.values() if c.class_labels is not None]
        return Conditioning(
            context=_join(contexts, dim=1),
            vector=_join([c.vector for c in made.values() if c.vector is not None], dim=1),
            concat=_join([c.concat for c in made.values() if c.concat is not None], dim=1),
            class_labels=labels[0] if labels else None,
        )


class Conditioner:
    """All conditions of one run: what to build the UNet with, and both halves of the computation."""

    def __init__(self, conditions: Mapping[str, Condition], *, drop_all_probability: float = 0.0) -> None:
        self.conditions = dict(conditions)
        self._drop_all_probability = drop_all_probability
        self.frozen = FrozenConditions(conditions)
        self.trained = TrainedConditions(conditions)
        self.context_dim = _context_dim(conditions)
        self.vector_dim = sum(c.vector_dim for c in conditions.values()) or None
        self.concat_channels = sum(c.concat_channels for c in conditions.values())
        self.num_classes = _num_classes(conditions)

    def drop_masks(self, seed: int, ordinals: Tensor) -> dict[str, Tensor]:
        """Which samples lose which condition in training: bool [B] each, a function of (seed, ordinal)."""
        masks = {
            name: uniform(seed, ordinals, Purpose.DROP + condition_index(name), ())
            < condition.drop_probability
            for name, condition in self.conditions.items()
        }
        if self._drop_all_probability:
            every = uniform(seed, ordinals, Purpose.DROP_ALL, ()) < self._drop_all_probability
            masks = {n: mask | every if self.conditions[n].guided else mask for n, mask in masks.items()}
        return masks

    def keep_masks(self, n: int, device: torch.device | str = "cpu") -> dict[str, Tensor]:
        """Everything kept: the conditional branch."""
        return {name: torch.zeros(n, dtype=torch.bool, device=device) for name in self.conditions}

    def null_masks(self, n: int, device: torch.device | str = "cpu") -> dict[str, Tensor]:
        """The unconditional branch of classifier-free guidance: every condition with a trained null form
        dropped (`Condition.guided`)."""
        return {
            name: torch.full((n,), condition.guided, device=device)
            for name, condition in self.conditions.items()
        }


def build_conditioner(config: ConditioningConfig, first_stage: FirstStageConfig) -> Conditioner:
    """The conditioner of the sections that are present; trained parts draw from torch's global generator.

    Raises:
        ConfigError: a section is impossible, or two sections cannot go together.
    """
    return Conditioner(
        {
            name: make(getattr(config, name), first_stage, condition_index(name))
            for name, make in CONDITIONERS.items()
            if getattr(config, name) is not None
        },
        drop_all_probability=config.drop_all_probability,
    )


def condition_index(name: str) -> int:
    """Position of a condition among all that exist; stable, since random draws depend on it."""
    return list(CONDITIONERS).index(name)


def _context_dim(conditions: Mapping[str, Condition]) -> int | None:
    joined = sum(c.context_dim or 0 for c in conditions.values() if c.joins_width)
    widths = {n: c.context_dim for n, c in conditions.items() if c.context_dim and not c.joins_width}
    if joined:
        widths["openclip"] = joined
    if len(set(widths.values())) > 1:
        listed = ", ".join(f"{name} {width}" for name, width in widths.items())
        raise ConfigError(
            f"conditions that share the cross-attention context need one width and have {listed}; set their "
            "width fields to the same number."
        )
    return next(iter(widths.values()), None)


def _num_classes(conditions: Mapping[str, Condition]) -> int | None:
    counts = {name: c.num_classes for name, c in conditions.items() if c.num_classes is not None}
    if len(counts) > 1:
        raise ConfigError(
            f"the UNet embeds one class label per sample and {' and '.join(counts)} each bring one; set "
            "class_label.inject=context."
        )
    return next(iter(counts.values()), None)


def _join(tensors: Sequence[Tensor | None], dim: int) -> Tensor | None:
    present = [tensor for tensor in tensors if tensor is not None]
    if len(present) < 2:
        return present[0] if present else None
    return torch.cat(present, dim=dim)
