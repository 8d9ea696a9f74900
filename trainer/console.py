"""What the commands and the ranks write to the terminal: output, lines by `logging`, and progress bars."""

from __future__ import annotations

import logging
import os
import sys
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from tqdm import tqdm

LEVEL_VARIABLE = "LDM_LOG_LEVEL"
LOG_FILE_INTERVAL_S = 30.0
LOG_FILE_LINE = "{desc}: {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}{postfix}]\n"
_QUIET = ("DeepSpeed", "botocore", "aiobotocore", "s3fs", "fsspec", "urllib3", "httpx")
"""Libraries whose INFO lines would bury ours."""


def _beside_bars(stream: TextIO) -> AbstractContextManager[None]:
    """Inside, a bar on the terminal makes room for what this stream shows there; one in a log file stays."""
    bars = sys.modules.get("tqdm")  # most commands never draw one
    if bars is None or not (stream.isatty() and sys.stderr.isatty()):
        return nullcontext()
    aside: AbstractContextManager[None] = bars.tqdm.external_write_mode(file=stream)
    return aside


def say(line: str) -> None:
    """A command's own output, on stdout, at once."""
    with _beside_bars(sys.stdout):
        sys.stdout.write(line + "\n")
        sys.stdout.flush()


class _BesideBars(logging.StreamHandler[Any]):
    """A line never ends up behind a bar that stands on the terminal: the bar steps aside for it."""

    def emit(self, record: logging.LogRecord) -> None:
        with _beside_bars(self.stream):
            super().emit(record)


def configure_logging(prefix: str = "") -> None:
    """One line per record on stderr, `prefix` in front; the level comes from LDM_LOG_LEVEL (INFO)."""
    level = os.environ.get(LEVEL_VARIABLE, "INFO").upper()
    known = level in logging.getLevelNamesMapping()
    level, asked = level if known else "INFO", level
    logging.basicConfig(level=level, format=f"{prefix}%(levelname)s %(message)s", handlers=[_BesideBars()])
    for name in _QUIET:
        logging.getLogger(name).setLevel(logging.WARNING)
    if not known:
        logging.warning("%s=%s is no level; set it to DEBUG, INFO, WARNING or ERROR", LEVEL_VARIABLE, asked)


def progress_bar(
    total: int | None,
    unit: str,
    title: str,
    *,
    initial: int = 0,
    smoothing: float = 0.3,
    disable: bool = False,
) -> tqdm[Any]:
    """A bar on stderr that moves on a terminal; in a log file, a line every half minute.

    Args:
        total: None where nobody knows.
        initial: how many were done before.
        smoothing: of the rate, from 0 (the mean so far) to 1 (the newest).
        disable: on ranks other than 0.
    """
    from tqdm import tqdm

    switch: dict[str, Any] = {"disable": True} if disable else {}  # else TQDM_DISABLE decides
    terminal = sys.stderr.isatty()
    return tqdm(
        total=total,
        initial=initial,
        unit=unit,
        desc=title,
        smoothing=smoothing,
        dynamic_ncols=terminal,
        bar_format=None if terminal else LOG_FILE_LINE,
        mininterval=0.5 if terminal else LOG_FILE_INTERVAL_S,
        maxinterval=10.0 if terminal else LOG_FILE_INTERVAL_S,
        **switch,
    )
