"""The feature networks, by family, with the weights that were asked for.

What a command calls `--features`:

    family      outputs                  for
    inception   pool, spatial, logits    FID, KID, MIND, precision, recall, density, coverage; sFID; IS
    clip        embedding, score         CMMD; CLIP score
    dinov2      pool                     FD-DINOv2, and what else Inception's pool is for
    random      pool, spatial, logits    tests and demos: figures that compare with nothing else
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from trainer.config.run import ConfigError
from trainer.evaluation.features import CLIPPED, FeatureNetwork, Resizing, to_size_unrounded, weights_digest

FAMILIES = ("inception", "clip", "dinov2", "random")
RANDOM_EDGE = 64
RANDOM_SEED = 0


def identities(networks: Mapping[str, FeatureNetwork]) -> dict[str, list[str]]:
    """Of each family the network's name, its weights' SHA-256, and what it sees; as JSON gives it."""
    return {family: [each.name, each.digest, each.sees] for family, each in networks.items()}


@dataclass(frozen=True)
class FeatureOptions:
    """Which networks, with which weights."""

    families: tuple[str, ...] = ("inception",)
    resizing: Resizing = "torch-fidelity"
    """How pictures become 299 x 299 for Inception."""
    inception_weights: str | None = None
    """File or URL; unset: torch-fidelity's own file where torch.hub keeps it."""
    clip_model: str = "ViT-L-14-336"
    clip_weights: str = "openai"
    """A tag of open_clip, a file or a URL."""
    clip_text: bool = True
    """Whether the text tower is there, too: only scores need it."""
    dinov2_model: str = "vit_large_patch14_dinov2"
    dinov2_weights: str | None = None


def build_networks(options: FeatureOptions, device: torch.device) -> dict[str, FeatureNetwork]:
    """The networks by family.

    Raises:
        ConfigError: an unknown family, or weights that are not at hand: says which file to bring, and where.
    """
    unknown = [name for name in options.families if name not in FAMILIES]
    if unknown or not options.families:
        raise ConfigError(f"there are no features {', '.join(unknown)}; choose from {', '.join(FAMILIES)}.")
    assert options.resizing in get_args(Resizing)
    return {family: _build(family, options, device) for family in options.families}


def _build(family: str, options: FeatureOptions, device: torch.device) -> FeatureNetwork:
    # Each imports libraries that take seconds and that only those who ask for it need.
    if family == "inception":
        from trainer.evaluation.inception import Inception

        return Inception(options.inception_weights, options.resizing, device)
    if family == "clip":
        from trainer.evaluation.vision_transformers import ClipFeatures

        return ClipFeatures(options.clip_model, options.clip_weights, device, text=options.clip_text)
    if family == "dinov2":
        from trainer.evaluation.vision_transformers import DINOv2

        return DINOv2(options.dinov2_model, options.dinov2_weights, device)
    return RandomFeatures(device)


class RandomFeatures:
    """A small convolutional network with seeded random weights: no file, no meaning beyond itself."""

    def __init__(self, device: torch.device) -> None:
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            torch.manual_seed(RANDOM_SEED)
            self._body = nn.ModuleList(
                nn.Conv2d(i, o, 3, stride=2, padding=1) for i, o in ((3, 32), (32, 64), (64, 64))
            )
            self._head = nn.Linear(64, 10)
            for layer in self._body:
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")  # type: ignore[arg-type]
        self.name = f"random-64 (3 random convolutions, seed {RANDOM_SEED}; comparable with nothing else)"
        self.digest = weights_digest(self._body, self._head)
        self.details: Mapping[str, str] = {}
        self.sees = f"clean-fid at {RANDOM_EDGE}, {CLIPPED}"
        self.widths: Mapping[str, int] = {"pool": 64, "spatial": 128, "logits": 10}
        self._device = device
        for module in (self._body, self._head):
            module.to(device).requires_grad_(False)

    def prepare(self, picture: NDArray[np.uint8]) -> NDArray[np.float32]:
        """See FeatureNetwork."""
        return to_size_unrounded(picture, RANDOM_EDGE)

    def __call__(self, prepared: Sequence[NDArray[Any]], captions: Sequence[str]) -> dict[str, Tensor]:
        """See FeatureNetwork."""
        x = torch.from_numpy(np.stack(prepared)).to(self._device) / 127.5 - 1
        for layer in self._body:
            x = F.relu(layer(x))
        pool = x.mean(dim=(2, 3))
        return {"pool": pool, "spatial": x[:, :2].flatten(1), "logits": self._head(pool) * 8}
