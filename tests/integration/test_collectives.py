"""Collectives over two real gloo ranks."""

from __future__ import annotations

from pathlib import Path

from tests.integration.ranks import run_ranks
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


def test_the_strongest_request_any_flag_and_mean_losses_are_agreed_on() -> None:
    agreed = [
        ["NONE", False, False, []],
        ["NONE", True, False, ["1.5"]],
        ["STOPPED", False, True, ["0.25", "nan", "inf"]],
        ["PREEMPTED", True, True, ["0.6000000000000001"]],  # (0.1 + 1.1) / 2 in fp64
    ]
    assert run_ranks(f"{RANKS}:agree", 2) == [agreed, agreed]


def test_one_rank_agrees_with_itself() -> None:
    agreed = collectives.agree(StopRequest.STOPPED, data_lost=True, save_failed=False, losses=[0.5])
    assert agreed == collectives.Agreed(StopRequest.STOPPED, True, False, (0.5,))
