"""First-stage objective: reconstruction, adversarial and codebook terms (LDM paper, appendix G; VQGAN)."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_weight

MAX_ADAPTIVE_WEIGHT = 1e4
ADAPTIVE_EPS = 1e-4


def reconstruction_error(pixels: Tensor, reconstruction: Tensor, kind: Literal["l1", "l2"]) -> Tensor:
    """Distance per pixel and channel, float32 [B, 3, H, W]."""
    difference = pixels.float() - reconstruction.float()
    return difference.abs() if kind == "l1" else difference.square()


def negative_log_likelihood(
    error: Tensor, perceptual: Tensor, logvar: Tensor, *, reduction: Literal["sum", "mean"]
) -> Tensor:
    """0-d: mean over samples of `error + perceptual`, under one shared log variance.

    Args:
        error: [B, 3, H, W].
        perceptual: weighted perceptual distance [B]; it counts once per element of `error`.
        logvar: 0-d.
        reduction: what happens to the elements of one sample: "sum" for the KL stage, whose KL term is
            a sum too; "mean" for the VQ stage.
    """
    nll = (error + perceptual.view(-1, 1, 1, 1)) * torch.exp(-logvar) + logvar
    per_sample = nll.flatten(1)
    return (per_sample.sum(dim=1) if reduction == "sum" else per_sample.mean(dim=1)).mean()


def generator_loss(fake_logits: Tensor) -> Tensor:
    """0-d: the autoencoder wants its reconstructions called real."""
    return -fake_logits.mean()


def discriminator_loss(real_logits: Tensor, fake_logits: Tensor, kind: Literal["hinge", "vanilla"]) -> Tensor:
    """0-d: hinge (Lim and Ye 2017) or binary cross-entropy (Goodfellow et al. 2014), halved."""
    if kind == "hinge":
        real, fake = F.relu(1.0 - real_logits), F.relu(1.0 + fake_logits)
    else:
        real, fake = F.softplus(-real_logits), F.softplus(fake_logits)
    return 0.5 * (real.mean() + fake.mean())


def last_layer_gradient(features: Tensor, output_gradient: Tensor) -> Tensor:
    """Gradient of a loss by the weight of the decoder's last 3x3 convolution, [3, C, 3, 3].

    Made from the convolution's input and the gradient by its output, so it needs neither a second
    walk through the graph nor the weight itself (which ZeRO stage 3 does not keep whole).
    """
    shape = (output_gradient.shape[1], features.shape[1], 3, 3)
    return conv2d_weight(features.float(), shape, output_gradient.float(), padding=1)


def adaptive_weight(
    features: Tensor, reconstruction_gradient: Tensor, adversarial_gradient: Tensor
) -> Tensor:
    """0-d: |grad reconstruction| / (|grad adversarial| + 1e-4) at the last layer, clamped to 0 .. 1e4.

    VQGAN, equation 7. Both gradients are by the reconstruction, [B, 3, H, W]. It is a function of one
    micro-batch on one rank.
    """
    reconstruction = last_layer_gradient(features, reconstruction_gradient).norm()
    adversarial = last_layer_gradient(features, adversarial_gradient).norm()
    return (reconstruction / (adversarial + ADAPTIVE_EPS)).clamp(0.0, MAX_ADAPTIVE_WEIGHT)


def codebook_usage(counts: Tensor) -> tuple[Tensor, Tensor]:
    """From look-ups per entry [K]: share of entries used at all, and perplexity exp(entropy)."""
    probabilities = counts.float() / counts.sum().clamp(min=1)
    entropy = -torch.xlogy(probabilities, probabilities).sum()
    return (counts > 0).float().mean(), entropy.exp()
