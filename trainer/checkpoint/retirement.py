"""Old checkpoints go, beside training: what is not kept is listed with the commit and removed by a thread.

Removing is one request after another, and each may fail: a commit waits for them for a moment, as long as
they usually take, and no training step ever does. What fails is tried again in the background, which the log
says when it begins; what is left in the end is found again by the next commit.

Only files that were listed with the commit are removed, manifests first. A later attempt at a step has other
names, but for the manifest: so whoever writes one calls `spare` before, and waits only where a removal under
way is of the same step. A request that storage never answers holds no other commit up.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass

from data_pipeline.errors import Failure, UserError
from data_pipeline.storage.files import list_names, list_tree, remove_names
from data_pipeline.storage.large import abort_uploads
from data_pipeline.storage.retry import pause_before
from data_pipeline.storage.urls import join, name_of
from trainer.checkpoint.catalogue import (
    Learned,
    Retention,
    checkpoints_url,
    folder_name,
    snapshots_url,
    steps_to_retire,
    token_of,
)
from trainer.checkpoint.manifest import MANIFEST_NAME, Manifest

logger = logging.getLogger(__name__)

_GRACE_S = 3.0
"""How long a commit waits for removals, which usually take much less."""
_PATIENCE_S = 600.0
_LONGEST_PAUSE = 9
"""Position of the longest pause between two tries, of 20 s."""


@dataclass(frozen=True)
class Doomed:
    """Files of one checkpoint's folder."""

    url: str
    names: tuple[str, ...]


class Retirement:
    """The removals of one run, one set of them at a time."""

    def __init__(self) -> None:
        self._under_way: list[tuple[threading.Thread, frozenset[str]]] = []
        """Threads, and the folders that each removes; one that was stopped may still wait for an answer."""
        self._stop = threading.Event()
        self._learned = Learned()

    def begin(self, folder: str, newest: Manifest, retention: Retention, token: int = 0) -> None:
        """Remove what `newest`, just committed, leaves over; returns within seconds. Never raises.

        token: of this start of the run; what later starts have written is not its to remove.
        """
        self._stop.set()
        try:
            doomed = _doomed(folder, newest, retention, token, self._learned)
        except (OSError, ValueError, Failure) as error:
            # The new checkpoint counts; old ones that stay cost only space.
            logger.warning("old checkpoints in %s cannot be listed: %s", folder, error)
            return
        if not doomed:
            return
        self._stop = threading.Event()
        thread = threading.Thread(
            target=_remove, args=(folder, doomed, self._stop), name="old checkpoints", daemon=True
        )
        self._under_way = [each for each in self._under_way if each[0].is_alive()]
        self._under_way.append((thread, frozenset(each.url for each in doomed)))
        thread.start()
        thread.join(_GRACE_S)

    def spare(self, url: str) -> None:
        """Remove nothing more; of this checkpoint's folder nothing is under way, either, once it returns."""
        self._stop.set()
        for thread, folders in self._under_way:
            if url in folders:
                thread.join()

    def close(self) -> None:
        """Remove nothing more, and leave what is under way to itself."""
        self._stop.set()


def abort_dead_uploads(run_dir: str, token: int) -> None:
    """End what earlier starts of this run were uploading when they were killed. Never raises.

    token: of this start; whoever has a lower one may not commit any more.
    """
    for folder in (checkpoints_url(run_dir), snapshots_url(run_dir)):
        try:
            ended = abort_uploads(folder, lambda url: 0 < token_of(name_of(url)) < token)
        except Exception as error:  # noqa: BLE001 - without the permission, or a server without such a list
            logger.debug("unfinished uploads in %s are left as they are: %s", folder, error)
            return
        if ended:
            logger.info("%d uploads that were killed with an earlier start are ended in %s", ended, folder)


def _doomed(
    folder: str, newest: Manifest, retention: Retention, token: int, learned: Learned
) -> list[Doomed]:
    steps = steps_to_retire(folder, newest, retention, learned)
    urls = [join(folder, folder_name(step)) for step in steps]
    listed = [Doomed(url, tuple(list_tree(url, tries=1))) for url in urls]
    found = [each for each in listed if max(map(token_of, each.names), default=0) <= token]
    newest_url = join(folder, folder_name(newest.step))
    named = {MANIFEST_NAME, *(file.name for file in newest.files)}
    of_earlier_attempts = (name for name in list_names(newest_url) if name not in named)
    left = [name for name in of_earlier_attempts if token_of(name) <= token]
    return [*found, *([Doomed(newest_url, tuple(left))] if left else [])]


def _remove(folder: str, doomed: Sequence[Doomed], stop: threading.Event) -> None:
    tries, began = 0, time.monotonic()
    for each in doomed:
        # Without its manifest it no longer counts, whatever happens next.
        first = tuple(name for name in each.names if name == MANIFEST_NAME)
        for names in filter(None, (first, each.names)):
            while not stop.is_set():
                try:
                    remove_names(each.url, names, tries=1)
                    break
                except UserError as error:
                    logger.warning("old checkpoints in %s stay where they are: %s", folder, error)
                    return
                except Failure as error:
                    tries += 1
                    if time.monotonic() - began > _PATIENCE_S:
                        logger.warning("old checkpoints in %s stay until the next one: %s", folder, error)
                        return
                    if tries == 1:
                        what = "old checkpoints in %s cannot be removed; tried again beside training: %s"
                        logger.warning(what, folder, error)
                    stop.wait(pause_before(min(tries, _LONGEST_PAUSE)))
    if tries and not stop.is_set():
        logger.warning("old checkpoints in %s are removed, at try %d", folder, tries + 1)
