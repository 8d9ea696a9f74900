"""Rank facts under every launcher, from plain dictionaries."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from trainer.config.run import Config, ConfigError
from trainer.config.training import DistributedConfig
from trainer.distributed import env as env_module
from trainer.distributed.env import (
    DistributedEnv,
    choose_device,
    deepspeed_variables,
    first_host,
    meet,
    refuse_mixed_devices,
    refuse_shared_devices,
    refuse_unusable_gpus,
)


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
    slurm = {"SLURM_PROCID": "3", "SLURM_LOCALID": "3", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "4"}
    env = DistributedEnv.detect({"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", **slurm})
    assert (env.rank, env.world_size, env.launcher) == (0, 2, "torchrun")


def test_slurm() -> None:
    env = DistributedEnv.detect(
        {
            "SLURM_PROCID": "9",
            "SLURM_LOCALID": "1",
            "SLURM_NTASKS": "32",  # the job's: the step may be smaller
            "SLURM_STEP_ID": "0",
            "SLURM_STEP_NUM_TASKS": "16",
            "SLURM_NNODES": "2",
            "SLURM_JOB_NODELIST": "gpu[011-012]",
            "SLURM_JOB_ID": "4711",
        }
    )
    assert (env.rank, env.local_rank, env.world_size, env.local_world_size) == (9, 1, 16, 8)
    assert (env.master_addr, env.master_port, env.launcher) == ("gpu011", 24711, "slurm")


@pytest.mark.parametrize(("node", "ranks"), [("0", 8), ("50", 8), ("51", 2)])
def test_slurm_tells_how_many_tasks_each_node_has(node: str, ranks: int) -> None:
    step = {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "410", "SLURM_STEP_TASKS_PER_NODE": "8(x51),2"}
    env = DistributedEnv.detect({**step, "SLURM_PROCID": "409", "SLURM_LOCALID": "1", "SLURM_NODEID": node})
    assert env.local_world_size == ranks


@pytest.mark.parametrize("sizes", [(8,) * 51 + (2,), (8, 4, 4), (4, 8), (1, 1)])
def test_ranks_of_nodes_that_are_not_equally_full_decide_alike(
    sizes: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    ranks = sum(sizes)
    places = [
        {"RANK": "0", "LOCAL_RANK": str(local), "LOCAL_WORLD_SIZE": str(size), "WORLD_SIZE": str(ranks)}
        for size in sizes
        for local in range(size)
    ]
    before = [DistributedEnv.detect(place) for place in places]
    assert all(env.num_nodes > 1 for env in before)  # else gloo would meet on the loopback
    told = [("host", "", env.local_rank, env.local_world_size) for env in before]
    monkeypatch.setattr(env_module.collectives, "all_gather_object", lambda value: told)
    met = [meet(env) for env in before]
    assert {env.num_nodes for env in met} == {len(sizes)}
    config = Config(distributed=DistributedConfig(engine="fsdp"))
    cuts = {config.shard_size(ranks, env.ranks_per_node) for env in met}
    assert cuts == {max(sizes) if ranks % max(sizes) == 0 else ranks}


def test_one_slurm_task_is_one_process() -> None:
    variables = {"SLURM_PROCID": "0", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "1"}
    assert DistributedEnv.detect(variables).launcher == "single"


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


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Lets torch report so many GPUs."""

    def report(count: int) -> None:
        monkeypatch.setattr(env_module.torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(env_module.torch.cuda, "device_count", lambda: count)

    return report


def test_devices(gpus: Callable[[int], None]) -> None:
    assert choose_device(0, 1, bound=False) == torch.device("cpu") or torch.cuda.is_available()
    gpus(4)
    assert choose_device(3, 4, bound=False) == torch.device("cuda:3")
    with pytest.raises(ConfigError, match="8 ranks on a node with 4 visible GPUs"):
        choose_device(0, 8, bound=True)


TORCHRUN = {"RANK": "6", "LOCAL_RANK": "2", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4"}
SRUN = {
    "SLURM_PROCID": "6",
    "SLURM_LOCALID": "2",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_STEP_NUM_NODES": "2",
}


@pytest.mark.parametrize("launcher", [TORCHRUN, SRUN])
@pytest.mark.parametrize(
    ("visible", "device"), [("0,1,2,3", "cuda:2"), ("2", "cuda:0"), ("MIG-12ab", "cuda:0")]
)
def test_every_launcher_may_show_all_gpus_or_one_each(
    gpus: Callable[[int], None], launcher: dict[str, str], visible: str, device: str
) -> None:
    gpus(visible.count(",") + 1)
    env = DistributedEnv.detect({**launcher, "CUDA_VISIBLE_DEVICES": visible})
    assert env.device == torch.device(device)
    # DeepSpeed takes it for the number of its device.
    assert deepspeed_variables(env) == {**env.variables(), "LOCAL_RANK": device[-1]}


def test_a_node_of_one_gpu_does_not_take_four_ranks(gpus: Callable[[int], None]) -> None:
    gpus(1)
    with pytest.raises(ConfigError, match="4 ranks on a node with 1 visible GPUs"):
        DistributedEnv.detect(TORCHRUN)


def test_gpus_that_torch_cannot_use_are_not_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(env_module.torch.cuda, "is_available", lambda: False)
    driver = tmp_path / "nvidiactl"
    refuse_unusable_gpus({}, driver)
    driver.touch()
    monkeypatch.setattr(env_module.torch.cuda, "init", _too_old)
    with pytest.raises(ConfigError, match=r"cannot use them: The NVIDIA driver .* too old; mend that"):
        refuse_unusable_gpus({}, driver)
    with pytest.raises(ConfigError, match="CUDA_VISIBLE_DEVICES"):
        refuse_unusable_gpus({"CUDA_VISIBLE_DEVICES": "0"}, driver)
    for mask in ("", "-1"):
        refuse_unusable_gpus({"CUDA_VISIBLE_DEVICES": mask}, driver)


def _too_old() -> None:
    raise RuntimeError("The NVIDIA driver on your system is too old.\nPlease update it")


def test_a_node_without_gpus_among_others_is_named_on_every_rank() -> None:
    refuse_mixed_devices([("a", ""), ("b", "")])
    refuse_mixed_devices([("a", "GPU-0"), ("b", "GPU-0")])
    with pytest.raises(ConfigError, match=r"1 of 4 ranks have no GPU .* rank 3 on b;") as told:
        refuse_mixed_devices([("a", "GPU-0"), ("a", "GPU-1"), ("b", "GPU-2"), ("b", "")])
    assert told.value.share == 0.25  # so that a run that has worked looks for another node


def test_ranks_that_share_a_gpu_are_refused() -> None:
    refuse_shared_devices([("a", "GPU-0"), ("a", "GPU-1"), ("b", "GPU-0")])
    with pytest.raises(ConfigError, match="ranks 1 and 2 see the same single GPU"):
        refuse_shared_devices([("a", "GPU-0"), ("a", "GPU-1"), ("a", "GPU-1")])
