"""Feature networks: what each sees of a picture, what it gives, its name, and the hash of its weights.

A network works in two halves. `prepare` runs in the thread that decoded the picture and does what Pillow
does; calling the network does the rest on its device, for one block of pictures at a time.

    family      outputs                  for
    inception   pool, spatial, logits    FID, KID, MIND, precision, recall, density, coverage; sFID; IS
    clip        embedding, score         CMMD; CLIP score
    dinov2      pool                     FD-DINOv2, and what else Inception's pool is for
    random      pool, spatial, logits    tests and demos: figures that compare with nothing else
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, get_args

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from trainer.config.run import ConfigError
from trainer.weights import bits_of

Resizing = Literal["torch-fidelity", "clean-fid", "pytorch-fid"]
Fit = Literal["crop", "squash"]
FAMILIES = ("inception", "clip", "dinov2", "random")
RANDOM_EDGE = 64
CLIPPED = "clipped"
"""Tells statistics by clean-fid's resizing from earlier ones of ours, which held what bicubic overshoots."""
RANDOM_SEED = 0


class FeatureNetwork(Protocol):
    """Frozen, on its device."""

    name: str
    """Of architecture and weights, as results carry it."""
    digest: str
    """SHA-256 of the weights that see the pictures."""
    details: Mapping[str, str]
    """What else results should carry."""
    sees: str
    """How pictures are brought to the size that the network sees: figures of another way do not compare."""
    widths: Mapping[str, int]
    """Outputs and their dimensions."""

    def prepare(self, picture: NDArray[np.uint8]) -> NDArray[Any]:
        """What is done to one picture, [h, w, 3], on the CPU."""

    def __call__(self, prepared: Sequence[NDArray[Any]], captions: Sequence[str]) -> dict[str, Tensor]:
        """Outputs [B, D] in float32; `score` has no row for a picture without a caption."""


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
        from trainer.evaluation.clip_features import ClipFeatures

        return ClipFeatures(options.clip_model, options.clip_weights, device, text=options.clip_text)
    if family == "dinov2":
        from trainer.evaluation.dinov2 import DINOv2

        return DINOv2(options.dinov2_model, options.dinov2_weights, device)
    return RandomFeatures(device)


def weights_digest(*modules: nn.Module) -> str:
    """SHA-256 over names and values of all tensors."""
    found = hashlib.sha256()
    for module in modules:
        for name, tensor in sorted(module.state_dict().items()):
            found.update(name.encode())
            found.update(bits_of(tensor))
    return found.hexdigest()


def to_size(picture: NDArray[np.uint8], edge: int, fit: Fit) -> NDArray[np.uint8]:
    """[edge, edge, 3]: Pillow's antialiased bicubic, rounded to 8 bits as a stored picture would be.

    crop: the shorter side becomes `edge`, and the middle is kept; squash: both sides do, whatever the aspect.
    """
    height, width = picture.shape[:2]
    if (height, width) == (edge, edge):
        return picture
    image = Image.fromarray(picture)
    if fit == "squash":
        return np.asarray(image.resize((edge, edge), Image.Resampling.BICUBIC))
    short = min(height, width)
    size = (max(edge, width * edge // short), max(edge, height * edge // short))
    if size != image.size:
        image = image.resize(size, Image.Resampling.BICUBIC)
    left, top = round((size[0] - edge) / 2), round((size[1] - edge) / 2)
    return np.asarray(image.crop((left, top, left + edge, top + edge)))


def to_size_unrounded(picture: NDArray[np.uint8], edge: int) -> NDArray[np.float32]:
    """[3, edge, edge] in 0 .. 255: clean-fid's resizing (Parmar et al. 2022), bit for bit that of 0.1.35.

    Each channel by itself as floating-point numbers, antialiased bicubic, clipped where that overshoots, and
    not rounded.
    """
    channels = [Image.fromarray(picture[:, :, i].astype(np.float32)) for i in range(3)]
    resized = [np.asarray(c.resize((edge, edge), Image.Resampling.BICUBIC), np.float32) for c in channels]
    return np.stack(resized).clip(0, 255)


def channels_first(picture: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """[h, w, 3] -> [3, h, w]."""
    return np.ascontiguousarray(picture.transpose(2, 0, 1))


def resized_on_device(
    prepared: Sequence[NDArray[Any]], device: torch.device, resize: Callable[[Tensor], Tensor]
) -> Tensor:
    """[B, 3, h, w]: pictures of one size together, others one by one. `resize` takes [b, 3, h, w] float32."""
    if len({picture.shape for picture in prepared}) == 1:
        return resize(torch.from_numpy(np.stack(prepared)).to(device).float())
    return torch.cat([resize(torch.from_numpy(picture)[None].to(device).float()) for picture in prepared])


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
