"""Grids of pictures with their captions, for people."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from data_pipeline.tools.lettering import Lettering

_SHEET_COLUMNS = 9
MAX_SHEET = _SHEET_COLUMNS * _SHEET_COLUMNS
"""Pictures in a contact sheet at most: what a person looks at, and a file that opens."""
_SHEET_PIXELS = 4096
"""Width of a contact sheet at most, where pictures are larger than a person needs them there."""


def contact_sheet(pictures: Sequence[Tensor], titles: Sequence[str]) -> bytes:
    """The first of a set at a glance: a PNG of up to MAX_SHEET of these uint8 [3, H, W]."""
    shown = min(len(pictures), MAX_SHEET)
    columns = min(shown, _SHEET_COLUMNS)
    made = torch.stack(list(pictures[:shown]))
    sheet = grid(made, tuple(titles[:shown]), columns, max_cell=_SHEET_PIXELS // columns)
    out = io.BytesIO()
    sheet.save(out, "PNG")
    return out.getvalue()


def grid(
    pixels: Tensor,
    captions: tuple[str, ...],
    columns: int,
    min_cell: int = 128,
    max_cell: int | None = None,
) -> Image.Image:
    """uint8 [N, 3, H, W] and N captions -> one picture; small images are enlarged to `min_cell`.

    Those with an edge above `max_cell` are shrunk to it.
    """
    n, _, height, width = pixels.shape
    enlarge = max(1, -(-min_cell // min(height, width)))
    cell_w, cell_h = width * enlarge, height * enlarge
    if max_cell is not None and max(cell_w, cell_h) > max_cell:
        shrink = max_cell / max(cell_w, cell_h)
        cell_w, cell_h = max(1, round(cell_w * shrink)), max(1, round(cell_h * shrink))
    resampling = Image.Resampling.NEAREST if cell_w >= width else Image.Resampling.BOX
    lettering = Lettering(12)
    lines = [lettering.lines(caption, cell_w, 4) for caption in captions]
    text_h = 15 * max((len(item) for item in lines), default=0) + (4 if any(lines) else 0)
    rows = -(-n // columns)
    sheet = Image.new("RGB", (columns * (cell_w + 4) + 4, rows * (cell_h + text_h + 4) + 4), "white")
    draw = ImageDraw.Draw(sheet)
    arrays = pixels.cpu().permute(0, 2, 3, 1).numpy().astype(np.uint8)
    for i, array in enumerate(arrays):
        left = 4 + (i % columns) * (cell_w + 4)
        top = 4 + (i // columns) * (cell_h + text_h + 4)
        picture = Image.fromarray(array).resize((cell_w, cell_h), resampling)
        sheet.paste(picture, (left, top))
        for j, line in enumerate(lines[i] if i < len(lines) else []):
            lettering.draw(draw, left, top + cell_h + 2 + 15 * j, line, fill="black")
    return sheet
