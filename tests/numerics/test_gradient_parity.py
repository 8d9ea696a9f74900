"""Every engine computes the gradients of one fp32 process: ZeRO 0-3, 1-4 ranks, accumulation, reuse.

DeepSpeed has shipped releases whose gradients were silently wrong in just such corners; a pinned version is
no evidence, this is. Adam hides a wrong scale from the weights, so the first moment after one step, which is
the clipped gradient itself, and the norm before clipping are compared, too.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.integration.ranks import run_ranks
from tests.numerics.parity_ranks import (
    CONDITIONER_RATE,
    OPTIMIZER,
    STEPS,
    reference,
    two_rates_network,
)

ENGINES = [("torch", 0), ("deepspeed", 0), ("deepspeed", 1), ("deepspeed", 2), ("deepspeed", 3), ("fsdp", 1)]
TOLERANCE = {"fp32": 2e-6, "bf16": 2e-2}
"""Of the norm, relative. A rank or a micro-batch that is left out changes it by 6 % or more."""


ELEMENTWISE = {"fp32": 1e-5, "bf16": 6e-2}
"""Of the largest element of a parameter's gradient."""


def case(
    engine: str, stage: int, accumulation: int, precision: str = "fp32", compile: bool = False
) -> dict[str, Any]:
    return {
        "engine": engine,
        "zero_stage": stage,
        "accumulation": accumulation,
        "precision": precision,
        "compile": compile,
    }


def check(cases: list[dict[str, Any]], world_size: int) -> None:
    by_rank = run_ranks("tests/numerics/parity_ranks.py:run_cases", world_size, {"cases": cases})
    truth = reference()
    for number, settings in enumerate(cases):
        tolerance = TOLERANCE[settings["precision"]]
        for results in by_rank:
            assert results[number]["norms"] == pytest.approx(truth["norms"], rel=tolerance), settings
        # bf16 rounding can turn the sign of a tiny gradient, and with it a whole Adam step.
        quantities = ("first_moment", "weights") if settings["precision"] == "fp32" else ("first_moment",)
        for quantity in quantities:
            found = by_rank[0][number][quantity]
            assert found.keys() == truth[quantity].keys()
            for name, values in truth[quantity].items():
                expected, actual = torch.tensor(values), torch.tensor(found[name])
                error = float((actual - expected).abs().max() / expected.abs().max())
                assert error < ELEMENTWISE[settings["precision"]], (settings, quantity, name, error)


@pytest.mark.parametrize("world_size", [1, 2])
def test_engines_match_one_process(world_size: int) -> None:
    exact = [case(*engine, accumulation) for engine in ENGINES for accumulation in (1, 4)]
    rounded = [case(*engine, 4, "bf16") for engine in ENGINES] if world_size == 2 else []
    ways = ({"overlap": True}, {"reduce_precision": "bf16"}, {"overlap": True, "reduce_precision": "bf16"})
    rounded += [case("deepspeed", stage, 4, "bf16") | way for stage in (1, 2) for way in ways]
    rounded.append(case("fsdp", 1, 4, "bf16") | ways[1])
    check(exact + rounded, world_size)


def test_three_ranks_match_one_process() -> None:
    """Of 16 samples they have 6, 5 and 5, in one pass of 6 or three of 2: with rows that weigh nothing."""
    exact = [case(*engine, accumulation) for engine in ENGINES for accumulation in (1, 3)]
    check(exact + [case(*engine, 3, "bf16") for engine in ENGINES], world_size=3)


@pytest.mark.parametrize("world_size", [1, 2, pytest.param(4, marks=pytest.mark.slow)])
def test_muon_under_every_engine_is_torchs_muon_and_adamw(world_size: int) -> None:
    """With matrices that lie on two ranks, or on those of two nodes; weights agree to its bf16."""
    engines = [engine for engine in ENGINES if engine[1] < 3]
    precisions = ("fp32", "bf16") if world_size == 2 else ("fp32",)
    cases = [case(*engine, 1, p) | {"optimizer": "muon"} for engine in engines for p in precisions]
    if world_size == 4:
        cases = [case("fsdp", 1, 1) | {"optimizer": "muon", "shard_ranks": cut} for cut in (1, 2, 4)]
    by_rank = run_ranks("tests/numerics/parity_ranks.py:run_cases", world_size, {"cases": cases})
    truth, plain = reference("muon"), reference()
    for number, settings in enumerate(cases):
        found, exact = by_rank[0][number], settings["precision"] == "fp32"
        assert found["norms"] == pytest.approx(truth["norms"], rel=1e-4 if exact else 2e-2), settings
        for name, values in truth["weights"].items():
            expected, actual = torch.tensor(values), torch.tensor(found["weights"][name])
            error = float((actual - expected).abs().max() / expected.abs().max())
            assert error < (2e-3 if exact else 0.1), (settings, name, error)
            if name in ("block.0.weight", "block.2.weight", "head.weight"):
                assert (expected - torch.tensor(plain["weights"][name])).abs().max() > 1e-2


