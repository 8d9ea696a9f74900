"""Shard layout: a valid safetensors file, and overlaps that put every element in its place."""

from __future__ import annotations

import itertools
import json
import math

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

from trainer.checkpoint.layout import (
    CopyPiece,
    ShardPlan,
    Span,
    Table,
    index_shards,
    overlaps,
    tables_from_json,
    tables_to_json,
)
from trainer.checkpoint.reader import _merged


def test_header_makes_a_safetensors_file() -> None:
    plan = ShardPlan({"unet": (Span("a", 2, 3), Span("b", 0, 2))}, {"unet": ("master", "ema.decay")})
    values = torch.arange(10, dtype=torch.float32)
    tensors = safetensors.torch.load(plan.header() + values.numpy().tobytes())
    assert tensors["unet.master"].tolist() == [0, 1, 2, 3, 4]
    assert tensors["unet.ema.decay"].tolist() == [5, 6, 7, 8, 9]
    assert plan.data_bytes == 40
    assert plan.offset_of("unet", "ema.decay") == 20
    assert len(plan.header()) % 8 == 0
    with pytest.raises(KeyError):
        plan.offset_of("unet", "exp_avg")


def test_an_empty_share_is_a_valid_file() -> None:
    plan = ShardPlan({"unet": ()}, {"unet": ("master",)})
    assert safetensors.torch.load(plan.header())["unet.master"].numel() == 0


def test_tables_survive_json() -> None:
    tables: dict[str, Table] = {"a": (Span("x", 1, 2),), "b": ()}
    assert tables_from_json(json.loads(json.dumps(tables_to_json(tables)))) == tables


def cut(names: list[str], sizes: list[int], borders: list[int]) -> list[Table]:
    """All elements, end to end, cut at the borders; empty parts stay."""
    total = sum(sizes)
    edges = [0, *sorted(border % (total + 1) for border in borders), total]
    tables = []
    for first, last in itertools.pairwise(edges):
        spans, offset = [], 0
        for name, size in zip(names, sizes, strict=True):
            start, stop = max(first, offset), min(last, offset + size)
            if start < stop:
                spans.append(Span(name, start - offset, stop - start))
            offset += size
        tables.append(tuple(spans))
    return tables


@given(
    st.lists(st.integers(1, 20), min_size=1, max_size=6),
    st.lists(st.integers(0, 1000), max_size=5),
    st.lists(st.integers(0, 1000), max_size=5),
)
def test_any_cut_can_be_read_as_any_other(sizes: list[int], written: list[int], wanted: list[int]) -> None:
    names = [f"p{i}" for i in range(len(sizes))]
    truth = {name: np.arange(size) + 100 * i for i, (name, size) in enumerate(zip(names, sizes, strict=True))}
    shards = cut(names, sizes, written)
    flats = [
        np.concatenate([truth[s.name][s.start : s.start + s.numel] for s in table] or [np.empty(0)])
        for table in shards
    ]
    for table in cut(names, sizes, wanted):
        targets = [np.full(span.numel, -1) for span in table]
        for piece in overlaps(table, index_shards(shards)):
            source = flats[piece.shard][piece.source : piece.source + piece.numel]
            targets[piece.target][piece.offset : piece.offset + piece.numel] = source
        for span, target in zip(table, targets, strict=True):
            assert np.array_equal(target, truth[span.name][span.start : span.start + span.numel])


def test_missing_and_doubled_elements_are_refused() -> None:
    with pytest.raises(ValueError, match="3 of 4"):
        overlaps([Span("a", 0, 4)], index_shards([(Span("a", 0, 3),)]))
    with pytest.raises(ValueError, match="5 of 4"):
        overlaps([Span("a", 0, 4)], index_shards([(Span("a", 0, 3),), (Span("a", 2, 2),)]))


def test_the_example_in_the_module_is_true() -> None:
    shards = [(Span("v", 0, 10), Span("w", 0, 2)), (Span("w", 2, 8),)]
    index = index_shards(shards)
    assert index["w"] == [(0, 2, 0, 10), (2, 8, 1, 0)]
    assert overlaps([Span("w", 4, 4)], index) == [CopyPiece(shard=1, source=2, target=0, offset=0, numel=4)]


def zero3_tables(sizes: dict[str, int], ranks: int) -> list[Table]:
    """Each parameter cut by itself into equal parts, as ZeRO-3 does."""
    tables: list[list[Span]] = [[] for _ in range(ranks)]
    for name, size in sizes.items():
        part = math.ceil(size / ranks)
        for rank, start in enumerate(range(0, size, part)):
            tables[rank].append(Span(name, start, min(part, size - start)))
    return [tuple(table) for table in tables]


def test_other_ranks_read_neighbouring_pieces_at_once() -> None:
    """512 ranks wrote 700 parameters of 1.2 M elements; each of 504 asks for few ranges, not for 700."""
    sizes = {f"p{i}": 1_200_000 + 977 * i for i in range(700)}
    stored, wanted = zero3_tables(sizes, 512), zero3_tables(sizes, 504)
    index = index_shards(stored)
    for rank in (0, 251):
        pieces = overlaps(wanted[rank], index)
        assert len(pieces) > 700
        shards = {piece.shard for piece in pieces}
        runs = [run for shard in shards for run in _merged([p for p in pieces if p.shard == shard])]
        assert len(runs) <= len(shards) + 1
        assert sum(piece.numel for run in runs for piece in run) == sum(span.numel for span in wanted[rank])
        # What is read in vain is less than what the shards hold: the two neighbours whole, at most.
        read = sum(run[-1].source + run[-1].numel - run[0].source for run in runs)
        assert read <= len(shards) * sum(span.numel for span in stored[0])


def test_far_pieces_are_read_apart() -> None:
    near = [CopyPiece(0, 0, 0, 0, 10), CopyPiece(0, 1000, 1, 0, 10)]
    far = CopyPiece(0, 10**7, 2, 0, 10)
    assert _merged([*near, far]) == [near, [far]]
