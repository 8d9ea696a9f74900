"""Which rank this process is: read once from torchrun, SLURM, Ray or nothing."""

from __future__ import annotations

import math
import os
import re
import socket
import sys
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist

from trainer.config.run import ConfigError
from trainer.distributed import collectives
from trainer.distributed.evidence import recorder_variables
from trainer.distributed.place import (
    NVIDIA_DRIVER,
    Place,
    interface_to,
    named_devices,
    raise_descriptor_limit,
    tasks_of_step,
)

Launcher = Literal["torchrun", "slurm", "single"]


@dataclass(frozen=True)
class DistributedEnv(Place):
    """The place of this process among its peers, who said so, and the device it computes on."""

    launcher: Launcher
    """Where the facts come from."""
    device: torch.device
    """cuda:N or cpu."""
    node_sizes: tuple[int, ...] = ()
    """Ranks of each node, as all ranks have told each other in `initialise`; empty before."""

    @classmethod
    def detect(cls, environ: Mapping[str, str] | None = None) -> DistributedEnv:
        """Read the facts from `environ` (the process environment when unset).

        Raises:
            ConfigError: a launcher set only part of its variables, or more ranks than GPUs.
        """
        environ = os.environ if environ is None else environ
        if "RANK" in environ and "WORLD_SIZE" in environ:
            return _from_torchrun(environ)
        if tasks_of_step(environ) > 1:
            return _from_slurm(environ)
        return cls(0, 0, 1, 1, "127.0.0.1", 29500, "single", choose_device())

    @property
    def is_main(self) -> bool:
        """Whether this rank logs and writes for all."""
        return self.rank == 0

    @property
    def num_nodes(self) -> int:
        """Nodes of the job. Before `initialise` only whether there are several is certain."""
        return len(self.node_sizes) or math.ceil(self.world_size / self.local_world_size)

    @property
    def ranks_per_node(self) -> int:
        """Those of the fullest node: what all ranks may decide by, where nodes are not equally full."""
        return max(self.node_sizes, default=self.local_world_size)


def _from_torchrun(environ: Mapping[str, str]) -> DistributedEnv:
    world_size = _integer(environ, "WORLD_SIZE", "torchrun")
    local_rank = _integer(environ, "LOCAL_RANK", "torchrun")
    local_world_size = int(environ.get("LOCAL_WORLD_SIZE", str(world_size)))
    return DistributedEnv(
        rank=_integer(environ, "RANK", "torchrun"),
        local_rank=local_rank,
        world_size=world_size,
        local_world_size=local_world_size,
        master_addr=environ.get("MASTER_ADDR", "127.0.0.1"),
        master_port=int(environ.get("MASTER_PORT", "29500")),
        launcher="torchrun",
        # Ray and wrappers of torchrun may give each rank a mask of its own.
        device=choose_device(local_rank, local_world_size, bound=len(named_devices(environ) or ()) == 1),
    )


def _from_slurm(environ: Mapping[str, str]) -> DistributedEnv:
    world_size = tasks_of_step(environ)
    local_rank = _integer(environ, "SLURM_LOCALID", "srun")
    nodelist = environ.get("SLURM_STEP_NODELIST", environ.get("SLURM_JOB_NODELIST", "127.0.0.1"))
    local_world_size = _tasks_of_node(environ, world_size)
    return DistributedEnv(
        rank=_integer(environ, "SLURM_PROCID", "srun"),
        local_rank=local_rank,
        world_size=world_size,
        local_world_size=local_world_size,
        master_addr=environ.get("MASTER_ADDR", first_host(nodelist)),
        # Jobs that share a node must not share a port, and all ranks must agree without talking.
        master_port=int(environ.get("MASTER_PORT", 20_000 + int(environ.get("SLURM_JOB_ID", "0")) % 20_000)),
        launcher="slurm",
        device=choose_device(local_rank, local_world_size, bound=True),  # srun may bind by cgroups
    )


