"""Bytes that ranks send in an optimizer step of four micro-batches: counted, planned and ideal."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.collective_calls import IDEAL_BYTES
from tests.integration.ranks import run_ranks
from tests.integration.traffic_ranks import ACCUMULATION
from trainer.config.run import Config
from trainer.config.training import DistributedConfig
from trainer.planning.machine import machine
from trainer.planning.speed import collectives

ZERO_1: dict[str, Any] = {"zero_stage": 1, "precision": "bf16"}
CASES: list[dict[str, Any]] = [
    {"engine": "torch", "zero_stage": 0, "precision": "bf16"},
    {"zero_stage": 0, "precision": "bf16"},
    ZERO_1,
    ZERO_1 | {"reduce_precision": "bf16"},
    ZERO_1 | {"overlap_communication": True, "reduce_bucket_elements": 9_300},
    {"zero_stage": 1, "precision": "fp32"},
    {"zero_stage": 2, "precision": "bf16"},
    {"zero_stage": 2, "precision": "bf16", "reduce_precision": "bf16"},
    {"engine": "fsdp", "precision": "bf16"},
    {"engine": "fsdp", "precision": "bf16", "reduce_precision": "bf16"},
    {"engine": "fsdp", "precision": "fp32"},
    {"engine": "fsdp", "precision": "bf16", "shard_ranks": 2},
]


def planned(case: dict[str, Any], ranks: int) -> float:
    """Bytes per parameter that `ldm plan` counts with."""
    parameters, place = 1_000_000, machine("h100", ranks)
    exchanged = collectives(Config(distributed=DistributedConfig(**case)), parameters, ACCUMULATION, place)
    passes = {"all-reduce": 2, "reduce-scatter": 1, "all-gather": 1}
    moved = 0.0
    for each in exchanged:
        taking_part = each.ranks or ranks
        moved += passes[each.kind] * each.num_bytes * each.times * (taking_part - 1) / taking_part
    return moved / parameters


@pytest.mark.parametrize("world_size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_ranks_send_what_the_plan_says(world_size: int) -> None:
    by_rank = run_ranks("tests/integration/traffic_ranks.py:bytes_of_a_step", world_size, {"cases": CASES})
    for results in by_rank:
        for case, found in zip(CASES, results, strict=True):
            assert found["bytes"] == pytest.approx(planned(case, world_size), rel=0.02), (case, found)
        share = (world_size - 1) / world_size
        plain, rounded, overlapped = (results[CASES.index(case)] for case in CASES[2:5])
        assert plain["bytes"] == pytest.approx(1.5 * IDEAL_BYTES * share, rel=0.02)
        assert rounded["bytes"] == pytest.approx(IDEAL_BYTES * share, rel=0.02)
        # Once a step and not a micro-batch, in one bucket or four; of four, three leave before the first
        # layer's gradient is whole.
        assert plain["calls"]["reduce_scatter_tensor"] == 1
        assert overlapped["calls"]["reduce_scatter_tensor"] == 4
        fsdp = results[CASES.index({"engine": "fsdp", "precision": "bf16"})]
        assert fsdp["calls"]["reduce_scatter_single"] == fsdp["calls"]["all_gather_single"] == 1
        assert (plain["while backward ran"], overlapped["while backward ran"]) == (0, 3)


@pytest.mark.parametrize("world_size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_adafactor_adds_two_reductions_of_its_sums(world_size: int) -> None:
    """However many parameters, buckets and ranks there are; none where every rank has whole gradients."""
    buckets = ZERO_1 | {"reduce_bucket_elements": 9_300}
    cut: list[dict[str, Any]] = [buckets, {"zero_stage": 2}, {"zero_stage": 3}, {"engine": "fsdp"}]
    whole: list[dict[str, Any]] = [{"zero_stage": 0}]
    if world_size == 4:
        cut, whole = [buckets, {"engine": "fsdp", "shard_ranks": 2}], [{"engine": "fsdp", "shard_ranks": 1}]
    cases = [*cut, *whole]
    both = [case | {"optimizer": name} for case in cases for name in ("adamw", "adafactor")]
    by_rank = run_ranks("tests/integration/traffic_ranks.py:bytes_of_a_step", world_size, {"cases": both})
    layers, width = 4, 96
    floats = layers * (width + width + width) + 2 * (2 * layers)  # rows, columns, biases; two sizes of each
    for results in by_rank:
        for number, case in enumerate(cases):
            adamw, adafactor = results[2 * number : 2 * number + 2]
            more = {
                name: count - adamw["calls"].get(name, 0)
                for name, count in adafactor["calls"].items()
                if count != adamw["calls"].get(name, 0)
            }
            assert more == ({"all_reduce": 2} if case in cut else {}), case
            moved = (adafactor["bytes"] - adamw["bytes"]) * layers * (width + 1) * width
            expected = 2 * 4 * floats * (world_size - 1) / world_size if case in cut else 0
            assert moved == pytest.approx(expected, abs=8), case
