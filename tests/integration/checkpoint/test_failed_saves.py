"""A save that fails is noticed at the next step, and made up for before anything else is decided."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.integration.launch_bucket import StoredRun, tiny_config
from tests.integration.ranks import run_ranks
from trainer.checkpoint.commands import list_checkpoints

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize("loser", [0, 1])
def test_a_rank_whose_writer_died_costs_one_save(tmp_path: Path, loser: int) -> None:
    told = run_ranks(
        "tests/integration/checkpoint/writer_ranks.py:lose_a_writer",
        2,
        {"run_dir": str(tmp_path), "loser": loser},
    )
    assert [rank["knew"] for rank in told] == [loser == 0, loser == 1]
    assert all("could not be written" in rank["failure"] for rank in told)
    assert [(row.step, row.complete) for row in list_checkpoints(str(tmp_path))][:1] == [(2, True)]
    # Rank 0's writer would wait for the missing shard for half an hour.
    assert max(rank["seconds"] for rank in told) < 100


@pytest.mark.slow
def test_the_loop_saves_again_and_goes_on(tmp_path: Path) -> None:
    """What is in the way of step 40's folder, a file, makes its upload fail."""
    run_dir = tmp_path / "run"
    (run_dir / "checkpoints").mkdir(parents=True)
    (run_dir / "checkpoints" / "step_000000040").write_text("in the way")
    config = tiny_config() | {
        "run_dir": str(run_dir),
        "steps": 150,
        "checkpoint": {"every": 40, "keep_last": 9},
    }
    config["data"] |= {"shards": f"{tmp_path}/shards/*.tar", "workers": 0}
    config["distributed"] |= {"engine": "torch", "ranks": 1, "max_restarts": 0}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    for command in (
        ["data", "synthesize", f"{tmp_path}/shards", "--samples", "32", "--size", "24:40"],
        ["train", str(tmp_path / "config.yaml")],
    ):
        done = subprocess.run(
            [sys.executable, "-m", "trainer", *command],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-1500:]
    run = StoredRun(str(run_dir), run_dir)
    (event,) = run.events("save failed")
    made_up_for = event["step"]
    assert made_up_for > 40
    assert {made_up_for, 150} <= set(run.steps())
    assert 40 not in run.steps()
    assert "step_000000040" in done.stderr
    assert sorted(run.losses()) == list(range(1, 151))
    assert json.loads((run_dir / "logs" / "metrics.jsonl").read_text().splitlines()[-1])["step"] == 150
