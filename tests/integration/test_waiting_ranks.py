"""A rank that waits for a peer is judged by what the peer may take: real ranks, gloo and their store."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

from tests.integration.ranks import ROOT, run_ranks
from trainer.config.training import DistributedConfig
from trainer.reliability.heartbeat import Board
from trainer.reliability.watchdog import Watchdog, silence_s

RANKS = "tests/integration/waiting_ranks.py:wait_for_one"


def test_a_loader_that_takes_its_time_kills_no_peer() -> None:
    """Six seconds of a patience of sixty, where a silent step is a hang after less than two."""
    found = run_ranks(RANKS, 3, {"phase": "data", "seconds": 6.0})
    assert [rank["hung"] for rank in found] == [False, False, False]


def test_so_does_a_preview_or_a_save_of_rank_0() -> None:
    found = run_ranks(RANKS, 2, {"phase": "preview", "seconds": 5.0})
    assert [rank["hung"] for rank in found] == [False, False]


def test_a_peer_that_is_silent_in_its_step_still_counts_as_hung() -> None:
    """Nobody is in a long phase: those who wait, and the one who sleeps, give up as soon as without peers."""
    found = run_ranks(RANKS, 2, {"phase": "step", "seconds": 6.0})
    assert [rank["hung"] for rank in found] == [True, True]
    assert all(rank["after_s"] < 5.0 for rank in found)


def test_a_busy_peer_that_dies_is_no_longer_waited_for() -> None:
    """What it said last puts the deadline off once; the launcher reads that on the board."""

    class Dying:
        heard = (0.0, "")

        def tell(self, what: str) -> None:
            """Nobody listens here."""

        def ask(self) -> None:
            """The only sign of life came a moment after the step began."""
            if not self.heard[0]:
                self.heard = (time.monotonic(), "rank 1 (b): data of step 3")

    hung: list[float] = []
    peers = Dying()
    with Watchdog(
        0.6, grace_s={"start": 0.0}, peers=peers, on_hang=lambda: hung.append(time.monotonic())
    ) as dog:
        dog._durations["step"].extend([0.01] * 3)
        dog.beat(3, "step")
        time.sleep(2.5)
    assert len(hung) == 1
    assert 0.5 < hung[0] - peers.heard[0] < 2.0


def test_the_board_carries_the_later_deadline_to_the_launcher(tmp_path: Path) -> None:
    board = Board(tmp_path / "board", 2, create=True)
    board.write(1, deadline=10.0, step=4, phase="step")
    before = board.read(1)
    board.extend(1, 25.0)
    after = board.read(1)
    assert (after.deadline, after.beat, after.step, after.phase) == (25.0, before.beat, 4, "step")


def test_across_nodes_a_lost_link_has_time_to_come_back() -> None:
    config = DistributedConfig()
    assert silence_s(config, 1) == config.watchdog_s
    assert silence_s(config, 64) >= config.watchdog_s + 30.0
    assert silence_s(DistributedConfig(watchdog_s=0.0), 64) == 0.0


def test_the_launcher_needs_no_torch_to_watch() -> None:
    code = "import sys; import trainer.launch.rank_process; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
