"""What `ldm checkpoint list` and `verify` show, and how every command finds a checkpoint."""

from __future__ import annotations

from dataclasses import dataclass

from data_pipeline.errors import Failure
from data_pipeline.storage.files import exists, read_bytes, read_head
from data_pipeline.storage.large import checksum_bytes
from data_pipeline.storage.listing import look_up
from data_pipeline.storage.urls import join
from trainer.checkpoint.catalogue import (
    CheckpointHandle,
    checkpoints_url,
    folder_name,
    open_checkpoint,
    problems,
    steps_found,
)
from trainer.checkpoint.manifest import MANIFEST_NAME, BadManifest
from trainer.config.checks_validation import TRAINING_LOSS
from trainer.config.run import ConfigError


@dataclass(frozen=True)
class CheckpointRow:
    """One line of `ldm checkpoint list`."""

    step: int
    url: str
    complete: bool
    """Whether it was committed and its manifest is readable; `verify` reads the rest."""
    problem: str
    """Why not, empty when complete."""
    num_bytes: int = 0
    num_shards: int = 0
    """Ranks that wrote it."""
    networks: tuple[str, ...] = ()
    averages: tuple[str, ...] = ()
    loss: float | None = None
    """Recent training loss; None where it is not known."""
    best_metric: str = TRAINING_LOSS
    """What the run keeps its best checkpoints by."""
    merit: float | None = None
    """Its value; None where it is not known."""


@dataclass(frozen=True)
class Verification:
    """One line of `ldm checkpoint verify`."""

    step: int
    url: str
    problems: tuple[str, ...]
    """Empty: every byte is as it was written."""


def list_checkpoints(run_dir: str) -> list[CheckpointRow]:
    """The checkpoints of a run, newest first.

    Raises:
        ConfigError: there is none, not even one that is incomplete.
    """
    folder = checkpoints_url(run_dir)
    steps = steps_found(folder)
    if not steps:
        raise ConfigError(
            f"there is no checkpoint in {run_dir}; name a run folder (run_dir of a configuration)."
        )
    return [_row(step, join(folder, folder_name(step))) for step in steps]


def verify(source: str, step: int | None = None) -> list[Verification]:
    """Read a checkpoint, or all of a run, in full and compare checksums; newest first.

    Raises:
        ConfigError: there is nothing to verify.
    """
    if exists(join(source, MANIFEST_NAME)):
        return [_verify(source)]
    folder = checkpoints_url(source)
    steps = [found for found in steps_found(folder) if step is None or found == step]
    if not steps:
        raise ConfigError(_nothing(source, step))
    return [_verify(join(folder, folder_name(found))) for found in steps]


def find_checkpoint(source: str, step: int | None = None) -> CheckpointHandle:
    """The checkpoint in a run folder (of `step`, or the newest that is complete), or at its own URL.

    Raises:
        ConfigError: there is none.
    """
    if exists(join(source, MANIFEST_NAME)):
        return _open(source)
    folder = checkpoints_url(source)
    if step is not None:
        if step not in steps_found(folder):
            raise ConfigError(_nothing(source, step))
        return _open(join(folder, folder_name(step)))
    for found in steps_found(folder):
        try:
            return open_checkpoint(join(folder, folder_name(found)))
        except BadManifest:
            continue
    raise ConfigError(_nothing(source, step))


def fingerprint(source: str, step: int | None = None) -> str:
    """Tells the weights of a run at a step from others of the same name: of a run that was rewound, say.

    Of an exported file it knows header and size alone.
    """
    if source.endswith(".safetensors"):
        head = read_head(source, 8)
        header = read_head(source, 8 + int.from_bytes(head, "little"))
        return checksum_bytes(header, str(look_up(source).size).encode())[:16]
    return checksum_bytes(read_bytes(join(find_checkpoint(source, step).url, MANIFEST_NAME)))[:16]


def _open(url: str) -> CheckpointHandle:
    try:
        return open_checkpoint(url)
    except BadManifest as error:
        raise ConfigError(f"the checkpoint {url} cannot be used: {error}; choose another step.") from error


def _row(step: int, url: str) -> CheckpointRow:
    try:
        manifest = open_checkpoint(url).manifest
    except (BadManifest, Failure) as error:
        return CheckpointRow(step, url, complete=False, problem=str(error))
    kinds = [kind for kinds in manifest.kinds.values() for kind in kinds]
    return CheckpointRow(
        step,
        url,
        complete=True,
        problem="",
        num_bytes=manifest.num_bytes,
        num_shards=len(manifest.shards),
        networks=tuple(manifest.shapes),
        averages=tuple(kind.removeprefix("ema.") for kind in kinds if kind.startswith("ema.")),
        loss=manifest.loss,
        best_metric=manifest.best_metric,
        merit=manifest.value(manifest.best_metric),
    )


def _verify(url: str) -> Verification:
    step = int(url.rstrip("/").rpartition("step_")[2] or 0)
    try:
        handle = open_checkpoint(url)
    except BadManifest as error:
        return Verification(step, url, (str(error),))
    return Verification(handle.step, url, tuple(problems(handle, handle.manifest.files)))


def _nothing(source: str, step: int | None) -> str:
    what = "a complete checkpoint" if step is None else f"a checkpoint of step {step}"
    return f"there is no {what.removeprefix('a ')} in {source}; name a run folder or a checkpoint's folder."
