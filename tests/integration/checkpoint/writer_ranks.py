"""What the ranks of test_failed_saves.py run: a save in which one rank's writer is killed, then another."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

import torch
from torch import nn

from trainer.checkpoint.manager import CheckpointManager
from trainer.config.run import Config
from trainer.config.training import DistributedConfig, EMAConfig
from trainer.distributed import collectives
from trainer.distributed.build import build_engine
from trainer.distributed.env import DistributedEnv
from trainer.ema import EMA
from trainer.exit_codes import StopRequest


def lose_a_writer(env: DistributedEnv, run_dir: str, loser: int) -> dict[str, Any]:
    """Saves of steps 1 (whose writer on rank `loser` is killed at work) and 2."""
    config = Config(
        run_dir=run_dir,
        global_batch_size=2,
        micro_batch_size=1,
        distributed=DistributedConfig(engine="torch", precision="fp32"),
        ema=EMAConfig(decay=0.9),
    )
    torch.manual_seed(0)
    engines = {"unet": build_engine(nn.Linear(3, 2), config, env)}
    ema = EMA(config.ema, engines["unet"].fragments())
    manager = CheckpointManager(config, env)

    def save(step: int) -> None:
        manager.save(step, engines, ema, state={"step": step}, tensors={}, loss=None)

    save(0)
    manager.wait()
    writer = manager._writer._process  # type: ignore[attr-defined]
    if env.rank == loser:
        os.kill(writer.pid, signal.SIGSTOP)
    save(1)
    if env.rank == loser:
        os.kill(writer.pid, signal.SIGKILL)
        writer.wait()
    began = time.monotonic()
    turns = 0
    while not collectives.agree(
        StopRequest.NONE, data_lost=False, save_failed=manager.failed, losses=[]
    ).save_failed:
        turns += 1
        time.sleep(0.01)
    knew = manager.failed
    failure = manager.settle()
    save(2)
    manager.wait()
    seconds = time.monotonic() - began
    manager.close()
    return {"knew": knew, "failure": str(failure), "seconds": seconds}
