"""What a run has committed, seen from outside, and which of it is to be measured next.

Looking costs one listing per folder and the first bytes of the manifests that are new, or may still change:
a run that was rewound commits the same steps once more, with other weights and so another checksum.

    look   found                              due, newest     due, all
    1      100 a                              100 a           100 a
    2      100 a, 200 b, 300 c                300 c           200 b, then 300 c
    3      100 a, 200 d (rewound), 300 c      200 d           200 d
"""

from __future__ import annotations

import math
import re
from collections.abc import Container
from dataclasses import dataclass
from typing import Literal

from data_pipeline.errors import NotFound
from data_pipeline.storage.files import read_head
from data_pipeline.storage.urls import join
from trainer.checkpoint.catalogue import checkpoints_url, folder_name, snapshots_url, steps_found
from trainer.checkpoint.manifest import MANIFEST_NAME

Rule = Literal["newest", "all"]
_HEAD_BYTES = 64
"""Of a manifest, which begins with its checksum."""
_CHECKSUM = re.compile(rb'^\{"checksum":\s*"([0-9a-f]{16,})"')
_MAY_CHANGE = 2
"""Newest steps whose manifests are read again at each look."""


@dataclass(frozen=True, order=True)
class Sighting:
    """Something committed that has weights."""

    step: int
    checksum: str
    """Of its manifest: other weights at the same step have another."""
    url: str
    """Its folder."""
    snapshot: bool
    """Averages alone, kept for ever; else a whole checkpoint, which may be retired."""

    @property
    def key(self) -> tuple[int, str]:
        """By which it is known whether it was measured."""
        return self.step, self.checksum


class Lookout:
    """Remembers what was there before, so that each look is cheap."""

    def __init__(self, run_dir: str, *, snapshots: bool = True, every: int = 1) -> None:
        """`every`: only steps that are multiples of it, and the run's last."""
        self._folders = [(checkpoints_url(run_dir), False)]
        if snapshots:
            self._folders.append((snapshots_url(run_dir), True))
        self._every = every
        self._checksums: dict[str, str] = {}
        self._whole: dict[tuple[int, str], tuple[int, str]] = {}
        """Of a snapshot that was seen beside it, the checkpoint."""
        self._looks = 0
        self._first_seen: dict[tuple[int, str], int] = {}
        """Number of the look at which each became known."""

    def look(self, last_step: int | None = None) -> list[Sighting]:
        """What is committed now, by step; of a snapshot beside its checkpoint the checkpoint alone.

        last_step: of the run, where it is known.

        Raises:
            Failure: storage does not answer.
        """
        found: dict[int, Sighting] = {}
        for folder, snapshot in self._folders:
            last = math.inf if last_step is None else last_step
            steps = [step for step in steps_found(folder) if step % self._every == 0 or step >= last]
            for place, step in enumerate(steps):
                url = join(folder, folder_name(step))
                if place < _MAY_CHANGE or url not in self._checksums:
                    self._read(url)
                if url in self._checksums:
                    this = Sighting(step, self._checksums[url], url, snapshot)
                    if found.setdefault(step, this) is not this:
                        self._whole[this.key] = found[step].key
        self._looks += 1
        for each in found.values():
            self._first_seen.setdefault(each.key, self._looks)
        return sorted(found.values())

    def due(
        self, found: list[Sighting], measured: Container[tuple[int, str]], rule: Rule
    ) -> tuple[Sighting | None, list[Sighting]]:
        """What to measure next, and what is passed over for it (rule newest).

        A snapshot is not, whose checkpoint was: the run has removed that since.
        """
        left = [e for e in found if e.key not in measured and self._whole.get(e.key) not in measured]
        left.sort(key=lambda each: (self._first_seen[each.key], each.step))
        if not left:
            return None, []
        if rule == "all":
            return left[0], []
        latest = left.pop()
        newer = any(each.key in measured and each.step > latest.step for each in found)
        if newer and self._first_seen[latest.key] == 1:
            return None, [*left, latest]  # an earlier start of this watcher has passed over them
        return latest, left

    def beside(self, sighting: Sighting) -> str | None:
        """Checksum of the snapshot of a checkpoint's step, as it is now; None without one."""
        for folder, snapshot in self._folders:
            if snapshot and not sighting.snapshot:
                url = join(folder, folder_name(sighting.step))
                self._read(url)
                return self._checksums.get(url)
        return None

    def is_there(self, sighting: Sighting) -> bool:
        """Whether it can still be read, as the same."""
        self._read(sighting.url)
        return self._checksums.get(sighting.url) == sighting.checksum

    def _read(self, url: str) -> None:
        """The checksum of a manifest; forgets it where there is none."""
        try:
            head = read_head(join(url, MANIFEST_NAME), _HEAD_BYTES)
        except NotFound:
            self._checksums.pop(url, None)
            return
        match = _CHECKSUM.match(head)
        if match is None:  # torn; training passes it over as well
            self._checksums.pop(url, None)
        else:
            self._checksums[url] = match[1].decode()
