"""What ends a loader process reaches the rank with its consequence."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from data_pipeline.config import DataConfig
from data_pipeline.errors import FatalFault, WorkerDied
from data_pipeline.feed.worker import WorkerProcess


@pytest.fixture
def worker() -> Iterator[WorkerProcess]:
    process = WorkerProcess(DataConfig(shards="nowhere/*.tar"), name="0")
    yield process
    process.close()


def test_a_bug_in_a_loader_process_is_fatal(worker: WorkerProcess) -> None:
    worker._send(("not a task", 1, os.getpid()))
    with pytest.raises(FatalFault, match="A loader process failed: AttributeError"):
        worker.take()


def test_a_killed_loader_process_is_worth_another_try(worker: WorkerProcess) -> None:
    worker._process.kill()
    with pytest.raises(WorkerDied, match="ended by SIGKILL"):
        worker.take()