def _tasks_of_node(environ: Mapping[str, str], tasks: int) -> int:
    """Tasks of this step on this node; where SLURM does not say, as if all nodes had equally many."""
    counts: list[int] = []
    for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", environ.get("SLURM_STEP_TASKS_PER_NODE", "")):
        counts += [int(count)] * int(times or 1)  # 8(x51),2
    node = environ.get("SLURM_NODEID", "")
    if node.isdigit() and int(node) < len(counts):
        return counts[int(node)]
    return math.ceil(tasks / int(environ.get("SLURM_STEP_NUM_NODES", environ.get("SLURM_NNODES", "1"))))


def first_host(nodelist: str) -> str:
    """First host of a SLURM node list: "gpu[003-007,012],cpu1" -> "gpu003"."""
    match = re.match(r"([^,\[]+)(?:\[([^\]]+)\]([^,\[]*))?", nodelist)
    if match is None:
        raise ConfigError(f"cannot read the SLURM node list {nodelist!r}; set MASTER_ADDR.")
    prefix, ranges, suffix = match.groups()
    if ranges is None:
        return prefix
    return prefix + re.split(r"[-,]", ranges)[0] + (suffix or "")


def choose_device(local_rank: int = 0, local_world_size: int = 1, *, bound: bool = False) -> torch.device:
    """cuda:local_rank where the ranks of a node see all its GPUs, cuda:0 where each sees its own, else cpu.

    Args:
        bound: whether the launcher may have bound each rank to one GPU. Then one that is visible is taken
            for this rank's own, and `initialise` looks whether that is true.

    Raises:
        ConfigError: more ranks than GPUs, or GPUs that this torch cannot use.
    """
    if not torch.cuda.is_available():
        refuse_unusable_gpus(os.environ)
        return torch.device("cpu")
    count = torch.cuda.device_count()
    if count == 1 and bound:
        return torch.device("cuda:0")
    if local_world_size > count:
        raise ConfigError(
            f"{local_world_size} ranks on a node with {count} visible GPUs; start one per GPU, "
            'or set CUDA_VISIBLE_DEVICES="" to use the CPU.'
        )
    return torch.device(f"cuda:{local_rank}")


def refuse_unusable_gpus(environ: Mapping[str, str], driver: Path = NVIDIA_DRIVER) -> None:
    """Raises ConfigError where GPUs are not masked and torch sees none: training would crawl on the CPU."""
    if named_devices(environ) == [] or not driver.exists():
        return
    try:
        torch.cuda.init()
        reason = "it finds no device"
    except (RuntimeError, AssertionError) as error:  # driver too old, torch built without CUDA, a lost GPU
        reason = str(error).strip().splitlines()[0]
    raise ConfigError(
        f"{socket.gethostname()} has NVIDIA GPUs, and torch {torch.__version__} cannot use them: "
        f'{reason.rstrip(".")}; mend that, or set CUDA_VISIBLE_DEVICES="" to use the CPU.'
    )


_environment_before: dict[str, str | None] = {}


