"""LPIPS with gradient (Zhang et al. 2018), and its offline twin made of random features, when asked for."""

from __future__ import annotations

import logging
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data_pipeline.errors import UserError
from trainer.config.models import RANDOM
from trainer.config.run import ConfigError
from trainer.config.training import AutoencoderLossConfig
from trainer.weights import check_fit, read_once, read_tensors, shapes_of

LOG = logging.getLogger(__name__)
LAYERS = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
"""Output channels of the convolutions of VGG16, by stage; a stage ends in a feature that is compared."""
CACHE_NAME = "vgg16-397923af.pth"
CACHE_URL = f"https://download.pytorch.org/models/{CACHE_NAME}"
SETTING = "autoencoder_loss.perceptual_weights"
"""Where a configuration names the weights."""
RANDOM_WIDTH = 16
RANDOM_SEED = 0
# Normalisation of pixels in -1 .. 1 for an ImageNet network.
SHIFT = (-0.030, -0.088, -0.188)
SCALE = (0.458, 0.448, 0.450)


class VGG16Features(nn.Module):
    """The five feature maps of VGG16's convolutional part that LPIPS compares."""

    def __init__(self, width: int = 64) -> None:
        """`width` channels in the first stage; 64 is VGG16."""
        super().__init__()
        self.stages = nn.ModuleList()
        channels = 3
        for stage in LAYERS:
            convolutions = nn.ModuleList()
            for out_channels in stage:
                out_channels = out_channels * width // 64
                convolutions.append(nn.Conv2d(channels, out_channels, 3, padding=1))
                channels = out_channels
            self.stages.append(convolutions)

    def forward(self, x: Tensor) -> list[Tensor]:
        """Features after each stage, [B, C_i, H / 2**i, W / 2**i]."""
        features = []
        for i, stage in enumerate(self.stages):
            if i > 0:
                x = F.max_pool2d(x, 2)
            for convolution in stage:  # type: ignore[attr-defined]
                x = F.relu(convolution(x))
            features.append(x)
        return features


