"""Reading a checkpoint into whatever this rank owns now, at any world size and ZeRO stage."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from data_pipeline.storage.large import read_ranges
from data_pipeline.storage.urls import join
from trainer.checkpoint.catalogue import CheckpointHandle
from trainer.checkpoint.layout import (
    BYTES_PER_ELEMENT,
    FROZEN,
    MASTER,
    CopyPiece,
    Span,
    index_shards,
    overlaps,
)
from trainer.config.io import config_from_dict
from trainer.config.run import ConfigError
from trainer.distributed.lora import adapted, merge
from trainer.weights import check_fit

_READ_BYTES = 64 << 20
_GAP_BYTES = 1 << 20
"""What is read in vain rather than asked for around: as much as comes in while a request waits."""
_LISTED = 3  # every rank says it


def check_shapes(handle: CheckpointHandle, engine: str, shapes: dict[str, tuple[int, ...]]) -> None:
    """Raises ConfigError, naming the first parameters that differ, unless the network is the stored one."""
    stored = handle.manifest.shapes.get(engine)
    if stored is None:
        raise ConfigError(
            f"the checkpoint {handle.url} has no network {engine!r}, only "
            f"{', '.join(handle.manifest.shapes)}; use its configuration, or another run_dir."
        )
    remedy = "Use its configuration, or another run_dir."
    check_fit(shapes, stored, f"the checkpoint {handle.url}", remedy, listed=_LISTED)


class EngineReader:
    """Reads the flat tensors of one engine of one checkpoint."""

    def __init__(self, handle: CheckpointHandle, engine: str) -> None:
        self._handle = handle
        self._engine = engine
        self._index = index_shards([shard[engine] for shard in handle.manifest.tables])

    @torch.no_grad()
    def read_into(self, kind: str, spans: Sequence[Span], targets: Sequence[Tensor]) -> None:
        """Fill fp32 tensors [numel of each span] with the stored elements, reading only those."""
        pieces = overlaps(spans, self._index)
        for shard in sorted({piece.shard for piece in pieces}):
            own = [piece for piece in pieces if piece.shard == shard]
            _read_shard(self._handle, self._engine, kind, own, targets)

    def whole(self, kind: str, names: Sequence[str]) -> dict[str, Tensor]:
        """Whole parameters, fp32, on the CPU."""
        shapes = self._handle.manifest.shapes[self._engine]
        tensors = {name: torch.empty(shapes[name]) for name in names}
        spans = [Span(name, 0, tensor.numel()) for name, tensor in tensors.items()]
        self.read_into(kind, spans, [tensor.view(-1) for tensor in tensors.values()])
        return tensors


class NetworkReader:
    """Reads whole parameters of the network that a run averages, trained or not, with adapters merged."""

    def __init__(self, handle: CheckpointHandle, state: Mapping[str, Any]) -> None:
        """`state` is that of the checkpoint."""
        engine = str(state["averaged"])
        self._trained = EngineReader(handle, engine)
        shapes = handle.manifest.shapes
        self._frozen_shapes = shapes.get(FROZEN, {})
        self._frozen = EngineReader(handle, FROZEN) if self._frozen_shapes else None
        lora = config_from_dict(state["config"]).lora
        self._scale = 1.0 if lora is None else lora.scale
        self._adapted = adapted(shapes[engine])
        adapters = {each for both in self._adapted.values() for each in both}
        own = {name: shape for name, shape in shapes[engine].items() if name not in adapters}
        self.shapes = own | self._frozen_shapes

    def whole(self, kind: str, names: Sequence[str]) -> dict[str, Tensor]:
        """fp32, on the CPU; what is frozen is its own average."""
        return self.merged(names, lambda trained: self._trained.whole(kind, trained))

    def merged(
        self, names: Sequence[str], read: Callable[[list[str]], dict[str, Tensor]]
    ) -> dict[str, Tensor]:
        """The same with what is trained, adapters too, from elsewhere: `read` gives these by their names."""
        adapters = {name: self._adapted[name] for name in names if name in self._adapted}
        own = [name for name in names if name not in self._frozen_shapes]
        trained = read([*own, *(each for both in adapters.values() for each in both)])
        frozen = [name for name in names if name in self._frozen_shapes]
        found = {name: trained[name] for name in own}
        found |= self._frozen.whole(MASTER, frozen) if self._frozen is not None else {}
        for name, (down, up) in adapters.items():
            found[name] = merge(found[name], trained[down], trained[up], self._scale)
        return found

    def adapters(self, kind: str) -> dict[str, tuple[Tensor, Tensor]]:
        """(A [r, in], B [out, r]) by the name of the weight that they adapt, B times its scale."""
        wanted = [each for both in self._adapted.values() for each in both]
        found = self._trained.whole(kind, wanted)
        return {name: (found[down], found[up] * self._scale) for name, (down, up) in self._adapted.items()}


def _read_shard(
    handle: CheckpointHandle, engine: str, kind: str, pieces: list[CopyPiece], targets: Sequence[Tensor]
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


def _merged(pieces: list[CopyPiece]) -> list[list[CopyPiece]]:
    """Pieces grouped into runs with small gaps at most, of about _READ_BYTES at most, and split to that size.

    Under ZeRO-3 each parameter is cut by itself: a resume on 504 ranks of what 512 wrote finds its elements
    in two neighbouring pieces of every parameter, a few kilobytes each.
    """
    limit, gap = _READ_BYTES // BYTES_PER_ELEMENT, _GAP_BYTES // BYTES_PER_ELEMENT
    runs: list[list[CopyPiece]] = []
    for whole in pieces:
        for first in range(0, whole.numel, limit):
            numel = min(limit, whole.numel - first)
            piece = CopyPiece(whole.shard, whole.source + first, whole.target, whole.offset + first, numel)
            last = runs[-1][-1] if runs else None
            near = last is not None and piece.source - (last.source + last.numel) <= gap
            if near and piece.source + numel - runs[-1][0].source <= limit:
                runs[-1].append(piece)
            else:
                runs.append([piece])
    return runs