def initialise(env: DistributedEnv, timeout_s: float) -> DistributedEnv:
    """Join the process group (also with one rank: DeepSpeed wants one) and set up the device.

    Returns `env` with what only the peers know.

    GPU tensors go through NCCL and CPU tensors through gloo, so flags can be agreed on without
    waiting for the GPU.

    Raises:
        ConfigError: two ranks have one GPU, or some ranks have none.
    """
    assert not dist.is_initialized()
    raise_descriptor_limit()
    facts = {**deepspeed_variables(env), **gloo_variables(env)}
    _environment_before.update({name: os.environ.get(name) for name in facts})
    os.environ.update(facts)
    # Else each rank opens a connection to every other one: 3 N sockets for the log2 N that it talks to.
    os.environ.setdefault("TORCH_GLOO_LAZY_INIT", "1")
    os.environ.update(recorder_variables())
    if env.device.type == "cuda":
        torch.cuda.set_device(env.device)
        backend = "cpu:gloo,cuda:nccl"
    else:
        backend = "gloo"
        if "OMP_NUM_THREADS" not in os.environ:
            cores = len(os.sched_getaffinity(0))
            torch.set_num_threads(max(1, cores // env.local_world_size))
    dist.init_process_group(
        backend,
        store=dist.HashStore() if env.world_size == 1 else None,  # type: ignore[attr-defined]  # not in the stubs
        rank=env.rank,
        world_size=env.world_size,
        timeout=timedelta(seconds=timeout_s),
    )
    return meet(env)


def meet(env: DistributedEnv) -> DistributedEnv:
    """`env` with what only the peers know. Collective.

    Raises:
        ConfigError: two ranks have one GPU, or some ranks have none.
    """
    on_gpu = env.device.type == "cuda"
    uuid = str(torch.cuda.get_device_properties(env.device).uuid) if on_gpu else ""
    told = collectives.all_gather_object((socket.gethostname(), uuid, env.local_rank, env.local_world_size))
    devices = [(host, gpu) for host, gpu, _, _ in told]
    refuse_mixed_devices(devices)
    if on_gpu:
        refuse_shared_devices(devices)
    return replace(env, node_sizes=tuple(size for _, _, local_rank, size in told if local_rank == 0))


def deepspeed_variables(env: DistributedEnv) -> dict[str, str]:
    """What DeepSpeed reads, also where it was SLURM that said who we are.

    It takes LOCAL_RANK for the number of the device, which it is not where each rank sees its own alone.
    """
    facts = env.variables()
    if env.device.type == "cuda":
        facts["LOCAL_RANK"] = str(env.device.index)
    return facts


def gloo_variables(env: DistributedEnv, environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """On several nodes, the interface by which gloo meets its peers, unless it has been named."""
    if env.num_nodes == 1 or environ.get("GLOO_SOCKET_IFNAME"):
        return {}
    interface = interface_to(env.master_addr)
    return {} if interface is None else {"GLOO_SOCKET_IFNAME": interface}


def refuse_mixed_devices(devices: Sequence[tuple[str, str]]) -> None:
    """Raises ConfigError where some ranks have a GPU and others none: those would wait for each other for
    ever. `devices`: (host, GPU or "") of each rank."""
    without = [rank for rank, (_, gpu) in enumerate(devices) if not gpu]
    if not without or len(without) == len(devices):
        return
    host = devices[without[0]][0]
    error = ConfigError(
        f"{len(without)} of {len(devices)} ranks have no GPU and the others do, the first of them rank "
        f"{without[0]} on {host}; leave that node out, or mend its driver or container."
    )
    error.share = len(without) / len(devices)
    raise error


def refuse_shared_devices(devices: Sequence[Hashable]) -> None:
    """Raises ConfigError when two ranks compute on one GPU; `devices` identifies each rank's."""
    owner: dict[Hashable, int] = {}
    for rank, device in enumerate(devices):
        first = owner.setdefault(device, rank)
        if first != rank:
            raise ConfigError(
                f"ranks {first} and {rank} see the same single GPU; start one rank per GPU, "
                'or set CUDA_VISIBLE_DEVICES="" to use the CPU.'
            )


def shutdown() -> None:
    """Leave the process group, and the environment as it was before; does nothing without one."""
    if dist.is_initialized():
        # Where DeepSpeed is loaded it keeps groups, which the next run in this process must not find.
        deepspeed = sys.modules.get("deepspeed.comm.comm")
        if deepspeed is not None and deepspeed.cdb is not None:
            deepspeed.destroy_process_group()
        else:
            dist.destroy_process_group()
    for name, value in _environment_before.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
    _environment_before.clear()


def _integer(environ: Mapping[str, str], name: str, launcher: str) -> int:
    value = environ.get(name, "")
    if not value.isdigit():
        raise ConfigError(
            f"this looks like a process started by {launcher}, but {name} is {value!r}; "
            f"start the run with {launcher}, or unset its variables."
        )
    return int(value)