@pytest.mark.parametrize("world_size", [1, 2, pytest.param(4, marks=pytest.mark.slow)])
def test_adafactor_under_every_engine_is_torchs(world_size: int) -> None:
    """With matrices that lie on two ranks, or cut one by one (ZeRO-3), or on those of two nodes."""
    cases = [case(*engine, 1) | {"optimizer": "adafactor"} for engine in ENGINES]
    if world_size == 2:
        cases += [case(*engine, 2, "bf16") | {"optimizer": "adafactor"} for engine in ENGINES]
    if world_size == 4:
        cases = [case("fsdp", 1, 1) | {"optimizer": "adafactor", "shard_ranks": cut} for cut in (1, 2, 4)]
    by_rank = run_ranks("tests/numerics/parity_ranks.py:run_cases", world_size, {"cases": cases})
    truth = reference("adafactor")
    for number, settings in enumerate(cases):
        found, exact = by_rank[0][number], settings["precision"] == "fp32"
        assert found["norms"] == pytest.approx(truth["norms"], rel=1e-5 if exact else 2e-2), settings
        for name, values in truth["weights"].items():
            expected, actual = torch.tensor(values), torch.tensor(found["weights"][name])
            error = float((actual - expected).abs().max() / expected.abs().max())
            assert error < (2e-6 if exact else 0.1), (settings, name, error)


def test_nodes_of_two_ranks_match_one_process() -> None:
    """FSDP cuts within a node and replicates across: 2 x 2 ranks, and nodes of one."""
    exact = [
        case("fsdp", 1, accumulation) | {"shard_ranks": cut} for accumulation in (1, 4) for cut in (1, 2)
    ]
    rounded = [
        case("fsdp", 1, 4, "bf16") | {"shard_ranks": 2, "reduce_precision": p} for p in ("fp32", "bf16")
    ]
    check(exact + rounded, 4)


@pytest.mark.parametrize("again", [False, True], ids=["kept", "recomputed"])
def test_a_unet_cut_block_by_block_trains_as_the_whole(again: bool) -> None:
    function = "tests/numerics/parity_ranks.py:train_unet"
    plain, cut = (
        run_ranks(function, 2, {"engine": engine, "activation_checkpointing": again})
        for engine in ("torch", "fsdp")
    )
    for wanted, found in zip(plain, cut, strict=True):
        assert found == pytest.approx(wanted, rel=2e-6)


def test_adapters_train_alike_under_every_engine() -> None:
    pytest.importorskip("peft")
    cases = [(*engine, "fp32") for engine in ENGINES]
    cases += [("deepspeed", 1, "bf16"), ("fsdp", 1, "bf16")]
    function = "tests/numerics/parity_ranks.py:train_adapters"
    ((truth,),) = run_ranks(function, 1, {"cases": cases[:1]})
    for of_rank in run_ranks(function, 2, {"cases": cases}):
        for case, found in zip(cases, of_rank, strict=True):
            assert found == pytest.approx(truth, rel=2e-5 if case[2] == "fp32" else 5e-2), case


def test_conditioners_have_a_rate_of_their_own_under_every_engine() -> None:
    """As torch's AdamW with two groups; a bf16 step is of the rate's size, whichever way it goes."""
    network = two_rates_network()
    groups: list[dict[str, Any]] = [{"params": list(network.get_submodule("conditions").parameters())}]
    groups[0]["lr"] = CONDITIONER_RATE
    groups.append({"params": [p for n, p in network.named_parameters() if not n.startswith("conditions.")]})
    optimizer = torch.optim.AdamW(groups, lr=OPTIMIZER.learning_rate, weight_decay=OPTIMIZER.weight_decay)
    for step in range(STEPS):
        x = torch.randn(4, 5, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        network(x).square().sum(1).mean().backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), OPTIMIZER.max_grad_norm)
        optimizer.step()

    cases = [(*engine, "fp32") for engine in ENGINES] + [("deepspeed", 1, "bf16")]
    found = run_ranks("tests/numerics/parity_ranks.py:train_two_rates", 2, {"cases": cases})[0]
    started = dict(two_rates_network().named_parameters())
    for case, weights in zip(cases, found, strict=True):
        for name, wanted in network.named_parameters():
            actual = torch.tensor(weights[name]).view(wanted.shape)
            if case[2] == "fp32":
                torch.testing.assert_close(
                    actual, wanted.detach(), rtol=1e-5, atol=1e-6, msg=str((case, name))
                )
            rate = CONDITIONER_RATE if name.startswith("conditions.") else OPTIMIZER.learning_rate
            moved = float((actual - started[name].detach()).abs().max())
            assert 1.5 * rate < moved < 3.5 * rate, (case, name)


def test_a_closed_engine_lets_go_of_its_memory() -> None:
    """Of 1 MB of weights, with gradients and moments beside them. ZeRO-3 does not: phases refuse it."""
    engines = [engine for engine in ENGINES if engine[1] < 3]
    cases = [(*engine, precision) for precision in ("fp32", "bf16") for engine in engines]
    (found,) = run_ranks("tests/numerics/parity_ranks.py:close_engines", 1, {"cases": cases})
    for case, left in zip(cases, found, strict=True):
        assert left[2] - left[0] < 1e5, (case, left)


@pytest.mark.slow
def test_four_ranks_match_one_process() -> None:
    check(
        [
            case(*engine, accumulation, precision)
            for engine in ENGINES
            for accumulation in (1, 4)
            for precision in ("fp32", "bf16")
        ],
        world_size=4,
    )


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 2])
def test_compiled_engines_match_one_process(world_size: int) -> None:
    check([case(*engine, 2, compile=True) for engine in ENGINES if engine[0] != "fsdp"], world_size)
