"""The low-resolution picture as extra channels: super-resolution (LDM section 4.4, SD x4 upscaler).

A picture that nobody gives is made from the original: bicubic, or blur, noise and JPEG in a light form.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from trainer.conditioning.base import Condition, Conditioning, Source, TrainedPart, replace_dropped
from trainer.config.models import FirstStageConfig, LowResolutionConfig
from trainer.config.run import ConfigError
from trainer.pixels import to_bytes, to_unit_range
from trainer.rng import Purpose, normal, randint, uniform

SAMPLING_NOISE_LEVEL = 20
"""Noise level of a given picture when nobody names one: enough to hide its compression."""
BLUR_RADIUS = 7
BLUR_SIGMA = (0.2, 2.0)
"""Standard deviation along each axis, in pixels of the original, for factor 4; scales with the factor."""
NOISE_SIGMA = (2.0 / 255.0, 8.0 / 255.0)
"""Standard deviation of the noise, of a range of 1."""
JPEG_QUALITY = (80.0, 95.0)
# Quantisation tables of ITU-T T.81, annex K, for quality 50.
LUMINANCE = (
    (16, 11, 10, 16, 24, 40, 51, 61),
    (12, 12, 14, 19, 26, 58, 60, 55),
    (14, 13, 16, 24, 40, 57, 69, 56),
    (14, 17, 22, 29, 51, 87, 80, 62),
    (18, 22, 37, 56, 68, 109, 103, 77),
    (24, 35, 55, 64, 81, 104, 113, 92),
    (49, 64, 78, 87, 103, 121, 120, 101),
    (72, 92, 95, 98, 112, 100, 103, 99),
)
CHROMINANCE = (
    (17, 18, 24, 47, 99, 99, 99, 99),
    (18, 21, 26, 66, 99, 99, 99, 99),
    (24, 26, 56, 99, 99, 99, 99, 99),
    (47, 66, 99, 99, 99, 99, 99, 99),
    *(((99,) * 8,) * 4),
)


class LowResolution(Condition):
    """3 channels at latent resolution; with noise augmentation also the noise level as class label.

    Null form: zeros in place of the picture. The noise level stays, since it describes the input.
    """

    def __init__(self, config: LowResolutionConfig, first_stage: FirstStageConfig, index: int) -> None:
        if not 0 <= config.max_noise_level <= config.noise_num_timesteps:
            raise ConfigError(
                f"conditioning.low_resolution.max_noise_level={config.max_noise_level} must lie in 0 .. "
                f"noise_num_timesteps={config.noise_num_timesteps}."
            )
        self.config = config
        self.noise_purpose = Purpose.CONDITION + index
        self.trained = NoisedPicture()
        self.drop_probability = config.drop_probability
        self.guided = config.drop_probability > 0
        self.concat_channels = 3
        self.signal = noise_level_alphas_cumprod(config)
        if config.max_noise_level:
            self.num_classes = config.noise_num_timesteps

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> None:
        """Move the noise-level schedule, which stays float32."""
        self.signal = self.signal.to(device)

    def prepare(self, source: Source) -> dict[str, Tensor]:
        """Field low_resolution: [B, 3, h, w], uint8 or float in [-1, 1]; absent: made from the pixels.

        Field noise_level: integer [B]; absent: random for a picture made here, otherwise 20.
        """
        given = "low_resolution" in source.conditions
        picture = _unit_range(source.require("low_resolution")) if given else self._shrink(source)
        if not self.config.max_noise_level:
            return {"picture": picture}
        level = self._noise_level(source, given)
        signal = self.signal.to(source.device)[level].view(-1, 1, 1, 1)
        noise = normal(source.seed, source.ordinals, Purpose.LOW_RESOLUTION_NOISE, tuple(picture.shape[1:]))
        return {"picture": signal.sqrt() * picture + (1 - signal).sqrt() * noise, "level": level}

    def _shrink(self, source: Source) -> Tensor:
        pixels = source.require_pixels("low_resolution").float()
        if self.config.degradation == "bicubic":
            return shrink_bicubic(pixels, self.config.factor)
        return shrink_degraded(
            pixels,
            self.config.factor,
            seed=source.seed,
            ordinals=source.ordinals,
            noise_purpose=self.noise_purpose,
        )

    def _noise_level(self, source: Source, given: bool) -> Tensor:
        highest = self.config.max_noise_level
        if "noise_level" in source.conditions:
            return source.require("noise_level").to(torch.int64).reshape(len(source)).clamp(0, highest - 1)
        if given:
            return torch.full((len(source),), min(SAMPLING_NOISE_LEVEL, highest - 1), device=source.device)
        return randint(source.seed, source.ordinals, Purpose.LOW_RESOLUTION_LEVEL, highest)


class NoisedPicture(TrainedPart):
    """Picture and noise level as they are; nothing to train."""

    def forward(self, inputs: dict[str, Tensor], drop: Tensor) -> Conditioning:
        """See TrainedPart."""
        picture = replace_dropped(inputs["picture"], 0.0, drop)
        return Conditioning(concat=picture, class_labels=inputs.get("level"))


def noise_level_alphas_cumprod(config: LowResolutionConfig) -> Tensor:
    """Signal power by noise level, float32 [noise_num_timesteps]; linear in sqrt(beta), as the upscaler's."""
    start, end = config.noise_beta_start**0.5, config.noise_beta_end**0.5
    # On the CPU whatever the default device is: the same numbers everywhere.
    betas = torch.linspace(start, end, config.noise_num_timesteps, dtype=torch.float64, device="cpu") ** 2
    return torch.cumprod(1 - betas, dim=0).float()


