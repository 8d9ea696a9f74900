"""CLIP's embeddings of pictures and captions: CMMD (Jayasumana et al. 2024) and CLIP score."""

from __future__ import annotations

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

MEAN = (0.48145466, 0.4578275, 0.40821073)
DEVIATION = (0.26862954, 0.26130258, 0.27577711)


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
        self._mean = torch.tensor(settings.get("mean", MEAN), device=device).view(1, 3, 1, 1)
        self._deviation = torch.tensor(settings.get("std", DEVIATION), device=device).view(1, 3, 1, 1)

    def prepare(self, picture: NDArray[np.uint8]) -> NDArray[Any]:
        """See FeatureNetwork."""
        return channels_first(to_size(picture, self._edge, self._fit))

    def __call__(self, prepared: Sequence[NDArray[Any]], captions: Sequence[str]) -> dict[str, Tensor]:
        """See FeatureNetwork."""
        pixels = resized_on_device(prepared, self._device, self._normalised)
        embedding = F.normalize(self._image(pixels), dim=1)
        if self._text is None:
            return {"embedding": embedding}
        described = [i for i, caption in enumerate(captions) if caption]
        if not described:
            return {"embedding": embedding, "score": embedding.new_zeros(0, 1)}
        tokens = self._tokenize([captions[i] for i in described]).to(self._device)
        texts = F.normalize(self._text(tokens), dim=1)
        return {"embedding": embedding, "score": (embedding[described] * texts).sum(dim=1, keepdim=True)}

    def _normalised(self, pixels: Tensor) -> Tensor:
        return (pixels / 255 - self._mean) / self._deviation
