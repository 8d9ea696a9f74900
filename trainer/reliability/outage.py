"""Storage that is away when a run starts again: the run waits for it."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable

from data_pipeline.config import DataConfig
from data_pipeline.errors import Failure, RetryableFault, Unreachable
from data_pipeline.storage.files import exists
from data_pipeline.storage.urls import folder_before_patterns, is_local

_LONGEST_WAIT_S = 600.0  # a rank that says nothing for 900 s while it starts counts as stuck
_PAUSE_S = 5.0

logger = logging.getLogger(__name__)


def wait_for_storage(run_dir: str, data: DataConfig) -> None:
    """Return when the remote folders of a run answer.

    Raises:
        RetryableFault: they do not, for as long as `data.patience_s` (ten minutes at most).
    """
    began = time.monotonic()
    for url in _remote_folders(run_dir, data):
        while not _answers(url):
            waited = time.monotonic() - began
            if waited > min(data.patience_s, _LONGEST_WAIT_S):
                raise RetryableFault(f"Storage has not answered for {waited:.0f} s at the start, last {url}.")
            logger.warning("storage does not answer since %.0f s: %s; waiting", waited, url)
            time.sleep(_PAUSE_S)


def _remote_folders(run_dir: str, data: DataConfig) -> Iterable[str]:
    patterns = [data.shards, *(source.shards for source in data.sources)]
    folders = [folder_before_patterns(pattern) for pattern in patterns if pattern]
    return [url for url in dict.fromkeys([run_dir, *folders]) if not is_local(url)]


def _answers(url: str) -> bool:
    try:
        exists(url)
    except Unreachable:
        return False
    except Failure:
        pass  # an answer, if a bad one: the run itself says what is wrong
    return True
