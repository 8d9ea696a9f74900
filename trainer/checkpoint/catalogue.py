"""Which checkpoints a run has, which are whole, and which are kept."""

from __future__ import annotations

import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from data_pipeline.errors import NotFound
from data_pipeline.storage.files import exists, list_names, modified_at, read_bytes
from data_pipeline.storage.large import measure
from data_pipeline.storage.urls import join
from trainer.checkpoint.manifest import MANIFEST_NAME, BadManifest, Manifest, StoredFile
from trainer.checkpoint.marks import marked_steps
from trainer.config.checks_validation import TRAINING_LOSS, better_high

_AT_ONCE = 16
"""Requests to storage."""


@dataclass(frozen=True)
class CheckpointHandle:
    """A committed checkpoint."""

    url: str
    """Its folder."""
    manifest: Manifest

    @property
    def step(self) -> int:
        """Optimizer steps made when it was taken."""
        return self.manifest.step


@dataclass(frozen=True)
class Retention:
    """Which checkpoints stay; the fields are those of CheckpointConfig."""

    keep_last: int
    keep_every: int
    keep_best: int
    best_metric: str = TRAINING_LOSS

    def is_for_ever(self, step: int) -> bool:
        """Whether a step's checkpoint stays, however many follow and however good it is."""
        return self.keep_every > 0 and step % self.keep_every == 0


def checkpoints_url(run_dir: str) -> str:
    """Folder of a run's checkpoints."""
    return join(run_dir, "checkpoints")


def snapshots_url(run_dir: str) -> str:
    """Folder of a run's stored averages, from which `ldm ema` reconstructs others."""
    return join(run_dir, "snapshots")


def folder_name(step: int) -> str:
    """Folder of one checkpoint inside it."""
    return f"step_{step:09d}"


def steps_found(folder: str) -> list[int]:
    """Steps with a folder, newest first, whether committed or not."""
    matches = (re.fullmatch(r"step_(\d{9,})", name) for name in list_names(folder))
    return sorted((int(match.group(1)) for match in matches if match), reverse=True)


def is_committed(folder: str, step: int) -> bool:
    """Whether there is a manifest, good or bad."""
    return exists(join(folder, folder_name(step), MANIFEST_NAME))


def open_checkpoint(url: str) -> CheckpointHandle:
    """The committed checkpoint in folder `url`. Raises BadManifest."""
    if not exists(join(url, MANIFEST_NAME)):
        raise BadManifest("it was never completed (there is no manifest)")
    return CheckpointHandle(url, Manifest.from_bytes(read_bytes(join(url, MANIFEST_NAME))))


def problems(handle: CheckpointHandle, files: tuple[StoredFile, ...]) -> list[str]:
    """What is wrong with these files of a checkpoint; reads them in full."""
    found = []
    for file in files:
        size, checksum = measure(join(handle.url, file.name), file.size)
        if size < 0:
            found.append(f"{file.name} is missing")
        elif size != file.size:
            found.append(f"{file.name} has {size} bytes instead of {file.size}")
        elif checksum != file.checksum:
            found.append(f"{file.name} does not match its checksum")
    return found


@dataclass
class Learned:
    """What a process knows of a run's checkpoints, so that it asks storage once."""

    merits: dict[tuple[str, float], float | None] = field(default_factory=dict)
    """Value of the metric that the best are kept by, by URL and when the manifest was written."""
    stay: dict[str, float] = field(default_factory=dict)
    """When the manifest was written, by URL of a checkpoint that retention keeps for ever."""


def steps_to_keep(merits: Mapping[int, float | None], retention: Retention) -> set[int]:
    """The newest `keep_last` (at least one), for ever the multiples of `keep_every`, the `keep_best` best.

    Args:
        merits: value of `best_metric` by committed step; None is never among the best, and of equal ones
            the newer is the better.
    """
    newest = sorted(merits, reverse=True)[: max(1, retention.keep_last)]
    for_ever = [step for step in merits if retention.is_for_ever(step)]
    sign = -1.0 if better_high(retention.best_metric) else 1.0
    ranked = sorted((sign * merit, -step) for step, merit in merits.items() if merit is not None)
    best = [-negative for _, negative in ranked[: retention.keep_best]]
    return {*newest, *for_ever, *best}


def token_of(name: str) -> int:
    """Fencing token in the name of a checkpoint's file: which start of a run wrote it; 0 without one."""
    match = re.search(r"\.(\d+)-[0-9a-f]+\.", name)
    return int(match[1]) if match else 0


def steps_to_retire(folder: str, newest: Manifest, retention: Retention, learned: Learned) -> list[int]:
    """Steps whose checkpoints are not kept, and those that older attempts left half-written; newest first.

    Args:
        newest: what has just been committed; folders of later steps are left alone.
        learned: what is known by now; added is what is learned here.

    Raises ValueError: what others want to keep is not understood (see `marks`).
    """
    steps = [step for step in steps_found(folder) if step <= newest.step]
    urls = {step: join(folder, folder_name(step)) for step in steps}
    committed = {step: (urls[step], at) for step, at in _committed(urls, newest, retention, learned.stay)}
    merits = learned.merits
    if retention.keep_best:
        # Each manifest is a request to storage and may be large: opened once, and only if it matters.
        if newest.step in committed:
            merits[committed[newest.step]] = newest.value(retention.best_metric)
        unknown = [key for key in committed.values() if key not in merits]
        merits.update({(url, at): _merit(url, retention.best_metric) for url, at in unknown})
    kept = steps_to_keep({step: merits.get(key) for step, key in committed.items()}, retention)
    marked = marked_steps(folder) if len(committed) > 1 else set()
    return [step for step in steps if step not in kept and step not in marked]


def _committed(
    urls: Mapping[int, str], newest: Manifest, retention: Retention, stay: dict[str, float]
) -> list[tuple[int, float]]:
    """(step, when its manifest was written) of those that have one, in the order of `urls`.

    Thousands may stay for ever: of these it is asked once, and again where a run that went back writes anew.
    """
    asked = [step for step in urls if step == newest.step or urls[step] not in stay]
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        times = dict(zip(asked, pool.map(lambda step: _committed_at(urls[step]), asked), strict=True))
    stay |= {urls[step]: at for step, at in times.items() if at is not None and retention.is_for_ever(step)}
    found = ((step, times.get(step, stay.get(url))) for step, url in urls.items())
    return [(step, at) for step, at in found if at is not None]


def _committed_at(url: str) -> float | None:
    try:
        return modified_at(join(url, MANIFEST_NAME))
    except NotFound:
        return None


def _merit(url: str, metric: str) -> float | None:
    try:
        return open_checkpoint(url).manifest.value(metric)
    except BadManifest:
        return None  # damaged: nothing to keep it for
