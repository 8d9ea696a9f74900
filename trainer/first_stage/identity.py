"""No first stage at all: diffusion in pixel space (f = 1 in the paper's tables)."""

from __future__ import annotations

from torch import Tensor

from trainer.first_stage.base import FirstStage


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
