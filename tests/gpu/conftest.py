"""Everything here needs a GPU: `pytest -m gpu -n 6 tests/gpu`, three minutes on one beside 16 cores."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from trainer.distributed.env import DistributedEnv, initialise, shutdown

HERE = Path(__file__).parent
RANK_FACTS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what lies in this folder, and leave it out where there is no GPU."""
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            item.add_marker(pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"))


@pytest.fixture(scope="module")
def env() -> Iterator[DistributedEnv]:
    """One rank with its process group."""
    facts = DistributedEnv.detect({})
    with pytest.MonkeyPatch.context() as patch:
        for name in RANK_FACTS:
            patch.setenv(name, "")  # restored after the module
        initialise(facts, timeout_s=60.0)
        yield facts
        shutdown()