def shrink_bicubic(pixels: Tensor, factor: int) -> Tensor:
    """[B, 3, H, W] in [-1, 1] -> [B, 3, H / factor, W / factor], antialiased, on 8-bit levels."""
    return quantise(_resize(pixels, factor, "bicubic"))


def shrink_degraded(
    pixels: Tensor, factor: int, *, seed: int, ordinals: Tensor, noise_purpose: int
) -> Tensor:
    """The same shape, after blur, a random interpolation, noise and JPEG compression.

    In the spirit of the light variant of BSRGAN (Zhang et al. 2021) that LDM's super-resolution model was
    trained with: anisotropic Gaussian blur half of the time, one of three interpolations, grey or coloured
    noise, JPEG at quality 80 to 95. Every choice is a function of (seed, ordinal); the noise itself is drawn
    under `noise_purpose`.
    """
    draws = uniform(seed, ordinals, Purpose.DEGRADATION, (8,)).unbind(1)  # 8 x [B]
    blurred = _blur(pixels, draws[0], draws[1], draws[2], factor)
    pixels = _where(draws[3] < 0.5, blurred, pixels)
    # All three are computed and one is chosen, so that no draw has to travel to the host.
    mode = (draws[4] * 3).floor()
    small = _resize(pixels, factor, "bicubic")
    small = _where(mode == 1, _resize(pixels, factor, "bilinear"), small)
    small = _where(mode == 2, F.avg_pool2d(pixels, factor), small)
    noise = normal(seed, ordinals, noise_purpose, tuple(small.shape[1:]))
    noise = _where(draws[5] < 0.5, noise[:, :1].expand_as(noise), noise)
    sigma = 2.0 * _between(draws[6], *NOISE_SIGMA)  # the range [-1, 1] is twice as long
    small = quantise(small + noise * sigma.view(-1, 1, 1, 1))
    return quantise(jpeg(small, _between(draws[7], *JPEG_QUALITY)))


def quantise(pixels: Tensor) -> Tensor:
    """Round to the 256 levels of an 8-bit picture, in [-1, 1]."""
    return to_unit_range(to_bytes(pixels))


def jpeg(pixels: Tensor, quality: Tensor) -> Tensor:
    """Loss of baseline JPEG with 4:2:0 chroma, at `quality` [B] in 1 .. 100, without entropy coding.

    [B, 3, H, W] in [-1, 1] -> the same. Runs on the device of the pictures.
    """
    height, width = pixels.shape[2:]
    padded = F.pad(pixels, (0, -width % 16, 0, -height % 16), mode="replicate")
    red, green, blue = ((padded + 1) * 127.5).unbind(1)
    luma = 0.299 * red + 0.587 * green + 0.114 * blue
    chroma = torch.stack([(blue - luma) * 0.564, (red - luma) * 0.713], dim=1)  # Cb and Cr, around 0
    luma = _quantise_blocks(luma.unsqueeze(1) - 128, quantisation_steps(LUMINANCE, quality)) + 128
    chroma = _quantise_blocks(F.avg_pool2d(chroma, 2), quantisation_steps(CHROMINANCE, quality))
    chroma = F.interpolate(chroma, scale_factor=2.0, mode="bilinear", align_corners=False)
    blue_difference, red_difference = chroma.unbind(1)
    luma = luma.squeeze(1)
    red = luma + 1.403 * red_difference
    green = luma - 0.344 * blue_difference - 0.714 * red_difference
    blue = luma + 1.773 * blue_difference
    decoded = torch.stack([red, green, blue], dim=1)[:, :, :height, :width] / 127.5 - 1
    return decoded.clamp(-1, 1)


