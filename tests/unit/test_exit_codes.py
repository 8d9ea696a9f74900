"""Exit codes are distinct, and restarts follow from them."""

import errno
import pickle
import signal
from pathlib import Path

import pytest

from data_pipeline.errors import (
    CONSEQUENCES,
    Failure,
    FatalFault,
    NoShards,
    NotATar,
    RetryableFault,
    StorageOutage,
    Unreachable,
    WorkerDied,
    consequence_of,
)
from trainer.__main__ import main
from trainer.config.run import ConfigError
from trainer.exit_codes import ExitCode, classify, combine, normalize, should_restart


def test_codes_are_distinct_and_fit_a_process_status() -> None:
    values = [int(code) for code in ExitCode]
    assert len(values) == len(set(values)) == 7
    assert all(0 <= value < 128 or value == 130 for value in values)


@pytest.mark.parametrize(
    ("status", "restart"),
    [
        (0, False),
        (2, False),
        (75, True),
        (76, True),
        (77, False),
        (78, False),
        (130, False),
        (-signal.SIGINT, False),
        (-signal.SIGKILL, True),
        (128 + signal.SIGKILL, True),
        (-signal.SIGSEGV, True),
        (1, True),
    ],
)
def test_restart_follows_from_status(status: int, restart: bool) -> None:
    assert should_restart(status) is restart


@pytest.mark.parametrize(
    ("statuses", "code"),
    [
        ([0, 0], ExitCode.DONE),
        ([75, 0], ExitCode.PREEMPTED),
        ([75, -9], ExitCode.RETRYABLE),
        ([75, 77], ExitCode.STOPPED),
        ([76, 2, 78], ExitCode.USER_ERROR),
        ([76, 78], ExitCode.FATAL),
        ([-9, 78], ExitCode.RETRYABLE),
        ([-9, 0], ExitCode.RETRYABLE),
        ([-2, 78], ExitCode.ABORTED),
    ],
)
def test_what_forbids_a_restart_wins(statuses: list[int], code: ExitCode) -> None:
    assert combine(statuses) is code
    assert combine(reversed(statuses)) is code


class OutOfMemoryError(RuntimeError):
    """Named like torch's."""


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ConfigError("steps must be at least 1."), ExitCode.USER_ERROR),
        (OSError(errno.ENOSPC, "No space left on device"), ExitCode.USER_ERROR),
        (OSError(errno.EROFS, "Read-only file system"), ExitCode.USER_ERROR),
        (NoShards("No shard matches"), ExitCode.USER_ERROR),
        (StorageOutage("storage is away"), ExitCode.RETRYABLE),
        (WorkerDied("a loader process ended"), ExitCode.RETRYABLE),
        (ConnectionResetError("peer"), ExitCode.RETRYABLE),
        (RuntimeError("NCCL error: unhandled system error"), ExitCode.RETRYABLE),
        (RetryableFault("storage"), ExitCode.RETRYABLE),
        (FatalFault("five rewinds"), ExitCode.FATAL),
        (OutOfMemoryError("CUDA out of memory"), ExitCode.FATAL),
        (MemoryError(), ExitCode.FATAL),
        (TypeError("wrong"), ExitCode.FATAL),
        (AssertionError(), ExitCode.FATAL),
        (KeyboardInterrupt(), ExitCode.ABORTED),
        (SystemExit(75), ExitCode.PREEMPTED),
        (SystemExit(None), ExitCode.DONE),
        (SystemExit("message"), ExitCode.RETRYABLE),
    ],
)
def test_exceptions_map_to_codes(error: BaseException, code: ExitCode) -> None:
    assert classify(error) is code


def test_silence_is_a_wrong_url_until_the_run_has_been_restarted() -> None:
    assert classify(Unreachable("s3://a cannot be reached")) is ExitCode.USER_ERROR
    assert classify(Unreachable("s3://a cannot be reached"), restarted=True) is ExitCode.RETRYABLE
    assert classify(NoShards("No shard matches"), restarted=True) is ExitCode.USER_ERROR


@pytest.mark.parametrize(
    "failure", [ConfigError("a"), NotATar("b"), StorageOutage("c"), FatalFault("d"), Unreachable("e")]
)
def test_a_failure_keeps_its_consequence_in_another_process(failure: Failure) -> None:
    name, message = consequence_of(failure).__name__, str(failure)
    again = CONSEQUENCES[name](message)
    assert consequence_of(again) is consequence_of(failure)
    assert str(pickle.loads(pickle.dumps(failure))) == message == str(again)


@pytest.mark.parametrize("place", ["file", "file/below", "logs_is_a_file", "n" * 300])
def test_a_run_folder_that_cannot_be_one_is_a_sentence(
    tmp_path: Path, place: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "logs_is_a_file").mkdir()
    (tmp_path / "logs_is_a_file" / "logs").touch()
    config = tmp_path / "config.yaml"
    config.write_text("first_stage: {name: identity}\n", encoding="utf-8")
    assert main(["train", str(config), f"run_dir={tmp_path / place}", "data.shards=a.tar"]) == 2
    said = capsys.readouterr().err
    assert str(tmp_path / place) in said
    assert "choose another" in said
    assert said.count("\n") == 1


def test_unknown_status_is_a_retryable_fault() -> None:
    assert normalize(99) is ExitCode.RETRYABLE


@pytest.mark.parametrize(("variable", "code"), [(None, 2), ("SLURM_RESTART_COUNT", 76), ("LDM_RESTARTS", 76)])
def test_a_command_that_is_started_again_does_not_blame_its_urls_for_an_outage(
    variable: str | None, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An evaluator that SLURM requeues, say: 2 would end it for good."""
    keys = {"AWS_ACCESS_KEY_ID": "a" * 20, "AWS_SECRET_ACCESS_KEY": "b" * 40}
    for name, value in {"AWS_ENDPOINT_URL": "http://127.0.0.1:9", "AWS_REGION": "us-east-1", **keys}.items():
        monkeypatch.setenv(name, value)
    for name in ("SLURM_RESTART_COUNT", "LDM_RESTARTS", "LDM_STARTS", "TORCHELASTIC_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)
    if variable is not None:
        monkeypatch.setenv(variable, "1")
    assert main(["checkpoint", "list", "s3://bucket/run"]) == code
