"""Reconstruct the average of any length, after the run, from stored snapshots (EDM2's post-hoc EMA).

The run needs ema.power_stds (two of them) and ema.snapshot_every.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from data_pipeline.storage.urls import join
from trainer.checkpoint.catalogue import (
    CheckpointHandle,
    folder_name,
    open_checkpoint,
    snapshots_url,
    steps_found,
)
from trainer.checkpoint.export import DTYPES, beside_weights, read_state, weights_file, write_parameters
from trainer.checkpoint.manifest import BadManifest
from trainer.checkpoint.reader import EngineReader, NetworkReader
from trainer.config.run import ConfigError
from trainer.ema import Profile, exponent_from_std, fit, power_profile

_PREFIX = "ema.power_"
_NEGLIGIBLE = 1e-6
EXAMPLE = "example: ldm ema s3://bucket/run s3://bucket/ema_0.07.safetensors --std 0.07"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """From which run, to where, which average."""
    parser.add_argument("source", metavar="RUN", help="run folder")
    parser.add_argument("destination", metavar="FILE", help="path or URL of the .safetensors file")
    parser.add_argument("--std", type=float, required=True, help="relative width of the average, e.g. 0.07")
    parser.add_argument("--step", type=int, help="end of the average (default: the newest snapshot)")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="fp32")


def run(args: argparse.Namespace) -> int:
    """Reconstruct and report."""
    made = reconstruct(args.source, args.destination, std=args.std, step=args.step, dtype=args.dtype)
    print(
        f"{made.destination}: {made.num_bytes / 1e6:.1f} MB, the average of relative width {made.std:g} at "
        f"step {made.step}, from {made.num_averages} stored ones (relative error {made.error:.2g})"
    )
    return 0


@dataclass(frozen=True)
class Reconstruction:
    """What was written."""

    destination: str
    std: float
    step: int
    num_averages: int
    """Stored averages that take part."""
    error: float
    """Distance of the fitted profile from the wanted one, relative to its norm."""
    num_bytes: int


def reconstruct(
    run_dir: str, destination: str, *, std: float, step: int | None = None, dtype: str = "fp32"
) -> Reconstruction:
    """Write the average of relative width `std` at `step` as one safetensors file, streamed.

    Args:
        run_dir: a run with ema.power_stds and ema.snapshot_every.
        std: relative width of the profile, as in ema.power_stds.
        step: end of the average; unset: the newest snapshot.

    Raises:
        ConfigError: too few snapshots, or a width or step that they cannot give; no destination.
    """
    destination = weights_file(destination)
    snapshots = _snapshots(run_dir)
    last = snapshots[0].step if step is None else step
    used = [snapshot for snapshot in snapshots if snapshot.step <= last]
    if not used:
        raise ConfigError(
            f"the first snapshot of {run_dir} is of step {snapshots[-1].step}; choose a later step."
        )
    if last > snapshots[0].step:
        raise ConfigError(
            f"the newest snapshot of {run_dir} is of step {snapshots[0].step}, and nothing says what came "
            f"until step {last}; choose an earlier --step, or leave it out."
        )
    try:
        wanted = Profile(exponent_from_std(std), last)
    except ValueError as problem:
        raise ConfigError(str(problem)) from problem
    stored = [(snapshot, kind, profile) for snapshot in used for kind, profile in _profiles(snapshot)]
    weights, error = fit([profile for _, _, profile in stored], wanted)
    newest = used[0]
    state = read_state(newest)
    engine = str(state["averaged"])
    readers = {snapshot.url: EngineReader(snapshot, engine) for snapshot in used}
    network = NetworkReader(newest, state)
    terms = [
        (readers[snapshot.url], kind, float(weight))
        for (snapshot, kind, _), weight in zip(stored, weights, strict=True)
        if abs(weight) > _NEGLIGIBLE
    ]
    small, metadata = beside_weights(newest, state, power_profile(std))
    num_bytes = write_parameters(
        destination,
        network.shapes,
        lambda names: network.merged(names, lambda trained: _combined(terms, trained)),
        small,
        metadata | {"step": str(last)},
        dtype,
    )
    return Reconstruction(destination, std, last, len(terms), error, num_bytes)


def _snapshots(run_dir: str) -> list[CheckpointHandle]:
    folder = snapshots_url(run_dir)
    found = []
    for step in steps_found(folder):
        try:
            snapshot = open_checkpoint(join(folder, folder_name(step)))
        except BadManifest:
            continue
        if _profiles(snapshot):  # earlier versions stored snapshots of nothing
            found.append(snapshot)
    if not found:
        raise ConfigError(
            f"{run_dir} has no snapshots; train with ema.power_stds=[0.05,0.1] and ema.snapshot_every set."
        )
    return found


def _profiles(snapshot: CheckpointHandle) -> list[tuple[str, Profile]]:
    kinds = [kind for kinds in snapshot.manifest.kinds.values() for kind in kinds if kind.startswith(_PREFIX)]
    widths = [float(kind.removeprefix(_PREFIX)) for kind in kinds]
    return [
        (kind, Profile(exponent_from_std(std), snapshot.step))
        for kind, std in zip(kinds, widths, strict=True)
    ]


def _combined(terms: Sequence[tuple[EngineReader, str, float]], names: list[str]) -> dict[str, Tensor]:
    total: dict[str, Tensor] = {}
    for reader, kind, weight in terms:
        for name, tensor in reader.whole(kind, names).items():
            # In fp64: coefficients of both signs cancel.
            term = tensor.to(torch.float64) * weight
            total[name] = term if name not in total else total[name] + term
    return {name: tensor.float() for name, tensor in total.items()}
