"""What a rank leaves of a hang: which collectives wait, by torch's recorder, before anybody ends it."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from trainer.distributed.evidence import leave_memory, recorder_variables, waiting
from trainer.distributed.place import free_port
from trainer.reliability.watchdog import Watchdog

HANGING_RANKS = """
import os, sys, time
import torch.distributed as dist, torch
from pathlib import Path
from trainer.distributed.env import DistributedEnv, initialise
from trainer.distributed.evidence import leave_collectives, recorded_collectives, waiting

run_dir = sys.argv[1]
env = DistributedEnv.detect({"RANK": sys.argv[2], "LOCAL_RANK": sys.argv[2], "WORLD_SIZE": "2",
                             "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": sys.argv[3]})
initialise(env, 300.0)
dist.all_reduce(torch.ones(1))
dist.broadcast(torch.ones(1), 0)
if env.rank == 0:
    work = dist.all_reduce(torch.ones(3), async_op=True)  # to which rank 1 never comes
# gloo's own threads note the end of what has ended.
while len(waiting(recorded_collectives()["gloo"]["entries"])) != (env.rank == 0):
    time.sleep(0.01)
leave_collectives(run_dir, env.rank)
Path(run_dir, f"done{env.rank}").touch()
while not all(Path(run_dir, f"done{rank}").exists() for rank in (0, 1)):
    time.sleep(0.01)
os._exit(0)
"""


def test_the_files_of_ranks_show_who_waits_and_who_never_came(tmp_path: Path) -> None:
    port = str(free_port())
    ranks = [
        subprocess.Popen([sys.executable, "-c", HANGING_RANKS, str(tmp_path), rank, port]) for rank in "01"
    ]
    assert [rank.wait() for rank in ranks] == [0, 0]
    told = [json.loads((tmp_path / f"faults/collectives-rank-000{rank}.json").read_text()) for rank in (0, 1)]
    assert [each["rank"] for each in told] == [0, 1]
    (stuck,) = told[0]["waiting"]["gloo"]
    assert "all_reduce" in stuck
    assert told[1]["waiting"]["gloo"] == []
    done = [entry["profiling_name"] for entry in told[1]["gloo"]["entries"]]
    assert len(done) == len(told[0]["gloo"]["entries"]) - 1
    assert any("broadcast" in name for name in done)


def test_what_has_ended_does_not_wait() -> None:
    entries = [
        {"profiling_name": "nccl:all_reduce", "collective_seq_id": number, "retired": number < 3}
        for number in (1, 2, 3)
    ]
    assert waiting(entries) == ["nccl:all_reduce, number 3 of its group"]


@pytest.mark.parametrize("name", ["TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_TRACE_BUFFER_SIZE"])
def test_the_size_that_somebody_chose_stays(name: str) -> None:
    assert recorder_variables({name: "0"}) == {}
    assert list(recorder_variables({}).values()) == ["2000"]


def test_a_suspicion_leaves_evidence_before_the_verdict_and_once() -> None:
    told: list[str] = []
    hung = threading.Event()

    def verdict() -> None:
        told.append("hang")
        hung.set()

    with Watchdog(
        0.4, grace_s={"start": 0.0}, on_hang=verdict, evidence=lambda: told.append("evidence")
    ) as watchdog:
        watchdog._durations["step"].extend([0.01] * 3)
        watchdog.beat(7)
        assert hung.wait(60)
    assert told == ["evidence", "hang"]


def test_without_a_gpu_there_is_no_memory_to_tell_of(tmp_path: Path) -> None:
    leave_memory(str(tmp_path), 0, torch.device("cpu"))
    assert list(tmp_path.iterdir()) == []
