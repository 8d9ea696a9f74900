"""How well a first stage gives pictures back: PSNR, SSIM and perceptual distance, per picture."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from trainer.first_stage.base import FirstStage
from trainer.first_stage.perceptual import PerceptualDistance
from trainer.pixels import to_bytes, to_unit_range

WINDOW_EDGE = 11
WINDOW_SIGMA = 1.5
# Wang et al. 2004: C1 = (0.01 L)^2, C2 = (0.03 L)^2.
STABILISERS = (0.01, 0.03)
MAX_PSNR = 100.0
"""What identical pictures are given instead of infinity, so that means stay finite."""


def psnr(first: Tensor, second: Tensor, data_range: float = 2.0) -> Tensor:
    """Peak signal-to-noise ratio in dB, [B], of [B, C, H, W]; pixels in -1 .. 1 have data_range 2."""
    error = (first.double() - second.double()).square().flatten(1).mean(dim=1)
    ratio = 10.0 * torch.log10(data_range**2 / error.clamp(min=1e-300))
    return ratio.clamp(max=MAX_PSNR).float()


def ssim(first: Tensor, second: Tensor, data_range: float = 2.0) -> Tensor:
    """Structural similarity (Wang et al. 2004), [B]: mean over channels and all whole 11 x 11 windows.

    Both are [B, C, H, W] with edges of at least 11 pixels. The window is a Gaussian of deviation 1.5.
    """
    assert min(first.shape[-2:]) >= WINDOW_EDGE, first.shape
    x, y = first.double(), second.double()
    c1, c2 = ((k * data_range) ** 2 for k in STABILISERS)
    mean_x, mean_y = _blur(x), _blur(y)
    variance_x = _blur(x * x) - mean_x.square()
    variance_y = _blur(y * y) - mean_y.square()
    covariance = _blur(x * y) - mean_x * mean_y
    luminance = (2 * mean_x * mean_y + c1) / (mean_x.square() + mean_y.square() + c1)
    structure = (2 * covariance + c2) / (variance_x + variance_y + c2)
    return (luminance * structure).flatten(1).mean(dim=1).float()


def distance_name(perceptual: PerceptualDistance | None) -> str:
    """What a perceptual distance is called in results."""
    return "psim" if perceptual is not None and perceptual.is_lpips else "random_features"


def _blur(x: Tensor) -> Tensor:
    """Separable Gaussian window, without padding: [B, C, H, W] -> [B, C, H-10, W-10]."""
    position = torch.arange(WINDOW_EDGE, dtype=x.dtype, device=x.device) - WINDOW_EDGE // 2
    window = torch.exp(-position.square() / (2 * WINDOW_SIGMA**2))
    window = window / window.sum()
    channels = x.shape[1]
    vertical = window.view(1, 1, -1, 1).expand(channels, 1, -1, 1)
    horizontal = window.view(1, 1, 1, -1).expand(channels, 1, 1, -1)
    return F.conv2d(F.conv2d(x, vertical, groups=channels), horizontal, groups=channels)


@torch.no_grad()
def reconstruction_metrics(
    first_stage: FirstStage,
    batches: Iterable[Tensor],
    perceptual: PerceptualDistance | None,
    see: Callable[[Tensor, Tensor], None] = lambda pictures, made: None,
) -> dict[str, float]:
    """Means over all pictures of what the first stage makes of them.

    Pictures go through the latents' mode and are rounded to 8 bits before they are compared, as they
    would be when stored.

    Args:
        first_stage: in eval mode.
        batches: uint8 [B, 3, H, W] each, on the first stage's device.
        perceptual: LPIPS (the paper's PSIM), or random features; None leaves it out.
        see: is shown each batch and what became of it, uint8 [B, 3, H, W] both.

    Returns:
        "psnr" in dB, "ssim", the perceptual distance where asked for, "pictures" counted. It is called
        "psim" with LPIPS alone: random features measure something else, which is "random_features".
    """
    distance = distance_name(perceptual)
    sums = {"psnr": 0.0, "ssim": 0.0} | ({distance: 0.0} if perceptual is not None else {})
    pictures = 0
    for batch in batches:
        assert batch.dtype == torch.uint8, batch.dtype
        pixels = to_unit_range(batch)
        stored = to_bytes(first_stage.decode(first_stage.latents(pixels, None)))
        see(batch, stored)
        made = to_unit_range(stored)
        sums["psnr"] += float(psnr(pixels, made).sum())
        sums["ssim"] += float(ssim(pixels, made).sum())
        if perceptual is not None:
            sums[distance] += float(perceptual(pixels, made).sum())
        pictures += len(batch)
    if pictures == 0:
        return dict.fromkeys(sums, math.nan) | {"pictures": 0.0}
    return {name: total / pictures for name, total in sums.items()} | {"pictures": float(pictures)}
