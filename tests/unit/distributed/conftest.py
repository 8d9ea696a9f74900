"""One process that is all ranks of a group."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from trainer.distributed.env import DistributedEnv, initialise, shutdown


@pytest.fixture(scope="module")
def env() -> Iterator[DistributedEnv]:
    facts = DistributedEnv.detect({})
    with pytest.MonkeyPatch.context() as patch:
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
            patch.setenv(name, "")  # restored after the module
        initialise(facts, timeout_s=60.0)
        yield facts
        shutdown()
