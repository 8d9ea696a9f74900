"""What the ranks of test_collectives.py run."""

from __future__ import annotations

from pathlib import Path

from data_pipeline.errors import DataError, NoShards
from trainer.distributed import collectives
from trainer.distributed.env import DistributedEnv


def once(env: DistributedEnv, marker: str, fails: bool) -> list[str]:
    """What `from_main_rank` gives on this rank, and how often anybody made it."""

    def make() -> str:
        with Path(marker).open("a") as file:
            file.write(f"{env.rank}\n")
        if fails:
            raise NoShards("nothing there")
        return "made"

    try:
        found = collectives.from_main_rank(make, raises=DataError)
    except NoShards as error:
        found = str(error)
    collectives.barrier()
    return [found, Path(marker).read_text()]
