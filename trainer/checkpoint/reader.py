"""Reading a checkpoint into whatever this rank owns now, at any world size and ZeRO stage."""

from __future__ import annotations

import torch
from torch import Tensor

from data_pipeline.storage import join
from trainer.checkpoint.catalogue import CheckpointHandle
from trainer.checkpoint.layout import BYTES_PER_ELEMENT, Piece, Span, Table, overlaps
from trainer.checkpoint.storage import read_ranges
from trainer.config.run import ConfigError

_READ_BYTES = 64 << 20


def check_shapes(handle: CheckpointHandle, engine: str, shapes: dict[str, tuple[int, ...]]) -> None:
    """Raises ConfigError, naming the first parameters that differ, unless the network is the stored one."""
    stored = handle.manifest.shapes.get(engine)
    if stored is None:
        raise ConfigError(
            f"the checkpoint {handle.url} has no network {engine!r}, only "
            f"{', '.join(handle.manifest.shapes)}; use its configuration, or another run_dir."
        )
    if stored == shapes:
        return
    differences = [
        f"{name} is {_dimensions(stored.get(name))} there and {_dimensions(shapes.get(name))} here"
        for name in [*shapes, *(name for name in stored if name not in shapes)]
        if stored.get(name) != shapes.get(name)
    ]
    more = f" and {len(differences) - 3} more" if len(differences) > 3 else ""
    raise ConfigError(
        f"the checkpoint {handle.url} is of another architecture: {'; '.join(differences[:3])}{more}. "
        "Use its configuration, or another run_dir."
    )


def _dimensions(shape: tuple[int, ...] | None) -> str:
    return "absent" if shape is None else "[" + ", ".join(map(str, shape)) + "]"


@torch.no_grad()
def read_into(
    handle: CheckpointHandle, engine: str, kind: str, spans: list[Span], targets: list[Tensor]
) -> None:
    """Fill fp32 tensors [numel of each span] with the stored elements, reading only what overlaps."""
    tables: list[Table] = [shard[engine] for shard in handle.manifest.tables]
    pieces = overlaps(spans, tables)
    for shard in sorted({piece.shard for piece in pieces}):
        _read_shard(handle, engine, kind, [p for p in pieces if p.shard == shard], targets)


def _read_shard(
    handle: CheckpointHandle, engine: str, kind: str, pieces: list[Piece], targets: list[Tensor]
) -> None:
    shard = pieces[0].shard
    plan = handle.manifest.plan(shard)
    base = len(plan.header()) + plan.offset_of(engine, kind)
    runs = _merged(pieces)
    bounds = [
        (
            base + run[0].source * BYTES_PER_ELEMENT,
            base + (run[-1].source + run[-1].numel) * BYTES_PER_ELEMENT,
        )
        for run in runs
    ]
    url = join(handle.url, handle.manifest.shards[shard].name)
    for run, data in zip(runs, read_ranges(url, bounds), strict=True):
        values = torch.frombuffer(bytearray(data), dtype=torch.float32)
        for piece in run:
            first = piece.source - run[0].source
            target = targets[piece.target][piece.offset : piece.offset + piece.numel]
            target.copy_(values[first : first + piece.numel])


def _merged(pieces: list[Piece]) -> list[list[Piece]]:
    """Pieces grouped into runs without a gap, of about _READ_BYTES at most, and split to that size."""
    limit = _READ_BYTES // BYTES_PER_ELEMENT
    runs: list[list[Piece]] = []
    for whole in pieces:
        for first in range(0, whole.numel, limit):
            numel = min(limit, whole.numel - first)
            piece = Piece(whole.shard, whole.source + first, whole.target, whole.offset + first, numel)
            last = runs[-1][-1] if runs else None
            adjoining = last is not None and last.source + last.numel == piece.source
            if adjoining and piece.source + numel - runs[-1][0].source <= limit:
                runs[-1].append(piece)
            else:
                runs.append([piece])
    return runs
