"""The first stages: a Gaussian latent pulled to the normal (KL), a codebook of latents (VQ), and none at all.

KL is the VAE of Stable Diffusion, VQ that of van den Oord et al. 2017; both LDM paper, section 3.1. Around
the same encoder and decoder they differ in what a latent is, and in what it costs. The identity is diffusion
in pixel space (f = 1 in the paper's tables).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.config.models import FirstStageConfig
from trainer.first_stage.base import FirstStage
from trainer.first_stage.networks import Decoder, Encoder, initialise_convolutions, match_parameters

LOGVAR_RANGE = (-30.0, 20.0)
DISTANCES_AT_ONCE = 2**26


def split_moments(moments: Tensor) -> tuple[Tensor, Tensor]:
    """[B, 2z, h, w] -> mean and log variance (clamped to -30 .. 20), float32 [B, z, h, w] each."""
    mean, logvar = moments.float().chunk(2, dim=1)
    return mean, logvar.clamp(*LOGVAR_RANGE)


def kl_divergence(mean: Tensor, logvar: Tensor) -> Tensor:
    """KL(N(mean, exp(logvar)) || N(0, 1)), summed over everything but the batch: [B]."""
    terms = mean.square() + logvar.exp() - 1.0 - logvar
    return 0.5 * terms.flatten(1).sum(dim=1)


class AutoencoderKL(FirstStage):
    """Encoder, Gaussian posterior, decoder."""

    gaussian = True

    def __init__(self, config: FirstStageConfig) -> None:
        super().__init__(config)
        z = config.latent_channels
        self.encoder = Encoder(config, out_channels=2 * z)
        self.decoder = Decoder(config)
        self.quant_conv = nn.Conv2d(2 * z, 2 * z, 1)
        self.post_quant_conv = nn.Conv2d(z, z, 1)
        initialise_convolutions(self)

    def encode_whole(self, pixels: Tensor) -> Tensor:
        """Moments [B, 2z, h, w]: mean, then log variance."""
        return self.quant_conv(self.encoder(match_parameters(pixels, self.encoder)))

    def decode_whole(self, z: Tensor) -> Tensor:
        """Pixels of unnormalised latents."""
        return self.decoder(self.post_quant_conv(match_parameters(z, self.decoder)))

    def sample(self, encoded: Tensor, noise: Tensor | None) -> Tensor:
        """mean + std * noise, float32 [B, z, h, w]."""
        mean, logvar = split_moments(encoded)
        return mean if noise is None else mean + torch.exp(0.5 * logvar) * noise

    def second_moment(self, encoded: Tensor) -> tuple[Tensor, Tensor]:
        """E[z] = mean, E[z**2] = mean**2 + variance."""
        mean, logvar = split_moments(encoded)
        return mean, mean.square() + logvar.exp()

    def training_outputs(self, pixels: Tensor, noise: Tensor | None) -> dict[str, Tensor]:
        """See FirstStage: with "kl" [B]."""
        moments = self.encode_whole(pixels)
        z = match_parameters(self.sample(moments, noise), self.decoder)
        features = self.decoder.features(self.post_quant_conv(z))
        return {
            "reconstruction": self.decoder.conv_out(features),
            "features": features.detach(),
            "kl": kl_divergence(*split_moments(moments)),
        }


class Quantised(NamedTuple):
    """Result of a codebook look-up."""

    latents: Tensor
    """[B, z, h, w]: nearest entries; the gradient passes straight through to the input."""
    codebook_loss: Tensor
    """0-d: mean squared distance, moving the entries only."""
    commitment_loss: Tensor
    """0-d: mean squared distance, moving the encoder only."""
    indices: Tensor
    """int64 [B, h, w]"""


class Codebook(nn.Module):
    """`size` entries with `channels` numbers each. It owns its weight, so sharding engines gather it."""

    def __init__(self, size: int, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size, channels).uniform_(-1.0 / size, 1.0 / size))

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """z [B, z, h, w] -> nearest entries [B, z, h, w] and their indices, int64 [B, h, w]."""
        points = z.detach().float().permute(0, 2, 3, 1).flatten(0, 2)  # [B*h*w, z]
        entries = self.weight.detach().float()
        squares = entries.square().sum(dim=1)
        # |p - e|^2 without |p|^2, which does not change the order; in slices, because the table of
        # distances would otherwise be the largest tensor of the whole training step.
        nearest = [
            torch.addmm(squares, part, entries.t(), alpha=-2.0).argmin(dim=1)
            for part in points.split(max(1, DISTANCES_AT_ONCE // len(entries)))
        ]
        indices = torch.cat(nearest).view(z.shape[0], *z.shape[2:])
        return F.embedding(indices, self.weight).permute(0, 3, 1, 2), indices


class VectorQuantizer(nn.Module):
    """Nearest-entry look-up with a straight-through gradient."""

    def __init__(self, size: int, channels: int) -> None:
        super().__init__()
        self.embedding = Codebook(size, channels)

    def forward(self, z: Tensor) -> Quantised:
        """z [B, z, h, w]; both losses in float32."""
        entries, indices = self.embedding(z)
        return Quantised(
            latents=z + (entries - z).detach(),
            codebook_loss=F.mse_loss(entries.float(), z.detach().float()),
            commitment_loss=F.mse_loss(z.float(), entries.detach().float()),
            indices=indices,
        )


class AutoencoderVQ(FirstStage):
    """Encoder, codebook, decoder. For diffusion the codebook belongs to the decoder."""

    def __init__(self, config: FirstStageConfig) -> None:
        super().__init__(config)
        z = config.latent_channels
        self.encoder = Encoder(config, out_channels=z)
        self.decoder = Decoder(config)
        self.quant_conv = nn.Conv2d(z, z, 1)
        self.quantize = VectorQuantizer(config.codebook_size, z)
        self.post_quant_conv = nn.Conv2d(z, z, 1)
        initialise_convolutions(self)

    def encode_whole(self, pixels: Tensor) -> Tensor:
        """Latents before quantisation, [B, z, h, w]."""
        return self.quant_conv(self.encoder(match_parameters(pixels, self.encoder)))

    def decode_whole(self, z: Tensor) -> Tensor:
        """Quantise, then decode."""
        quantised = self.quantize(z).latents
        return self.decoder(self.post_quant_conv(match_parameters(quantised, self.decoder)))

    def sample(self, encoded: Tensor, noise: Tensor | None) -> Tensor:
        """The latents themselves: the posterior is a point."""
        return encoded.float()

    def second_moment(self, encoded: Tensor) -> tuple[Tensor, Tensor]:
        """z and z**2."""
        return encoded.float(), encoded.float().square()

    def training_outputs(self, pixels: Tensor, noise: Tensor | None) -> dict[str, Tensor]:
        """See FirstStage: with "codebook", "commitment", "indices" and "encoded", the detached [B, z, h, w]
        that was quantised."""
        encoded = self.encode_whole(pixels)
        quantised = self.quantize(encoded)
        latents = match_parameters(quantised.latents, self.decoder)
        features = self.decoder.features(self.post_quant_conv(latents))
        return {
            "reconstruction": self.decoder.conv_out(features),
            "features": features.detach(),
            "codebook": quantised.codebook_loss,
            "commitment": quantised.commitment_loss,
            "indices": quantised.indices,
            "encoded": encoded.detach(),
        }


class Identity(FirstStage):
    """Latents are the pixels. There is nothing to train."""

    trainable = False
    statistics_measured = True  # pixels lie in -1 .. 1; there is nothing to measure

    def encode_whole(self, pixels: Tensor) -> Tensor:
        """The pixels."""
        return pixels

    def decode_whole(self, z: Tensor) -> Tensor:
        """The pixels."""
        return z

    def sample(self, encoded: Tensor, noise: Tensor | None) -> Tensor:
        """The pixels; there is nothing to draw."""
        return encoded.float()

    def second_moment(self, encoded: Tensor) -> tuple[Tensor, Tensor]:
        """The pixels and their squares."""
        return encoded.float(), encoded.float().square()
