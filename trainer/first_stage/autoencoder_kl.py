"""Autoencoder with a KL-regularised Gaussian latent (LDM paper, section 3.1; the VAE of Stable Diffusion)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from trainer.config.models import FirstStageConfig
from trainer.first_stage.base import FirstStage
from trainer.first_stage.networks import Decoder, Encoder, initialise_convolutions, match_parameters

LOGVAR_RANGE = (-30.0, 20.0)


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
