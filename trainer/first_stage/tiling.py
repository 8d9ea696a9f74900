"""Apply an image-to-image network to overlapping tiles, or to a few images at a time."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

OVERLAP = 0.25
"""Share of a tile's edge that neighbouring tiles have in common (at least)."""


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
