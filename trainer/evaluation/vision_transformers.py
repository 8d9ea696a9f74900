"""Features of vision transformers.

CLIP      embeddings of pictures and captions: CMMD (Jayasumana et al. 2024) and CLIP score
DINOv2    the class token, through timm, of which this is the only importer: FD-DINOv2 (Stein et al. 2023)
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from trainer.conditioning.tokenizers import ClipTokenizer
from trainer.config.models import OpenCLIPConfig
from trainer.config.run import ConfigError
from trainer.evaluation.features import Fit, channels_first, resized_on_device, to_size, weights_digest
from trainer.weights import Undrawn, check_fit, read_tensors, shapes_of

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_DEVIATION = (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_DEVIATION = (0.229, 0.224, 0.225)
DINO_EDGE = 224
DINO_ORIGIN = "https://dl.fbaipublicfiles.com/dinov2/dinov2_vitl14/dinov2_vitl14_pretrain.pth"


class ClipFeatures:
    """See FeatureNetwork. `embedding` has length 1; `score` is the cosine between picture and caption."""

    def __init__(self, model: str, weights: str, device: torch.device, *, text: bool) -> None:
        """`weights`: a tag of open_clip, a file or a URL; `text`: whether scores are wanted.

        Raises ConfigError when they are not at hand, or do not fit.
        """
        from trainer.conditioning import open_clip_towers as towers

        config = OpenCLIPConfig(model=model, pretrained=weights, layer="last", pooled=True)
        structure = towers.architecture(config)
        settings = towers.pretrained_settings(model, weights)
        structure["quick_gelu"] = structure.get("quick_gelu", False) or settings.get("quick_gelu", False)
        try:
            image = towers.build_image_tower(model, structure, weights)
        except ConfigError as error:
            remedy = "--clip-weights"
            if settings.get("quick_gelu") and "quickgelu" not in model:  # which a file does not say
                remedy += f", with --clip-model {model}-quickgelu"
            raise ConfigError(f"CLIP's features: {error} (Here: {remedy}.)") from error
        self._image = image.to(device).requires_grad_(False).eval()
        self._text = towers.build_tower(config, structure, seed=0) if text else None
        if self._text is not None:
            self._text = self._text.to(device).requires_grad_(False).eval()
            self._tokenize = ClipTokenizer(self._text.context_length)
        self._edge = int(structure["vision_cfg"]["image_size"])
        self._fit: Fit = "squash" if settings.get("resize_mode") == "squash" else "crop"
        self.name = f"{model} of open_clip"
        self.digest = weights_digest(self._image)
        self.details: Mapping[str, str] = {}
        if self._text is not None:
            self.details = {"text_sha256": weights_digest(self._text)}
        self.sees = f"{self._fit} by Pillow's bicubic to {self._edge}"
        self.widths: Mapping[str, int] = {"embedding": int(structure["embed_dim"])} | (
            {"score": 1} if text else {}
        )
        self._device = device
        mean, deviation = settings.get("mean", CLIP_MEAN), settings.get("std", CLIP_DEVIATION)
        self._normalise = Normalise(mean, deviation, device)

    def prepare(self, picture: NDArray[np.uint8]) -> NDArray[Any]:
        """See FeatureNetwork."""
        return channels_first(to_size(picture, self._edge, self._fit))

    def __call__(self, prepared: Sequence[NDArray[Any]], captions: Sequence[str]) -> dict[str, Tensor]:
        """See FeatureNetwork."""
        pixels = resized_on_device(prepared, self._device, self._normalise)
        embedding = F.normalize(self._image(pixels), dim=1)
        if self._text is None:
            return {"embedding": embedding}
        described = [i for i, caption in enumerate(captions) if caption]
        if not described:
            return {"embedding": embedding, "score": embedding.new_zeros(0, 1)}
        tokens = self._tokenize([captions[i] for i in described]).to(self._device)
        texts = F.normalize(self._text(tokens), dim=1)
        return {"embedding": embedding, "score": (embedding[described] * texts).sum(dim=1, keepdim=True)}


class DINOv2:
    """See FeatureNetwork."""

    def __init__(self, model: str, weights: str | None, device: torch.device) -> None:
        """Raises ConfigError: timm is not installed or has no such model, or the weights are not at hand."""
        try:
            import timm
            from timm.models.vision_transformer import checkpoint_filter_fn
        except ImportError as error:
            raise ConfigError("DINOv2's features need timm; run `pip install timm`.") from error
        if model not in timm.list_models("*dinov2*"):
            raise ConfigError(
                f"timm has no DINOv2 {model!r}; it has {', '.join(timm.list_models('*dinov2*'))}."
            )
        if weights is None:
            raise ConfigError(
                "DINOv2's weights are not downloaded; bring the file of the model, for ViT-L/14 "
                f"{DINO_ORIGIN}, and name it with --dinov2-weights."
            )
        with torch.random.fork_rng(devices=[]), torch.device("cpu"), Undrawn():
            network = timm.create_model(model, pretrained=False, num_classes=0, img_size=DINO_EDGE)
        stored = dict(read_tensors(weights))
        self.sees = f"squashed by Pillow's bicubic to {DINO_EDGE}"
        if not network.no_embed_class:  # with registers, Meta interpolates as timm does
            self.sees += ", positions not antialiased"
            edge = network.patch_embed.grid_size[0]
            stored |= {n: positions_by_scale(t, edge) for n, t in stored.items() if n == "pos_embed"}
        tensors = checkpoint_filter_fn(stored, network)
        check_fit(shapes_of(network.state_dict()), shapes_of(tensors), weights, f"Name the file of {model}.")
        network.load_state_dict(tensors)
        self._network = network.to(device).requires_grad_(False).eval()
        self.name = f"{model} of timm"
        self.digest = weights_digest(network)
        self.details: Mapping[str, str] = {}
        self.widths: Mapping[str, int] = {"pool": int(network.num_features)}
        self._device = device
        self._normalise = Normalise(IMAGENET_MEAN, IMAGENET_DEVIATION, device)

    def prepare(self, picture: NDArray[np.uint8]) -> NDArray[Any]:
        """See FeatureNetwork."""
        return channels_first(to_size(picture, DINO_EDGE, "squash"))

    def __call__(self, prepared: Sequence[NDArray[Any]], captions: Sequence[str]) -> dict[str, Tensor]:
        """See FeatureNetwork."""
        return {"pool": self._network(resized_on_device(prepared, self._device, self._normalise))}


def positions_by_scale(positions: Tensor, edge: int) -> Tensor:
    """[1, 1 + n * n, D] -> [1, 1 + edge * edge, D], as Meta's DINOv2 without registers has them.

    A scale a little too large (`interpolate_offset` of its `interpolate_pos_encoding`), and no antialiasing.
    """
    grid = math.isqrt(positions.shape[1] - 1) if positions.ndim == 3 else 0
    if grid in (0, edge) or positions.shape[1] != 1 + grid * grid:
        return positions  # as they are, or not DINOv2's: told with the other shapes
    patches = positions[:, 1:].float().reshape(1, grid, grid, -1).permute(0, 3, 1, 2)
    patches = F.interpolate(patches, scale_factor=(edge + 0.1) / grid, mode="bicubic")
    return torch.cat([positions[:, :1], patches.permute(0, 2, 3, 1).flatten(1, 2).to(positions.dtype)], dim=1)


class Normalise:
    """Pixels [B, 3, H, W] of 0 to 255 by the mean and deviation of what a network was trained on."""

    def __init__(self, mean: Sequence[float], deviation: Sequence[float], device: torch.device) -> None:
        self._mean = torch.tensor(mean, device=device).view(1, 3, 1, 1)
        self._deviation = torch.tensor(deviation, device=device).view(1, 3, 1, 1)

    def __call__(self, pixels: Tensor) -> Tensor:
        """What the network is given."""
        return (pixels / 255 - self._mean) / self._deviation
