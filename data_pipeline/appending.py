"""Files of lines that are appended to and may have lost the end of the last one."""

from __future__ import annotations

import io
from pathlib import Path

_BLOCK_BYTES = 65_536


def cut_torn_line(path: Path) -> None:
    """Cut what a crash or a full disk left of the last line, so that the next gets its own."""
    if not path.exists():
        return
    with path.open("rb+") as file:
        size = position = file.seek(0, io.SEEK_END)
        tail = b""
        while position and b"\n" not in tail:
            block = min(_BLOCK_BYTES, position)
            position -= block
            file.seek(position)
            tail = file.read(block) + tail
        whole = position + tail.rfind(b"\n") + 1
        if whole < size:
            file.truncate(whole)
