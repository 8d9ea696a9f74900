"""What every first stage has in common: latent normalisation, tiles, chunks and the training forward."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor, nn

from trainer.config.models import FirstStageConfig

LATENT_BUFFERS = ("latent_shift", "latent_scale")
OVERLAP = 0.25
"""Share of a tile's edge that neighbouring tiles have in common (at least)."""


class FirstStage(nn.Module, ABC):
    """An autoencoder between pixels in -1 .. 1 and normalised latents.

    Latents of the second stage are (z - latent_shift) * latent_scale. Both are buffers that stay
    float32 whatever the weights are cast to, because bf16 would round the scale by up to 0.4 %.

    One that can be trained defines `training_outputs`. Trained weights are those of its constructor; a
    learned log variance of the reconstruction error is added to any of them by `learn_logvar`.
    """

    trainable: ClassVar[bool] = True
    """Whether stage=autoencoder can train it."""
    gaussian: ClassVar[bool] = False
    """The posterior is a Gaussian, drawn with noise, and the training loss sums over a sample's elements as
    its KL term does. Otherwise the posterior is a point and the loss a mean over elements."""
    latent_shift: Tensor
    """float32 [z], the mean to take away"""
    latent_scale: Tensor
    """float32 [z], one over the standard deviation"""
    statistics_measured: bool = False
    """The statistics belong to the weights: measured on them, or given with them. Otherwise they are initial
    values, or older than the weights, and no second stage may be trained on them."""

    def __init__(self, config: FirstStageConfig) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("latent_shift", torch.zeros(config.channels))
        self.register_buffer("latent_scale", torch.ones(config.channels))
        self.logvar: nn.Parameter | None = None

    def learn_logvar(self, initial: float) -> None:
        """Train a log variance of the reconstruction error along with the weights; it is never exported."""
        # One element, not a 0-d tensor, which DeepSpeed cannot broadcast.
        self.logvar = nn.Parameter(torch.tensor([initial]))

    @abstractmethod
    def encode_whole(self, pixels: Tensor) -> Tensor:
        """`encode` of whole images, all at once."""

    @abstractmethod
    def decode_whole(self, z: Tensor) -> Tensor:
        """Pixels of unnormalised latents, whole images, all at once."""

    @abstractmethod
    def sample(self, encoded: Tensor, noise: Tensor | None) -> Tensor:
        """Unnormalised latents z [B, z, h, w], float32, from `encode`'s result.

        `noise` is standard normal [B, z, h, w]; None gives the mode.
        """

    @abstractmethod
    def second_moment(self, encoded: Tensor) -> tuple[Tensor, Tensor]:
        """E[z] and E[z**2] per element over the posterior, float32 [B, z, h, w] each."""

    def training_outputs(self, pixels: Tensor, noise: Tensor | None) -> dict[str, Tensor]:
        """One pass from pixels [B, 3, H, W] to everything that the loss reads; `noise` as for `sample`.

        "reconstruction" [B, 3, H, W]; "features", the detached input of the last layer at the same height
        and width (for the adaptive weight); and what the latents cost: "kl" [B], or 0-d "codebook" and
        "commitment" with int64 "indices", or nothing.
        """
        raise NotImplementedError(f"{type(self).__name__} has nothing to train")

    def forward(self, pixels: Tensor, noise: Tensor | None) -> dict[str, Tensor]:
        """`training_outputs`, and 0-d "logvar" where it is learned."""
        outputs = self.training_outputs(pixels, noise)
        if self.logvar is not None:
            # Through the forward, not read beside it, so that sharding engines see it being used.
            outputs["logvar"] = self.logvar.float().sum()
        return outputs

    def encode(self, pixels: Tensor) -> Tensor:
        """pixels [B, 3, H, W] in -1 .. 1 -> what the encoder knows about z.

        The KL stage gives mean and log variance, [B, 2z, h, w]; the others give z, [B, z, h, w],
        which for the VQ stage is not yet quantised.
        """
        factor = self.config.downsampling
        assert pixels.shape[-2] % factor == 0, (pixels.shape, factor)
        assert pixels.shape[-1] % factor == 0, (pixels.shape, factor)
        return self._apply_bounded(self.encode_whole, pixels, divide=True)

    def latents(self, pixels: Tensor, noise: Tensor | None) -> Tensor:
        """Normalised latents for the second stage, float32 [B, z, h, w]; noise None gives the mode."""
        return self.latents_of(self.moments(pixels), noise)

    def moments(self, pixels: Tensor) -> Tensor:
        """`encode` of pixels in -1 .. 1 in the range that the encoder is shown: what a cache may keep."""
        if self.config.input_range == "0..1":
            pixels = (pixels + 1) / 2
        return self.encode(pixels)

    @property
    def moments_channels(self) -> int:
        """Channels of `moments`: mean and log variance of a Gaussian posterior, else z."""
        return self.config.channels * (2 if self.gaussian else 1)

    def latents_of(self, moments: Tensor, noise: Tensor | None) -> Tensor:
        """Normalised latents drawn from `moments`, float32 [B, z, h, w]; noise None gives the mode."""
        return self.normalise(self.sample(moments, noise))

    def decode(self, latents: Tensor) -> Tensor:
        """Normalised latents [B, z, h, w] -> pixels [B, 3, H, W], float32, about -1 .. 1."""
        z = self.denormalise(latents)
        pixels = self._apply_bounded(self.decode_whole, z, divide=False).float()
        return pixels * 2 - 1 if self.config.input_range == "0..1" else pixels

    def normalise(self, z: Tensor) -> Tensor:
        """(z - shift) * scale, in float32."""
        shift, scale = self.latent_shift, self.latent_scale
        return (z.float() - shift.view(1, -1, 1, 1)) * scale.view(1, -1, 1, 1)

    def denormalise(self, latents: Tensor) -> Tensor:
        """The inverse of `normalise`, in float32."""
        shift, scale = self.latent_shift, self.latent_scale
        return latents.float() / scale.view(1, -1, 1, 1) + shift.view(1, -1, 1, 1)

    def set_latent_statistics(self, shift: Tensor, scale: Tensor) -> None:
        """Store the normalisation that belongs to the present weights; both [z]."""
        assert shift.shape == scale.shape == self.latent_shift.shape, (shift.shape, scale.shape)
        self.latent_shift.copy_(shift)
        self.latent_scale.copy_(scale)
        self.statistics_measured = True

    def _apply_bounded(self, function: Callable[[Tensor], Tensor], x: Tensor, *, divide: bool) -> Tensor:
        """Bound memory as configured: at most `encode_chunk` images and `tile_pixels` edges per call."""
        factor, tile = self.config.downsampling, self.config.tile_pixels // self.config.downsampling
        limit = tile * factor if divide else tile
        if tile == 0 or max(x.shape[-2:]) <= limit:
            return apply_in_chunks(function, x, self.config.encode_chunk)
        return apply_in_chunks(
            lambda part: apply_in_tiles(function, part, tile=tile, scale=factor, divide=divide),
            x,
            self.config.encode_chunk,
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FirstStage:
        """Move and cast as usual, but keep the latent statistics in float32 (see the class)."""
        kept = {name: getattr(self, name) for name in LATENT_BUFFERS}
        super()._apply(fn, recurse)
        for name, value in kept.items():
            device = getattr(self, name).device
            if value.is_meta and device.type != "meta":  # materialised by to_empty: back to identity
                value = torch.full(value.shape, float(name == "latent_scale"))
            setattr(self, name, value.to(device))
        return self


def apply_in_chunks(function: Callable[[Tensor], Tensor], x: Tensor, chunk: int) -> Tensor:
    """`function(x)`, at most `chunk` images per call; 0: all at once."""
    if chunk == 0 or x.shape[0] <= chunk:
        return function(x)
    return torch.cat([function(part) for part in x.split(chunk)])


def tile_starts(length: int, tile: int) -> list[int]:
    """First index of each tile along one edge; every tile is whole and the last one ends at the edge.

    Consecutive tiles share at least OVERLAP of a tile, as evenly as whole cells allow.
    """
    if length <= tile:
        return [0]
    stride = max(1, int(tile * (1 - OVERLAP)))
    count = -(-(length - tile) // stride) + 1
    return [(i * (length - tile)) // (count - 1) for i in range(count)]


def apply_in_tiles(
    function: Callable[[Tensor], Tensor], x: Tensor, *, tile: int, scale: int, divide: bool
) -> Tensor:
    """Blend `function` of overlapping tiles into one picture.

    Neighbouring tiles are faded into each other linearly over what they share. Normalisation and
    attention see one tile instead of the whole picture, so the result is close to the whole
    picture's, not equal.

    Args:
        function: [B, C, t, t] -> [B, C', t * scale, t * scale], or t / scale when `divide`.
        x: [B, C, H, W]; edges shorter than a tile are taken whole.
        tile: tile edge in the coarser of the two grids (latent cells).
        scale: pixels per latent cell.
        divide: True when the input is the finer grid (encoding).
    """
    fine, coarse = (scale, 1) if divide else (1, scale)  # factors of input and output over latent cells
    height, width = x.shape[-2] // fine, x.shape[-1] // fine  # in latent cells
    rows, columns = min(tile, height), min(tile, width)
    row_starts, column_starts = tile_starts(height, tile), tile_starts(width, tile)
    total: Tensor | None = None
    weights = x.new_zeros(height * coarse, width * coarse, dtype=torch.float32)
    for i, top in enumerate(row_starts):
        vertical = _ramp(row_starts, i, rows, coarse, x.device)
        for j, left in enumerate(column_starts):
            weight = vertical[:, None] * _ramp(column_starts, j, columns, coarse, x.device)
            part = x[..., top * fine : (top + rows) * fine, left * fine : (left + columns) * fine]
            result = function(part)
            if total is None:
                total = result.new_zeros(
                    *result.shape[:2], height * coarse, width * coarse, dtype=torch.float32
                )
            window = (
                slice(top * coarse, (top + rows) * coarse),
                slice(left * coarse, (left + columns) * coarse),
            )
            total[(..., *window)] += result.float() * weight
            weights[window] += weight
    assert total is not None
    return total / weights


def _ramp(starts: list[int], index: int, size: int, scale: int, device: torch.device) -> Tensor:
    """Weight of each output cell of tile `index`: 1, falling to nearly 0 where a neighbour takes over."""
    position = torch.arange(size * scale, device=device, dtype=torch.float32) + 0.5
    weight = torch.ones_like(position)
    if index > 0:
        shared = (starts[index - 1] + size - starts[index]) * scale
        weight = torch.minimum(weight, position / shared)
    if index < len(starts) - 1:
        shared = (starts[index] + size - starts[index + 1]) * scale
        weight = torch.minimum(weight, (size * scale - position) / shared)
    return weight
