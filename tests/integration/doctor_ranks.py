"""What the ranks do in test_doctor_nodes.py: the doctor's look at storage, each rank a node of its own."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

from trainer.config.run import Config
from trainer.distributed import collectives
from trainer.distributed.env import DistributedEnv
from trainer.doctor.inputs import check_storage


def look(env: DistributedEnv, folders: list[str], run_dir: str, unwritable: bool) -> dict[str, Any]:
    """The check as this rank sees it; a relative run_dir lies in the folder that is this rank's own."""
    os.chdir(folders[env.rank])
    if unwritable and env.rank == 1:
        Path(run_dir).parent.mkdir(parents=True, exist_ok=True)
        Path(run_dir).write_text("a file where the folder should be")
    (check,) = check_storage(Config(run_dir=run_dir), env)
    collectives.barrier()  # every rank has removed what it wrote
    return {**dataclasses.asdict(check), "left": sorted(path.name for path in Path(run_dir).glob("*"))}
