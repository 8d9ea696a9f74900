"""DINOv2's class token through timm, of which this is the only importer: FD-DINOv2 (Stein et al. 2023)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trainer.config.run import ConfigError
from trainer.evaluation.features import channels_first, resized_on_device, to_size, weights_digest
from trainer.weights import Undrawn, check_fit, read_tensors, shapes_of

EDGE = 224
MEAN = (0.485, 0.456, 0.406)
DEVIATION = (0.229, 0.224, 0.225)
ORIGIN = "https://dl.fbaipublicfiles.com/dinov2/dinov2_vitl14/dinov2_vitl14_pretrain.pth"


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
                f"{ORIGIN}, and name it with --dinov2-weights."
            )
        with torch.random.fork_rng(devices=[]), torch.device("cpu"), Undrawn():
            network = timm.create_model(model, pretrained=False, num_classes=0, img_size=EDGE)
        stored = read_tensors(weights)
        tensors = checkpoint_filter_fn(dict(stored), network)
        check_fit(shapes_of(network.state_dict()), shapes_of(tensors), weights, f"Name the file of {model}.")
        network.load_state_dict(tensors)
        self._network = network.to(device).requires_grad_(False).eval()
        self.name = f"{model} of timm"
        self.digest = weights_digest(network)
        self.details: Mapping[str, str] = {}
        self.sees = f"squashed by Pillow's bicubic to {EDGE}"
        self.widths: Mapping[str, int] = {"pool": int(network.num_features)}
        self._device = device
        self._mean = torch.tensor(MEAN, device=device).view(1, 3, 1, 1)
        self._deviation = torch.tensor(DEVIATION, device=device).view(1, 3, 1, 1)

    def prepare(self, picture: NDArray[np.uint8]) -> NDArray[Any]:
        """See FeatureNetwork."""
        return channels_first(to_size(picture, EDGE, "squash"))

    def __call__(self, prepared: Sequence[NDArray[Any]], captions: Sequence[str]) -> dict[str, Tensor]:
        """See FeatureNetwork."""
        return {"pool": self._network(resized_on_device(prepared, self._device, self._normalised))}

    def _normalised(self, pixels: Tensor) -> Tensor:
        return (pixels / 255 - self._mean) / self._deviation
