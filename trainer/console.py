"""What the commands and the ranks write to the terminal through `logging`."""

from __future__ import annotations

import logging
import os

LEVEL_VARIABLE = "LDM_LOG_LEVEL"
_QUIET = ("DeepSpeed", "botocore", "aiobotocore", "s3fs", "fsspec", "urllib3", "httpx")
"""Libraries whose INFO lines would bury ours."""


def configure_logging(prefix: str = "") -> None:
    """One line per record on stderr, `prefix` in front; the level comes from LDM_LOG_LEVEL (INFO)."""
    level = os.environ.get(LEVEL_VARIABLE, "INFO")
    logging.basicConfig(level=level, format=f"{prefix}%(levelname)s %(message)s")
    for name in _QUIET:
        logging.getLogger(name).setLevel(logging.WARNING)