class PerceptualDistance(nn.Module):
    """Distance between pictures in the feature space of a frozen network, [B]."""

    name: str
    """Which features these are, for the log, the run's configuration, W&B and results."""
    is_lpips: bool
    """Whether these are trained features, so that a distance can be compared with those of other people."""
    shift: Tensor
    scale: Tensor

    def __init__(
        self, network: VGG16Features, layer_weights: list[Tensor], name: str, *, is_lpips: bool
    ) -> None:
        """`layer_weights`: one non-negative weight per channel, [C_i], for each of the five stages."""
        super().__init__()
        self.network = network
        self.name = name
        self.is_lpips = is_lpips
        self.register_buffer("shift", torch.tensor(SHIFT).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("scale", torch.tensor(SCALE).view(1, 3, 1, 1), persistent=False)
        for i, weights in enumerate(layer_weights):
            self.register_buffer(f"weights_{i}", weights.view(1, -1, 1, 1), persistent=False)
        # Twice as fast on CPUs, and what tensor cores want anyway.
        self.to(memory_format=torch.channels_last)
        self.requires_grad_(False).eval()

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        """Distance of [B, 3, H, W] in -1 .. 1, both at least 16 x 16 pixels; differentiable in both."""
        assert min(first.shape[-2:]) >= 16, first.shape
        total = first.new_zeros(first.shape[0], dtype=self.shift.dtype)
        pairs = zip(self.features(first), self.features(second), strict=True)
        for i, (a, b) in enumerate(pairs):
            # Channels last by name as well as in memory, or the feature's gradient would lie channels-first.
            weighted = (a - b).square().movedim(1, -1) * getattr(self, f"weights_{i}").flatten()
            total = total + weighted.sum(dim=-1).mean(dim=(1, 2))
        return total

    def features(self, pixels: Tensor) -> list[Tensor]:
        """Feature maps with unit length along the channels."""
        x = (pixels.to(self.shift.dtype) - self.shift) / self.scale
        # normalize, unlike a written-out square root, has a finite gradient where all channels are 0.
        return [F.normalize(f, dim=1, eps=1e-10) for f in self.network(x)]


def build_perceptual(
    config: AutoencoderLossConfig, device: torch.device | str = "cpu"
) -> PerceptualDistance | None:
    """LPIPS with the configured VGG16 weights, or random features where the configuration says so.

    Nothing is ever downloaded. Which it became is in `name` and in the log. None where the perceptual
    weight is 0.

    Raises:
        ConfigError: see `perceptual_source` and `load_perceptual`.
    """
    return load_perceptual(config.perceptual_weights).to(device) if config.perceptual_weight else None


def perceptual_source(weights: str | None, setting: str = SETTING) -> str:
    """Where the weights are: the file or URL given, torchvision's copy in torch's cache, or `random`.

    Args:
        weights: what `setting` says.
        setting: how the user says it, for the error.

    Raises:
        ConfigError: nothing is given and the cache has none.
    """
    if weights is not None:
        return weights
    cached = Path(torch.hub.get_dir()) / "checkpoints" / CACHE_NAME
    if not cached.is_file():
        raise ConfigError(
            f"there are no weights for LPIPS: name torchvision's VGG16 ({CACHE_URL}) by {setting}, or put it "
            f"at {cached}; {setting}={RANDOM} takes random features, which are not LPIPS: for demos, tests."
        )
    return str(cached)


def load_perceptual(weights: str | None, setting: str = SETTING) -> PerceptualDistance:
    """The network of `perceptual_source`, on the CPU.

    Raises:
        ConfigError: nothing is named, or the file is not there or does not hold VGG16.
    """
    source = read_once(lambda: perceptual_source(weights, setting))
    if source == RANDOM:
        return _random_features()
    with torch.device("meta"):
        network = VGG16Features()
    network.to_empty(device="cpu")
    _load_vgg16(network, source, setting)
    LOG.info("Perceptual distance: LPIPS with VGG16 weights from %s.", source)
    return PerceptualDistance(network, _lpips_weights(), "lpips-vgg16", is_lpips=True)


def _random_features() -> PerceptualDistance:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(RANDOM_SEED)
        network = VGG16Features(RANDOM_WIDTH)
        for module in network.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
    # LPIPS' channel weights belong to trained channels, so random channels count equally; a stage
    # then weighs about what it does in LPIPS, whose weights also sum to a few units.
    weights = [torch.ones(stage[-1] * RANDOM_WIDTH // 64) for stage in LAYERS]
    name = f"random-features (VGG16 shape, width {RANDOM_WIDTH}, seed {RANDOM_SEED}; not LPIPS)"
    LOG.warning("Perceptual distance: %s, as the word %s says.", name, RANDOM)
    return PerceptualDistance(network, weights, name, is_lpips=False)


def _lpips_weights() -> list[Tensor]:
    """The channel weights that the lpips package ships, [C_i] each."""
    # Found without importing the package, which would import all of torchvision.
    spec = find_spec("lpips")
    assert spec is not None, "lpips is a dependency of this package"
    assert spec.origin is not None
    path = Path(spec.origin).parent / "weights" / "v0.1" / "vgg.pth"
    tensors = torch.load(path, map_location="cpu", weights_only=True)
    return [tensors[f"lin{i}.model.1.weight"].flatten() for i in range(len(LAYERS))]


def _load_vgg16(network: VGG16Features, url: str, setting: str) -> None:
    """torchvision's `features.N.weight` and `.bias`; N counts convolutions, ReLUs and poolings."""
    targets: dict[str, Tensor] = {}
    index = 0
    for stage in network.stages:
        for convolution in stage:  # type: ignore[attr-defined]
            for part in ("weight", "bias"):
                targets[f"features.{index}.{part}"] = getattr(convolution, part)
            index += 2  # convolution and ReLU
        index += 1  # pooling
    try:
        found = read_tensors(url, lambda names: [name for name in targets if name in names])
        check_fit(shapes_of(targets), shapes_of(found), url, "It must be torchvision's VGG16.")
    except UserError as error:
        raise ConfigError(f"{setting}: {error}") from error
    with torch.no_grad():
        for name, target in targets.items():
            target.copy_(found[name])
