"""A set of sampled pictures: a folder with its record, written as the pictures are made.

OUT/prompts.json           everything that the pictures are a function of; written first
OUT/pictures/00000.png ... in the order of the prompts, each with its own record as text
OUT/grid.png               the first of them at a glance
"""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from data_pipeline.errors import NotFound
from data_pipeline.storage.files import check_writable, list_names, read_text, remove_names, write_bytes
from data_pipeline.storage.urls import join
from trainer.config.run import ConfigError
from trainer.generation.store import OURS, PARTS, PICTURES, RECORD
from trainer.metrics.pictures import MAX_SHEET, contact_sheet

GRID = "grid.png"
_MAY_DIFFER = ("versions",)
"""Of a set that is made again."""


class PictureSet:
    """Where the pictures of one record go; refuses a folder that holds others."""

    def __init__(
        self, out: str, record: dict[str, Any], items: Sequence[dict[str, Any]], *, overwrite: bool
    ) -> None:
        """A set that is not begun yet.

        Args:
            out: folder, any URL.
            record: what the pictures are a function of; lists hold what differs between them.
            items: the same of each picture alone.
            overwrite: whether another set may go.

        Raises:
            ConfigError: the folder holds another set, which may not go.
            UserError, RetryableFault: it cannot be written to.
        """
        self.url = out.rstrip("/") or out
        self._record = record
        self._shared = {name: value for name, value in record.items() if not isinstance(value, list)}
        self._items = items
        self._shown: list[Tensor] = []
        self._check(overwrite)
        check_writable(self.url)

    def begin(self) -> None:
        """Write the record, and remove the pictures of a former set."""
        for folder in (PICTURES, PARTS):
            remove_names(join(self.url, folder), self._former(folder))
        self._write(RECORD, json.dumps(self._record, indent=1, ensure_ascii=False).encode())

    def add(self, row: int, pictures: Tensor) -> None:
        """Write uint8 [B, 3, H, W]; `row` is the place of the first in the set."""
        for i, picture in enumerate(pictures.cpu(), row):
            text = PngInfo()
            text.add_text("prompt", self._items[i]["prompt"])
            text.add_text("ldm", json.dumps(self._shared | self._items[i], ensure_ascii=False))
            image = Image.fromarray(picture.permute(1, 2, 0).numpy())
            self._write(f"{PICTURES}/{i:05d}.png", _png(image, text))
            if i < MAX_SHEET:
                self._shown.append(picture)

    def finish(self, titles: tuple[str, ...]) -> str:
        """Write the grid; what was written, for people."""
        n, shown = len(titles), len(self._shown)
        self._write(GRID, contact_sheet(self._shown, titles))
        which = f" with the first {shown}" if shown < n else ""
        return f"{n} picture{'s' if n > 1 else ''} in {self.url}/{PICTURES}, {self.url}/{GRID}{which}"

    def _check(self, overwrite: bool) -> None:
        if overwrite:
            return
        try:
            former = json.loads(read_text(join(self.url, RECORD)))
        except NotFound:
            former = None
        except ValueError:  # not ours, or cut short
            former = {}
        if former is None and not self._former(PICTURES):
            return
        ours = json.loads(json.dumps(self._record))
        if not isinstance(former, dict) or _settled(former) != _settled(ours):
            raise ConfigError(
                f"{self.url} holds another set of pictures; choose another folder with --out, or give "
                "--overwrite to replace it."
            )

    def _former(self, folder: str) -> list[str]:
        return [name for name in list_names(join(self.url, folder)) if OURS.fullmatch(name)]

    def _write(self, name: str, data: bytes) -> None:
        write_bytes(f"{self.url}/{name}", data)


def _settled(record: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in record.items() if name not in _MAY_DIFFER}


def _png(image: Image.Image, text: PngInfo) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", pnginfo=text)
    return buffer.getvalue()
