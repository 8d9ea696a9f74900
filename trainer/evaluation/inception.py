"""Inception as FID means it, TensorFlow's of 2015; the only importer of torch_fidelity, which ported it.

    picture -> 299 x 299 -> ... Mixed_6c -> Mixed_6d ............ Mixed_7c -> mean -> fc without its bias
                                              |                                |            |
                                          spatial [2023]                  pool [2048]   logits [1008]

`spatial` is `mixed_6/conv:0` of the TensorFlow graph, the 1 x 1 branch of Mixed_6d, 17 x 17, of which the
first 7 channels count: the features of sFID (Nash et al. 2021) as guided diffusion evaluates it, whose maps
have channels last.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from trainer.config.run import ConfigError
from trainer.evaluation.features import (
    CLIPPED,
    Resizing,
    channels_first,
    resized_on_device,
    to_size_unrounded,
    weights_digest,
)
from trainer.weights import check_fit, read_once, read_tensors, shapes_of

if TYPE_CHECKING:
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

EDGE = 299
FILE = "weights-inception-2015-12-05-6726825d.pth"
ORIGIN = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{FILE}"
SPATIAL_EDGE, SPATIAL_CHANNELS = 17, 7
SPATIAL_ORDER = {"spatial": "height, width, channel"}
"""In the details of a network's record; statistics of earlier versions, without it, have channels first."""
_BEFORE_SPATIAL = (
    *("Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3", "MaxPool_1", "Conv2d_3b_1x1", "Conv2d_4a_3x3"),
    *("MaxPool_2", "Mixed_5b", "Mixed_5c", "Mixed_5d", "Mixed_6a", "Mixed_6b", "Mixed_6c"),
)
_AFTER_SPATIAL = ("Mixed_6d", "Mixed_6e", "Mixed_7a", "Mixed_7b", "Mixed_7c", "AvgPool")


class Inception:
    """See FeatureNetwork."""

    def __init__(self, weights: str | None, resizing: Resizing, device: torch.device) -> None:
        """Raises ConfigError when torch-fidelity is not installed or its weights are not at hand."""
        self._network = load_inception(weights)
        self.name = "inception-v3-compat of torch-fidelity"
        self.digest = weights_digest(self._network)
        self.details: Mapping[str, str] = SPATIAL_ORDER
        self.sees = f"{resizing} at {EDGE}" + (f", {CLIPPED}" if resizing == "clean-fid" else "")
        self.widths: Mapping[str, int] = {
            "pool": 2048,
            "spatial": SPATIAL_EDGE**2 * SPATIAL_CHANNELS,
            "logits": 1008,
        }
        self._resizing = resizing
        self._device = device
        self._network.to(device)

    def prepare(self, picture: NDArray[np.uint8]) -> NDArray[Any]:
        """See FeatureNetwork."""
        if self._resizing == "clean-fid":
            return to_size_unrounded(picture, EDGE)
        return channels_first(picture)

    def __call__(self, prepared: Sequence[NDArray[Any]], captions: Sequence[str]) -> dict[str, Tensor]:
        """See FeatureNetwork."""
        return self.outputs(resized_on_device(prepared, self._device, self._normalised))

    def outputs(self, x: Tensor) -> dict[str, Tensor]:
        """From [B, 3, 299, 299] in -1 .. 1."""
        for name in _BEFORE_SPATIAL:
            x = getattr(self._network, name)(x)
        spatial = self._network.Mixed_6d.branch1x1(x)[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1)
        for name in _AFTER_SPATIAL:
            x = getattr(self._network, name)(x)
        pool = x.flatten(1)
        return {"pool": pool, "spatial": spatial.flatten(1), "logits": pool @ self._network.fc.weight.T}

    def _normalised(self, pixels: Tensor) -> Tensor:
        """[b, 3, h, w] in 0 .. 255 -> [b, 3, 299, 299] in -1 .. 1, as the program named does it."""
        if self._resizing == "pytorch-fid":  # no antialiasing either
            return F.interpolate(pixels / 255, (EDGE, EDGE), mode="bilinear", align_corners=False) * 2 - 1
        if self._resizing == "torch-fidelity":
            from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x

            pixels = interpolate_bilinear_2d_like_tensorflow1x(pixels, size=(EDGE, EDGE), align_corners=False)
        return (pixels - 128) / 128


def load_inception(weights: str | None) -> FeatureExtractorInceptionV3:
    """torch-fidelity's network with weights from a file, a URL or torch.hub's cache; nothing is downloaded.

    Raises:
        ConfigError: torch-fidelity is not installed; no such file; not Inception's weights.
    """
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except ImportError as error:
        raise ConfigError(
            "Inception's features need torch-fidelity; run `pip install torch-fidelity` (extra `evaluation`)."
        ) from error
    source = read_once(lambda: weights or _cached())
    tensors = read_tensors(source)
    with torch.device("cpu"), torch.random.fork_rng(devices=[]):
        network = _built(FeatureExtractorInceptionV3, tensors, source)
    return network.requires_grad_(False).eval()


def _cached() -> str:
    cached = Path(torch.hub.get_dir()) / "checkpoints" / FILE
    if not cached.is_file():
        raise ConfigError(
            f"Inception's weights are not on this machine; bring {ORIGIN} to {cached}, or name the file "
            "with --inception-weights (of a run: validation.features_weights)."
        )
    return str(cached)


def _built(kind: type[Any], tensors: dict[str, Tensor], source: str) -> Any:
    """Its constructor unpickles the file it is given, so it is given one that we wrote of tensors alone."""
    shapes = {}

    class CheckedInception(kind):
        def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
            shapes.update(shapes_of(self.state_dict()))
            found = {n: t for n, t in tensors.items() if n in shapes or not n.endswith("num_batches_tracked")}
            wanted = {n: s for n, s in shapes.items() if n in found or not n.endswith("num_batches_tracked")}
            check_fit(wanted, shapes_of(found), source, f"Name torch-fidelity's file, {ORIGIN}.")
            return nn.Module.load_state_dict(self, found, strict=False)

    empty = io.BytesIO()
    torch.save({}, empty)
    empty.seek(0)
    return CheckedInception(
        "inception-v3-compat", ["2048", "logits_unbiased"], feature_extractor_weights_path=empty
    )
