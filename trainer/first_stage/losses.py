"""First-stage objective: reconstruction, adversarial and codebook terms (LDM paper, appendix G; VQGAN).

The adversary is the PatchGAN discriminator (Isola et al. 2017) as VQGAN uses it: batch normalisation, one
logit per patch.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.grad import conv2d_weight

from trainer.first_stage.networks import match_parameters

MAX_ADAPTIVE_WEIGHT = 1e4
ADAPTIVE_EPS = 1e-4
MAX_MULTIPLIER = 8
"""Of the discriminator's width, from its first layer on."""
NORM_EPS = 1e-5


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


class BatchNorm(nn.Module):
    """Batch normalisation by the statistics of the pictures at hand, without running averages.

    The discriminator is only ever used in training, so running averages would have no reader; without
    them there are no buffers that drift apart between ranks or miss from checkpoints. Statistics are
    taken over one rank's micro-batch, never across ranks: micro_batch_size is part of the maths of
    this network, the number of ranks is not.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor, parts: int) -> Tensor:
        """[B, C, H, W]; each of `parts` equal runs of the batch has statistics of its own."""
        normalised = [
            F.batch_norm(part, None, None, self.weight, self.bias, training=True, eps=NORM_EPS)
            for part in x.chunk(parts)
        ]
        return normalised[0] if parts == 1 else torch.cat(normalised)


class PatchDiscriminator(nn.Module):
    """Judges overlapping patches: [B, 3, H, W] -> logits [B, 1, H', W']; high means real."""

    def __init__(self, *, channels: int, num_layers: int) -> None:
        """`num_layers` strided convolutions, then two of stride one; weights drawn as in DCGAN."""
        super().__init__()
        widths = [channels * min(2**i, MAX_MULTIPLIER) for i in range(num_layers + 1)]
        self.conv_in = nn.Conv2d(3, widths[0], 4, stride=2, padding=1)
        self.convs = nn.ModuleList()
        self.norms = nn.ModuleList()
        for i in range(1, num_layers + 1):
            stride = 2 if i < num_layers else 1
            self.convs.append(nn.Conv2d(widths[i - 1], widths[i], 4, stride=stride, padding=1, bias=False))
            self.norms.append(BatchNorm(widths[i]))
        self.conv_out = nn.Conv2d(widths[-1], 1, 4, padding=1)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0.0, 0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, BatchNorm):
                nn.init.normal_(module.weight, 1.0, 0.02)

    def forward(self, pixels: Tensor, parts: int = 1) -> Tensor:
        """Logits in float32.

        Real and reconstructed pictures go through together, concatenated, with parts=2: one forward
        per backward, which every engine handles, yet separate batch statistics as in the original.
        """
        x = F.leaky_relu(self.conv_in(match_parameters(pixels, self)), 0.2)
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = F.leaky_relu(norm(conv(x), parts), 0.2)
        return self.conv_out(x).float()
