"""What a feature network is: what it sees of a picture, what it gives, its name, and the hash of its weights.

A network works in two halves. `prepare` runs in the thread that decoded the picture and does what Pillow
does; calling the network does the rest on its device, for one block of pictures at a time.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from trainer.weights import bits_of

Resizing = Literal["torch-fidelity", "clean-fid", "pytorch-fid"]
Fit = Literal["crop", "squash"]
CLIPPED = "clipped"
"""Tells statistics by clean-fid's resizing from earlier ones of ours, which held what bicubic overshoots."""


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
