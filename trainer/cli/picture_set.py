"""A set of sampled pictures: a folder with its record, written as the pictures are made.

OUT/prompts.json           everything that the pictures are a function of; written first
OUT/pictures/00000.png ... in the order of the prompts, each with its own record as text
OUT/grid.png               the first of them at a glance
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from data_pipeline.storage.files import check_writable, write_bytes
from data_pipeline.storage.urls import join
from trainer.generation.store import GRID, PICTURES, begin_set, encode_png, require_same, what_is_there
from trainer.metrics.pictures import MAX_SHEET, contact_sheet


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
        self._record = json.loads(json.dumps(record))
        self._shared = {name: value for name, value in record.items() if not isinstance(value, list)}
        self._items = items
        self._shown: list[Tensor] = []
        former = None if overwrite else what_is_there(self.url)
        if former is not None:
            require_same(self.url, former, self._record)
        check_writable(self.url)

    def begin(self) -> None:
        """Write the record, and remove the pictures of a former set."""
        begin_set(self.url, self._record)

    def add(self, row: int, pictures: Tensor) -> None:
        """Write uint8 [B, 3, H, W]; `row` is the place of the first in the set."""
        for i, picture in enumerate(pictures.cpu(), row):
            data = encode_png(picture.permute(1, 2, 0).numpy(), self._shared, self._items[i])
            write_bytes(join(self.url, PICTURES, f"{i:05d}.png"), data)
            if i < MAX_SHEET:
                self._shown.append(picture)

    def finish(self, titles: tuple[str, ...]) -> str:
        """Write the grid; what was written, for people."""
        n, shown = len(titles), len(self._shown)
        write_bytes(join(self.url, GRID), contact_sheet(self._shown, titles))
        which = f" with the first {shown}" if shown < n else ""
        return f"{n} picture{'s' if n > 1 else ''} in {self.url}/{PICTURES}, {self.url}/{GRID}{which}"
