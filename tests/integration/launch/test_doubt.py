"""Machine faults do not end a run for good: real launcher and ranks, errors as machines make them."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from trainer.exit_codes import ExitCode
from trainer.launch.local import supervise
from trainer.reliability.doubt import named_nodes

RANK = """
import errno, os, sys, time
from pathlib import Path
from types import SimpleNamespace

from data_pipeline.errors import AccessDenied, GivenUp, RetryableFault, UserError
from trainer.config.run import Config
from trainer.config.training import DistributedConfig
from trainer.exit_codes import ExitCode
from trainer.launch import rank as process
from trainer.reliability.doubt import Progress, mark

rank, attempt = int(os.environ["RANK"]), int(os.environ["LDM_RESTARTS"])

def fail(error, step=5, committed=True):
    mark(error, Progress(step, committed))
    raise error

def run(config, env):
    with open(os.environ["ATTEMPTS"], "a") as file:
        file.write(f"{rank} {attempt}\\n")
BODY
    return ExitCode.DONE

sys.modules["trainer.train"] = SimpleNamespace(run=run)
# Which imports torch, three seconds of a processor that nothing here needs.
sys.modules["trainer.distributed.env"] = SimpleNamespace(DistributedEnv=SimpleNamespace(detect=lambda: None))
process.wait_for_storage = lambda run_dir, data: None
sys.exit(process.run_rank(Config(distributed=DistributedConfig(doctor=False))))
"""


class Ranks:
    """Runs bodies of `trainer.train.run` as ranks, and counts the attempts."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        monkeypatch.setenv("ATTEMPTS", str(folder / "attempts"))
        monkeypatch.setenv("LDM_FAULTS", str(folder / "faults.jsonl"))
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")

    def run(self, body: str, ranks: int = 2) -> tuple[ExitCode, int]:
        """(how the run ended, after how many attempts)."""
        lines = "\n".join(f"    {line}" for line in body.strip().splitlines())
        code = supervise(
            [sys.executable, "-c", RANK.replace("BODY", lines)],
            ranks,
            max_restarts=6,
            watchdog_s=0.0,
            scratch=self.folder,
            log_dir=self.folder,
        )
        attempts = {line.split()[1] for line in (self.folder / "attempts").read_text().splitlines()}
        return code, len(attempts)


@pytest.fixture
def ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Ranks:
    return Ranks(tmp_path, monkeypatch)


ONE_NODE = {
    "a disk turned read-only": "OSError(errno.EROFS, 'Read-only file system')",
    "a full disk": "OSError(errno.ENOSPC, 'No space left on device')",
    "a refused request": "AccessDenied('Access to s3://bucket/x is denied')",
    "a KeyError inside a library": "KeyError('ResponseMetadata')",
    "what the writer process said": "UserError('x cannot be written: the disk is full')",
}


@pytest.mark.parametrize("error", ONE_NODE.values(), ids=ONE_NODE.keys())
def test_what_one_rank_meets_once_is_a_machines_fault(ranks: Ranks, error: str) -> None:
    assert ranks.run(f"if attempt == 0 and rank == 1: fail({error})") == (ExitCode.DONE, 2)


def test_before_the_first_commit_it_is_a_mistake(ranks: Ranks) -> None:
    body = "fail(AccessDenied('no credentials'), committed=False)"
    assert ranks.run(body) == (ExitCode.USER_ERROR, 1)


def test_credentials_that_are_away_for_a_moment_while_a_run_starts_again(ranks: Ranks) -> None:
    """No checkpoint is known to the rank yet, but the same command has run before."""
    body = """
if attempt == 0: fail(RetryableFault('a node was lost'))
if attempt == 1 and rank == 0: fail(AccessDenied('no credentials'), step=0, committed=False)
"""
    assert ranks.run(body) == (ExitCode.DONE, 3)


def test_most_ranks_agree_and_are_believed_at_once(ranks: Ranks) -> None:
    body = """
open(f"{os.environ['ATTEMPTS']}.{rank}", "w").close()
while len(list(Path(os.environ["ATTEMPTS"]).parent.glob("attempts.*"))) < 4: time.sleep(0.01)
if rank != 0: fail(UserError('the file system is full'))
time.sleep(5)
"""
    assert ranks.run(body, ranks=4) == (ExitCode.USER_ERROR, 1)


def test_one_finding_that_all_ranks_raise_is_still_one(ranks: Ranks) -> None:
    """As CheckpointManager.settle and from_main_rank hand it to everybody."""
    body = """
error = UserError('x cannot be written: the disk is full')
error.share = 1 / 2
if attempt == 0: fail(error)
"""
    assert ranks.run(body) == (ExitCode.DONE, 2)


@pytest.mark.parametrize(("error", "code"), [("KeyError('x')", 78), ("UserError('full')", 2)])
def test_the_same_place_three_times_is_the_end(ranks: Ranks, error: str, code: int) -> None:
    assert ranks.run(f"if rank == 1: fail({error})\ntime.sleep(5)") == (code, 3)


def test_a_run_that_gets_further_each_time_goes_on(ranks: Ranks) -> None:
    body = "if rank == 1 and attempt < 5: fail(KeyError('x'), step=100 * attempt)"
    assert ranks.run(body) == (ExitCode.DONE, 6)


def test_what_the_ranks_decided_together_is_no_machines_fault(ranks: Ranks) -> None:
    assert ranks.run("fail(GivenUp('the loss does not recover'))") == (ExitCode.FATAL, 1)


def test_the_node_of_such_a_rank_is_named(ranks: Ranks, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURMD_NODENAME", "n7")  # as slurmd tells each rank
    body = (
        "if attempt == 1 and rank == 1: fail(KeyError('x'))\nif attempt == 0: fail(RetryableFault('a link'))"
    )
    assert ranks.run(body) == (ExitCode.DONE, 3)
    named = {attempt: named_nodes({**os.environ, "LDM_RESTARTS": str(attempt)}) for attempt in range(3)}
    assert named == {0: [], 1: ["n7"], 2: []}
