"""What the parts of a Ray run tell each other; a run's progress from outside."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from trainer.config.run import Config, ConfigError
from trainer.exit_codes import ExitCode
from trainer.launch.observe import latest_record, newest_checkpoint
from trainer.launch.ray_board import RunBoard, RunRequest, forbids_restart, useful_ranks


def test_faults_in_a_row_without_progress_are_bounded() -> None:
    board = RunBoard(max_faults=2)
    assert board.begin(2) == (1, False)
    board.tick(10)
    assert board.begin(2) == (2, False)  # first fault
    board.tick(10)
    assert board.begin(2) == (3, False)  # second, no further than before
    board.tick(11)
    assert board.begin(2) == (4, False)  # got further: counted anew
    board.tick(11)
    assert board.begin(2) == (5, False)
    assert board.begin(2) == (6, True)


def test_planned_restarts_are_no_faults() -> None:
    board = RunBoard(max_faults=0)
    board.begin(2)
    for attempt in range(2, 6):
        board.ask(RunRequest.RESIZE)
        assert board.tick(5)[0] == "resize"
        board.ended(0, ExitCode.PREEMPTED)
        board.ended(1, ExitCode.PREEMPTED)
        assert board.begin(3) == (attempt, False)
        assert board.tick(5) == ("", {})


def test_a_stop_is_not_taken_back_by_a_resize() -> None:
    board = RunBoard(max_faults=3)
    board.begin(2)
    board.ask(RunRequest.PREEMPT)
    board.ask(RunRequest.RESIZE)
    assert board.tick(0)[0] == "preempt"
    board.begin(1)
    assert board.tick(0)[0] == "preempt"


def test_workers_that_shorten_no_step_are_not_used() -> None:
    config = Config(global_batch_size=12, micro_batch_size=2)
    # Samples of the largest share:                      12 6  4  3  3  2  2  2  2  2  2  1   1
    assert [useful_ranks(config, n) for n in range(1, 14)] == [1, 2, 3, 4, 4, 6, 6, 6, 6, 6, 6, 12, 12]
    whole = Config(stage="autoencoder", global_batch_size=12, micro_batch_size=2)
    assert [useful_ranks(whole, n) for n in range(1, 9)] == [1, 2, 3, 3, 3, 6, 6, 6]
    large = Config(global_batch_size=2048, micro_batch_size=8)
    assert {useful_ranks(large, n) for n in range(410, 512)} == {410}
    assert [useful_ranks(large, n) for n in (3, 256, 409, 512, 1024)] == [3, 256, 342, 512, 1024]


def test_ray_is_asked_for_no_more_workers_than_shorten_a_step() -> None:
    pytest.importorskip("ray", reason='pip install "ray[default,train]"')
    import ray.train

    from trainer.launch.ray import _UsefulWorkers, _worker_range

    config = Config(global_batch_size=12, micro_batch_size=2)
    scaling = ray.train.ScalingConfig(num_workers=(3, 12), resources_per_worker={"CPU": 2.0})
    policy = _UsefulWorkers(scaling, config, taken=0)
    found = [
        policy._count_possible_workers({"one": {"CPU": 6.0}, "two": {"CPU": 2.0 * more}})
        for more in range(10)
    ]
    # A node that comes to seven workers, or goes from eleven, changes nothing: no decision to resize follows.
    assert found == [3, 4, 4, 6, 6, 6, 6, 6, 6, 12]
    assert policy._count_possible_workers({"one": {"CPU": 4.0}}) == 2  # below MIN: Ray waits
    fewest = dataclasses.replace(scaling, num_workers=(5, 12))
    assert _UsefulWorkers(fewest, config, taken=0)._count_possible_workers({"one": {"CPU": 10.0}}) == 5
    beside = _UsefulWorkers(scaling, config, taken=2)  # of eight places encoders have two
    assert beside._count_possible_workers({"one": {"CPU": 16.0}}) == 6
    assert [_worker_range(text, config) for text in ("5", "5:8", "7:8", "2:4000")] == [
        *((5, 5), (5, 6), (7, 7), (2, 12))
    ]
    for text in ("13", "13:20"):
        with pytest.raises(ConfigError, match="13 ranks cannot share global_batch_size=12"):
            _worker_range(text, config)


def test_only_final_codes_end_the_run_for_all() -> None:
    assert not forbids_restart({0: ExitCode.DONE, 1: ExitCode.PREEMPTED, 2: ExitCode.RETRYABLE})
    assert forbids_restart({0: ExitCode.DONE, 1: ExitCode.USER_ERROR})


def test_progress_of_a_run(tmp_path: Path) -> None:
    run_dir = str(tmp_path)
    assert latest_record(run_dir) is None
    assert newest_checkpoint(run_dir) is None
    logs = tmp_path / "logs"
    logs.mkdir()
    records = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}, {"step": 2, "event": "resume"}]
    (logs / "metrics.jsonl").write_text("\n".join(map(json.dumps, records)) + '\n{"step": 3, "lo')
    assert latest_record(run_dir) == {"step": 2, "loss": 1.0}
    for step in (5, 100):
        (tmp_path / "checkpoints" / f"step_{step:09d}").mkdir(parents=True)
    (tmp_path / "checkpoints" / "step_000000005" / "manifest.json").write_text("{}")
    assert newest_checkpoint(run_dir) == (5, f"{run_dir}/checkpoints/step_000000005")


def test_a_start_that_has_only_told_of_itself_does_not_hide_the_last_losses(tmp_path: Path) -> None:
    """In object storage each start begins a record of its own."""
    (tmp_path / "logs").mkdir()
    for name, record in {
        "metrics-0000000000001-00000001.jsonl": {"step": 7, "loss": 2.0},
        "metrics-0000000000002-00000008.jsonl": {"step": 8, "event": "resume"},
    }.items():
        (tmp_path / "logs" / name).write_text(json.dumps(record) + "\n")
    assert latest_record(str(tmp_path)) == {"step": 7, "loss": 2.0}