def quantisation_steps(table: tuple[tuple[int, ...], ...], quality: Tensor) -> Tensor:
    """A table of annex K at `quality` [B] in 1 .. 100, as libjpeg scales it: [B, 8, 8]."""
    percent = torch.where(quality < 50, (5000 / quality).floor(), 200 - 2 * quality).view(-1, 1, 1)
    base = torch.tensor(table, dtype=quality.dtype, device=quality.device)
    return ((base * percent + 50) / 100).floor().clamp(1, 255)


def _unit_range(picture: Tensor) -> Tensor:
    return to_unit_range(picture) if picture.dtype == torch.uint8 else picture.float()


def _quantise_blocks(plane: Tensor, steps: Tensor) -> Tensor:
    """Round the DCT coefficients of 8 x 8 blocks to multiples of steps [B, 8, 8]; [B, C, H, W] -> same."""
    rows = torch.arange(8, dtype=plane.dtype, device=plane.device)
    # Orthonormal DCT-II: row k holds cos((2 n + 1) k pi / 16).
    transform = torch.cos((2 * rows + 1) * rows.unsqueeze(1) * (math.pi / 16)) / 2
    transform[0] /= math.sqrt(2.0)
    steps = steps.view(-1, 1, 1, 1, 8, 8)
    blocks = plane.unflatten(3, (-1, 8)).unflatten(2, (-1, 8)).transpose(3, 4)  # [B, C, H/8, W/8, 8, 8]
    coefficients = (transform @ blocks @ transform.T / steps).round() * steps
    decoded = transform.T @ coefficients @ transform
    return decoded.transpose(3, 4).flatten(4, 5).flatten(2, 3)


def _blur(pixels: Tensor, first: Tensor, second: Tensor, turn: Tensor, factor: int) -> Tensor:
    """Gaussian blur with its own two widths and angle per sample; all arguments but factor are draws [B]."""
    batch, channels = pixels.shape[:2]
    low, high = (bound * factor / 4 for bound in BLUR_SIGMA)
    sigma = torch.stack([_between(first, low, high), _between(second, low, high)], dim=1)  # [B, 2]
    angle = turn * math.pi
    axis = torch.arange(-BLUR_RADIUS, BLUR_RADIUS + 1, dtype=pixels.dtype, device=pixels.device)
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    cos, sin = angle.cos().view(-1, 1, 1), angle.sin().view(-1, 1, 1)
    along = (x * cos + y * sin) / sigma[:, 0].view(-1, 1, 1)
    across = (y * cos - x * sin) / sigma[:, 1].view(-1, 1, 1)
    kernel = torch.exp(-0.5 * (along**2 + across**2))
    kernel = kernel / kernel.sum(dim=(1, 2), keepdim=True)  # [B, k, k]
    weight = kernel.repeat_interleave(channels, dim=0).unsqueeze(1)
    padded = F.pad(pixels, (BLUR_RADIUS,) * 4, mode="replicate")
    # One group per sample and channel, so each sample meets its own kernel only.
    blurred = F.conv2d(padded.flatten(0, 1).unsqueeze(0), weight, groups=batch * channels)
    return blurred.view_as(pixels)


def _resize(pixels: Tensor, factor: int, mode: str) -> Tensor:
    size = (pixels.shape[2] // factor, pixels.shape[3] // factor)
    return F.interpolate(pixels, size=size, mode=mode, antialias=True)


def _between(draw: Tensor, low: float, high: float) -> Tensor:
    return low + (high - low) * draw


def _where(chosen: Tensor, first: Tensor, second: Tensor) -> Tensor:
    return torch.where(chosen.view(-1, 1, 1, 1), first, second)
