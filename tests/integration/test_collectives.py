"""Collectives over two real gloo ranks."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.integration.ranks import ROOT, run_ranks
from trainer.distributed import collectives
from trainer.exit_codes import StopRequest

RANKS = "tests/integration/collective_ranks.py"


def test_one_rank_makes_it_and_all_get_it_or_its_error(tmp_path: Path) -> None:
    good = run_ranks(f"{RANKS}:once", 2, {"marker": str(tmp_path / "good"), "fails": ""})
    assert good == [["made", "0\n"]] * 2
    bad = run_ranks(f"{RANKS}:once", 2, {"marker": str(tmp_path / "bad"), "fails": "mistake"})
    assert bad == [["NoShards: nothing there", "0\n"]] * 2
    bug = run_ranks(f"{RANKS}:once", 2, {"marker": str(tmp_path / "bug"), "fails": "bug"})
    assert bug == [["FatalFault: rank 0: KeyError: 'no such key'", "0\n"]] * 2


@pytest.mark.parametrize("fails", [False, True])
def test_nobody_gives_up_a_rank_whose_work_outlasts_the_timeout_and_tells_of_itself(fails: bool) -> None:
    found = "NoShards: nothing there" if fails else "made"
    assert run_ranks(f"{RANKS}:long_work", 3, {"fails": fails}) == [[found, True, True, [0, 1, 2]]] * 3


def test_the_strongest_request_any_flag_and_mean_losses_are_agreed_on() -> None:
    agreed = [
        ["NONE", False, False, []],
        ["NONE", True, False, ["1.5"]],
        ["STOPPED", False, True, ["0.25", "nan", "inf"]],
        ["PREEMPTED", True, True, ["0.6000000000000001"]],  # (0.1 + 1.1) / 2 in fp64
    ]
    assert run_ranks(f"{RANKS}:agree", 2) == [agreed, agreed]


@pytest.mark.parametrize("engine", ["torch", "deepspeed"])
def test_norms_by_layer_are_those_of_whole_tensors_whoever_owns_them(engine: str) -> None:
    alone = run_ranks(f"{RANKS}:norms", 1, {"engine": engine})[0]
    told = run_ranks(f"{RANKS}:norms", 2, {"engine": engine})
    assert told[0] == told[1]
    assert told[0] == pytest.approx(alone, rel=1e-5)
    for layer in ("body.0", "body.1", "head"):
        assert alone[f"layers/{layer}/weight"] == pytest.approx(alone[f"whole {layer}"], rel=1e-6)
        assert alone[f"layers/{layer}/gradient"] > 0


def test_fsdp_cuts_alike_on_nodes_that_are_not_equally_full() -> None:
    """Two ranks and one: each would cut for its own node, and wait for ranks that do not."""
    told = run_ranks(f"{RANKS}:cut_unevenly", 3)
    assert told == [[2, told[0][1], 5 * 7 + 7]] * 3


def test_one_rank_agrees_with_itself() -> None:
    agreed = collectives.agree(StopRequest.STOPPED, data_lost=True, save_failed=False, losses=[0.5])
    assert agreed == collectives.Agreed(StopRequest.STOPPED, True, False, (0.5,))


def test_ranks_that_are_no_power_of_two_know_the_same(tmp_path: Path) -> None:
    told = run_ranks(f"{RANKS}:gather", 5)
    assert told == [told[0]] * 5  # to the last bit of the mean
    ranks, lengths, flags, mean = told[0]
    assert ranks == [0, 1, 2, 3, 4]
    assert lengths == [0, 1000, 2000, 3000, 4000]
    assert flags == [True, False, True]
    assert float(mean) == pytest.approx(0.2)


@pytest.mark.parametrize("ranks", [2, 3, 4, 5, 7, 8, 12, 31, 64, 504])
def test_rounds_meet_and_grow_with_the_logarithm(ranks: int) -> None:
    """Played without processes: every message finds its receiver in order, and at the end all know all."""
    rounds = [list(collectives._rounds(rank, ranks)) for rank in range(ranks)]
    known = [{rank} for rank in range(ranks)]
    at = [0] * ranks
    while any(place < len(rounds[rank]) for rank, place in enumerate(at)):
        moved = False
        for rank in range(ranks):
            if at[rank] == len(rounds[rank]):
                continue
            partner, sends, receives = rounds[rank][at[rank]]
            if at[partner] < len(rounds[partner]) and rounds[partner][at[partner]] == (rank, receives, sends):
                mine, theirs = set(known[rank]), set(known[partner])
                known[rank] |= theirs if receives else set()
                known[partner] |= mine if sends else set()
                at[rank] += 1
                at[partner] += 1
                moved = True
        assert moved, "ranks wait for each other"
    assert known == [set(range(ranks))] * ranks
    assert max(map(len, rounds)) <= math.ceil(math.log2(ranks)) + 2


def test_a_run_asks_no_more_of_storage_and_peers_than_its_ranks_explain(tmp_path: Path) -> None:
    """The real run at two sizes (`benchmarks/scale.py`): what grows with the ranks, and what must not."""
    out = tmp_path / "scale.json"
    command = [sys.executable, "benchmarks/scale.py", "--ranks", "2,4", "--delay-ms", "0", "--out", str(out)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    table = {name: (values["2"], values["4"]) for name, values in json.loads(out.read_text()).items()}
    assert table["requests saves: PUT shard"] == (2, 4)
    late = [value for name, values in table.items() if name.endswith("again") for value in values]
    assert all(value < 1 for value in late)  # one or two writes of three saves, not every rank's
    assert table["requests saves: PUT manifest"] == (1, 1)
    assert "requests saves: GET manifest" not in table  # megabytes under ZeRO-3, which rank 0 knows already
    assert table["requests resume: GET state"][0] == table["requests resume: GET state"][1]
    assert table["requests resume: HEAD journal"] == (1, 1)
    # The first stage and a network to start from; where the run goes on, that one is not asked for.
    assert table["requests start: GET weights"] == (2, 2)
    assert table["requests resume: GET weights"] == (1, 1)
    assert table["bytes of weights at the start"][0] == table["bytes of weights at the start"][1]
    begun, resumed = table["bytes of weights at the start"][0], table["bytes of weights at the resume"]
    assert resumed[0] == resumed[1] < begun
    # Each rank checks and reads its own part.
    assert table["requests resume: GET shard"][1] == 2 * table["requests resume: GET shard"][0]
    # How often rank 0 looks for shards depends on the clock, not on how many there are.
    assert table["requests saves: LIST"][1] <= 12
    assert not any("receipt" in name for name in table)
    # What rank 0 asks by the clock (lease, stop file, wish for a profile) it asks for all ranks. Of all else
    # only a rank's own shard is asked for once more with one more rank; what is left are odds of when a
    # listing sees what.
    for name, (few, more) in table.items():
        if name.startswith("requests") and "shard" not in name and "by the clock" not in name:
            assert more <= few + 4, name
    # One round more for twice the ranks; gradients go out and weights come back in one call each, and the
    # norm is one number.
    assert table["calls a step: isend"] == (1, 2)
    for name in ("reduce_scatter_tensor", "all_gather_into_tensor", "all_reduce"):
        assert table[f"calls a step: {name}"] == (1, 1)
    # fp32 gradients and bf16 weights: 4 + 2 bytes of each parameter, where the ideal is 2 + 2.
    assert table["bytes a step over the ideal"] == pytest.approx((1.5, 1.5), rel=0.01)
    # gloo connects each rank to every other in both groups, and rank 0's store to all: linear, but no more.
    # Two are open or not, depending on the moment of counting.
    growth = {name: after - before for name, (before, after) in table.items()}
    assert growth["file descriptors of a rank"] <= 2 * 2 + 2
    assert growth["file descriptors of rank 0, which keeps the store"] <= 2 * 2 + 2 * 3 + 2
