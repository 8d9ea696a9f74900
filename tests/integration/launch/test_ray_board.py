"""What the parts of a Ray run tell each other; a run's progress from outside."""

from __future__ import annotations

import json
from pathlib import Path

from trainer.config.run import Config
from trainer.exit_codes import ExitCode
from trainer.launch.observe import latest_record, newest_checkpoint
from trainer.launch.ray_board import RunBoard, RunRequest, forbids_restart, usable_ranks


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


def test_workers_that_the_batch_cannot_use_are_spares() -> None:
    config = Config(global_batch_size=48, micro_batch_size=2)
    assert [usable_ranks(config, n) for n in range(1, 9)] == [1, 2, 3, 4, 4, 6, 6, 8]


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
