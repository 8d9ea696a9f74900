"""Slow ranks: who counts as one, and how it is told."""

from __future__ import annotations

import json
import logging
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from trainer.config.run import Config
from trainer.config.training import LoggingConfig
from trainer.distributed.env import DistributedEnv
from trainer.metrics.sinks import Sinks
from trainer.reliability.slow_ranks import RankReport, SlowRanks, data_record, own_seconds, times_record
from trainer.run import Run
from trainer.state import TrainState
from trainer.telling import slow_record


def reports(*own_s: float) -> list[RankReport]:
    return [RankReport(Counter(), Counter(), f"node-{rank}", seconds) for rank, seconds in enumerate(own_s)]


def slow_in(slow_ranks: SlowRanks, seconds: list[float], step_s: float = 2.0) -> list[int]:
    return [found.rank for found in slow_ranks.observe(reports(*seconds), step_s)]


def test_a_rank_must_be_slow_repeatedly() -> None:
    slow_ranks = SlowRanks(ratio=1.5, patience=3)
    for _ in range(2):
        assert slow_in(slow_ranks, [1.0, 1.1, 1.6, 0.9]) == []
    assert slow_in(slow_ranks, [1.0, 1.1, 1.6, 0.9]) == [2]
    (found,) = slow_ranks.observe(reports(1.0, 1.1, 1.8, 0.9), 2.0)
    assert (found.seconds, found.reports, found.host) == (1.8, 4, "node-2")
    assert found.times_median == pytest.approx(1.8)
    assert slow_in(slow_ranks, [1.0, 1.1, 1.2, 0.9]) == []
    assert slow_in(slow_ranks, [1.0, 1.1, 1.6, 0.9]) == []


def test_equal_or_idle_ranks_are_never_slow() -> None:
    slow_ranks = SlowRanks(patience=1)
    assert slow_in(slow_ranks, [0.0, 0.0]) == []
    assert slow_in(slow_ranks, [2.0]) == []


def test_of_two_ranks_the_slower_is_found() -> None:
    assert slow_in(SlowRanks(patience=1), [0.6, 0.3]) == [0]


def test_differences_that_are_small_beside_the_step_do_not_count() -> None:
    slow_ranks = SlowRanks(patience=1, floor=0.05)
    seconds = [0.010, 0.010, 0.040]
    assert slow_in(slow_ranks, seconds, step_s=0.7) == []
    assert slow_in(slow_ranks, seconds, step_s=0.5) == [2]


def test_only_phases_that_wait_for_nobody_are_own_work() -> None:
    record = {"step_s": 1.0, "time/data_s": 0.25, "time/encode_s": 0.125, "time/unet_s": 0.5}
    assert own_seconds(record) == 0.375
    assert own_seconds({"step_s": 1.0}) == 0.0


def test_a_record_tells_the_most_of_each_own_phase_and_the_longest_wait() -> None:
    """Rank 1 loads for long, so that the others wait in what all end together."""
    times = [
        {"data": 0.25, "encode": 0.5, "unet": 1.25, "optimizer": 1.0},
        {"data": 1.0, "encode": 0.5, "unet": 1.25, "optimizer": 0.25},
        {"data": 0.125, "encode": 0.75, "unet": 1.25, "optimizer": 0.875},
    ]
    ranks = [
        RankReport(
            Counter(), Counter(), "node", own_seconds({f"time/{k}_s": v for k, v in each.items()}), times=each
        )
        for each in times
    ]
    assert times_record(ranks) == {
        "ranks/data_s_most": 1.0,
        "ranks/encode_s_most": 0.75,
        "ranks/slowest": 1.0,
        "ranks/waits_s_most": 0.75,
    }
    assert times_record(ranks[:1]) == {}
    assert times_record(reports(0.0, 0.0)) == {}  # the first interval warms up


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """As much of a run as tells about slow ranks."""
    logging = LoggingConfig(wandb="disabled", progress_bar=False)
    sinks = Sinks(Config(run_dir=str(tmp_path), logging=logging), main_rank=True, resolved={})
    sinks.open(start_step=0, samples_seen=0, run_id=None)
    state = TrainState(step=30, samples_seen=960)
    return cast(Run, SimpleNamespace(env=DistributedEnv.detect({}), state=state, sinks=sinks))


def test_a_slow_rank_is_named_once_and_counted_while_it_lasts(
    run: Run, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    slow_ranks = SlowRanks(patience=2)
    said: list[tuple[dict[str, float], int]] = []
    with caplog.at_level(logging.WARNING):
        for own_s in (0.42, 0.42, 0.42, 0.2, 0.42, 0.42):
            record = slow_record(run, slow_ranks, reports(0.2, 0.2, own_s), {"step_s": 1.0})
            said.append((record, len(caplog.records)))
    counts = [0.0, 1.0, 1.0, 0.0, 0.0, 1.0]
    assert said == [({"slow_ranks": n}, m) for n, m in zip(counts, [0, 1, 1, 1, 1, 2], strict=True)]
    sentence = "rank 2 (node-2) needs 2.1x the median time for its own work, for 2 reports running"
    assert [record.getMessage() for record in caplog.records] == [sentence] * 2
    run.sinks.flush()
    events = [json.loads(line) for line in (tmp_path / "logs" / "metrics.jsonl").read_text().splitlines()]
    expected = {
        "step": 30,
        "samples_seen": 960,
        "event": "slow rank",
        "rank": 2,
        "host": "node-2",
        "own_s": 0.42,
        "step_s": 1.0,
    }
    now = time.time()
    assert all(now - 60 < event.pop("time") <= now for event in events)
    assert events == [expected] * 2


def test_the_interval_that_warms_up_is_not_judged(run: Run) -> None:
    slow_ranks = SlowRanks(patience=1)
    assert slow_record(run, slow_ranks, reports(0.2, 0.9), {}) == {}
    assert slow_record(run, slow_ranks, reports(0.2, 0.9), {"step_s": 1.0}) == {"slow_ranks": 1.0}


def test_counts_of_all_ranks_are_added() -> None:
    told = [
        RankReport(Counter({"small": 2}), Counter({"requests": 5}), "a", 0.0),
        RankReport(Counter({"small": 1, "torn": 1}), Counter({"requests": 6}), "b", 0.0),
    ]
    assert data_record(told) == {"rejected/small": 3.0, "rejected/torn": 1.0, "storage/requests": 11.0}
