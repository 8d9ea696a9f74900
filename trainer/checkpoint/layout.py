"""What a shard file holds: flat fp32 tensors of one rank, and the table that says where parameters lie.

The life of one fragment. Parameters v and w have 10 elements each; two ranks train them under ZeRO-1, which
lays them end to end and cuts: rank 0 owns v0 .. v9, w0 .. w1 and rank 1 the fragment w2 .. w9. Of rank 1:

    in its optimizer      master | w2 w3 w4 w5 w6 w7 w8 w9 |   and so exp_avg, exp_avg_sq and each average
    its table             Span(w, start 2, numel 8)            (`Engine.fragments` without the values)
    its shard             a safetensors header, with the table as JSON, then the flat tensors one by one:
                          unet.master | unet.exp_avg | unet.exp_avg_sq | unet.ema.decay

Later the run goes on under ZeRO-3 on three ranks, which cuts each parameter by itself: of w, rank 1 now owns
w4 .. w7. It takes all ranks' tables from the manifest, turns them around by parameter (`index_shards`), and
asks where its span lies (`overlaps`):

    Index[w]              (start 0, numel 2, shard 0, from element 10), (start 2, numel 8, shard 1, from 0)
    wanted                Span(w, start 4, numel 4)
    CopyPiece             shard 1, from element 2 of each flat tensor -> the local span from 0, 4 elements

Nothing is assembled whole: a rank fetches the byte ranges of its pieces, straight into its new fragments.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

BYTES_PER_ELEMENT = 4

MASTER = "master"
"""Kind of the fp32 master weights; others are Adam's moments and `ema.<profile>`."""


FROZEN = "frozen"
"""Stands in the place of an engine for parameters that are not trained: master weights alone."""

WHOLE = "whole_state"
"""`<engine>.whole_state` stands in the place of an engine for what every rank has whole of its optimizer."""


@dataclass(frozen=True)
class Span:
    """Elements [start, start + numel) of the flattened parameter `name`."""

    name: str
    start: int
    numel: int


Table = tuple[Span, ...]
"""Spans of one engine on one rank, in the order in which they lie in each flat tensor."""


@dataclass(frozen=True)
class ShardPlan:
    """The contents of one shard file, known before a byte is written.

    Each engine has one flat tensor per kind ("unet.master", "unet.exp_avg", "unet.ema.decay", ...),
    in which the spans of the engine's table follow each other.
    """

    tables: dict[str, Table]
    """By engine."""
    kinds: dict[str, tuple[str, ...]]
    """By engine, in the order in which they lie in the file."""

    def flat_numel(self, engine: str) -> int:
        """Elements of each of the engine's flat tensors."""
        return sum(span.numel for span in self.tables[engine])

    def tensors(self) -> Iterable[tuple[str, str, int]]:
        """(engine, kind, elements) of the flat tensors, in file order."""
        for engine, kinds in self.kinds.items():
            for kind in kinds:
                yield engine, kind, self.flat_numel(engine)

    @property
    def data_bytes(self) -> int:
        """Bytes after the header."""
        return BYTES_PER_ELEMENT * sum(numel for _, _, numel in self.tensors())

    def header(self) -> bytes:
        """The safetensors header of the file, its length field included."""
        entries: dict[str, object] = {
            "__metadata__": {
                "format": "latent-diffusion-trainer checkpoint shard 1",
                "fragments": json.dumps(tables_to_json(self.tables), separators=(",", ":")),
            }
        }
        offset = 0
        for engine, kind, numel in self.tensors():
            stop = offset + numel * BYTES_PER_ELEMENT
            entries[f"{engine}.{kind}"] = {"dtype": "F32", "shape": [numel], "data_offsets": [offset, stop]}
            offset = stop
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # the format wants the data 8-byte aligned
        return len(text).to_bytes(8, "little") + text

    @property
    def file_bytes(self) -> int:
        """Bytes of the whole file."""
        return len(self.header()) + self.data_bytes

    def offset_of(self, engine: str, kind: str) -> int:
        """Byte in the data section at which a flat tensor begins."""
        offset = 0
        for other_engine, other_kind, numel in self.tensors():
            if (other_engine, other_kind) == (engine, kind):
                return offset
            offset += numel * BYTES_PER_ELEMENT
        raise KeyError(f"{engine}.{kind}")


def tables_to_json(tables: dict[str, Table]) -> dict[str, list[list[object]]]:
    """Spans as [name, start, numel]."""
    return {engine: [[s.name, s.start, s.numel] for s in table] for engine, table in tables.items()}


def tables_from_json(values: dict[str, list[list[object]]]) -> dict[str, Table]:
    """The inverse of `tables_to_json`."""
    return {
        engine: tuple(Span(str(n), int(str(a)), int(str(c))) for n, a, c in spans)
        for engine, spans in values.items()
    }


@dataclass(frozen=True)
class CopyPiece:
    """A run of elements to copy from a flat tensor in a shard to a local span."""

    shard: int
    """Index of the shard file."""
    source: int
    """First element in the shard's flat tensor."""
    target: int
    """Index of the local span."""
    offset: int
    """First element in the local span."""
    numel: int


Index = dict[str, list[tuple[int, int, int, int]]]
"""By parameter: (start, numel, shard, first element in the shard's flat tensor)."""


def index_shards(shards: Sequence[Table]) -> Index:
    """Where the elements of each parameter of one engine lie."""
    index: Index = {}
    for shard, table in enumerate(shards):
        position = 0
        for span in table:
            index.setdefault(span.name, []).append((span.start, span.numel, shard, position))
            position += span.numel
    return index


def overlaps(wanted: Sequence[Span], index: Index) -> list[CopyPiece]:
    """Which elements of which shards make up the wanted spans, ordered by place in the shards.

    Raises:
        ValueError: the shards do not cover a wanted span exactly once.
    """
    pieces = []
    for target, span in enumerate(wanted):
        found = 0
        for start, numel, shard, position in index.get(span.name, []):
            first, last = max(start, span.start), min(start + numel, span.start + span.numel)
            if first < last:
                source = position + first - start
                pieces.append(CopyPiece(shard, source, target, first - span.start, last - first))
                found += last - first
        if found != span.numel:
            raise ValueError(f"{found} of {span.numel} elements of {span.name} are stored")
    return sorted(pieces, key=lambda piece: (piece.shard, piece.source))
