"""Rank facts under every launcher, from plain dictionaries."""

from __future__ import annotations

import pytest
import torch

from trainer.config.run import ConfigError
from trainer.distributed import env as env_module
from trainer.distributed.env import DistributedEnv, choose_device, first_host


def test_nothing_set_means_one_process() -> None:
    env = DistributedEnv.detect({})
    assert (env.rank, env.world_size, env.launcher, env.is_main) == (0, 1, "single", True)


def test_torchrun() -> None:
    env = DistributedEnv.detect(
        {
            "RANK": "5",
            "LOCAL_RANK": "1",
            "WORLD_SIZE": "8",
            "LOCAL_WORLD_SIZE": "4",
            "MASTER_ADDR": "node7",
            "MASTER_PORT": "1234",
        }
    )
    assert (env.rank, env.local_rank, env.world_size, env.local_world_size) == (5, 1, 8, 4)
    assert (env.master_addr, env.master_port, env.num_nodes) == ("node7", 1234, 2)
    assert not env.is_main


def test_torchrun_wins_over_the_slurm_job_around_it() -> None:
    slurm = {"SLURM_PROCID": "3", "SLURM_LOCALID": "3", "SLURM_NTASKS": "4"}
    env = DistributedEnv.detect({"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", **slurm})
    assert (env.rank, env.world_size, env.launcher) == (0, 2, "torchrun")


def test_slurm() -> None:
    env = DistributedEnv.detect(
        {
            "SLURM_PROCID": "9",
            "SLURM_LOCALID": "1",
            "SLURM_NTASKS": "16",
            "SLURM_NNODES": "2",
            "SLURM_JOB_NODELIST": "gpu[011-012]",
            "SLURM_JOB_ID": "4711",
        }
    )
    assert (env.rank, env.local_rank, env.world_size, env.local_world_size) == (9, 1, 16, 8)
    assert (env.master_addr, env.master_port, env.launcher) == ("gpu011", 24711, "slurm")


def test_one_slurm_task_is_one_process() -> None:
    assert DistributedEnv.detect({"SLURM_PROCID": "0", "SLURM_NTASKS": "1"}).launcher == "single"


@pytest.mark.parametrize(
    ("nodelist", "host"),
    [
        ("login1", "login1"),
        ("a,b,c", "a"),
        ("gpu[003-007,012],cpu1", "gpu003"),
        ("gpu[3,5]", "gpu3"),
        ("rack1-node[08-09]-ib", "rack1-node08-ib"),
    ],
)
def test_first_host(nodelist: str, host: str) -> None:
    assert first_host(nodelist) == host


def test_half_set_variables_are_explained() -> None:
    with pytest.raises(ConfigError, match="LOCAL_RANK"):
        DistributedEnv.detect({"RANK": "0", "WORLD_SIZE": "2"})


def test_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose_device(0, 1) == torch.device("cpu") or torch.cuda.is_available()
    monkeypatch.setattr(env_module.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(env_module.torch.cuda, "device_count", lambda: 4)
    assert choose_device(3, 4) == torch.device("cuda:3")
    with pytest.raises(ConfigError, match="8 ranks on a node with 4 visible GPUs"):
        choose_device(0, 8)
    monkeypatch.setattr(env_module.torch.cuda, "device_count", lambda: 1)
    assert choose_device(3, 4, one_visible_each=True) == torch.device("cuda:0")
