"""The doctor on the machines: the same software on every rank, clocks, all-reduce bandwidth, and room.

Room is what the run will need in memory and on disk, against what is free.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
import time
from pathlib import Path

import torch
import torch.distributed as dist

from data_pipeline.errors import Failure
from data_pipeline.storage.urls import is_local, local_path
from trainer.checkpoint.catalogue import checkpoints_url, is_committed, steps_found
from trainer.config.io import config_to_dict
from trainer.config.run import Config
from trainer.distributed import collectives
from trainer.distributed.env import DistributedEnv
from trainer.doctor.check import Check, on_every_rank
from trainer.planning.memory import plan

_PACKAGES = ("torch", "deepspeed", "numpy", "webdataset", "safetensors", "fsspec")
_REDUCE_ELEMENTS = {"cpu": 4_000_000, "cuda": 64_000_000}
_REDUCE_ROUNDS = 3
_MIN_BYTES_PER_S = {"cpu": 2e7, "cuda": 1e9}
_CLOCK_ROUNDS = 5
_MAX_SKEW_S = 2.0
# Activations depend on micro-batch and resolution; without this much left there is no point.
_RESERVE = 0.2


def check_versions(config: Config, env: DistributedEnv) -> list[Check]:
    """Python, packages, device, precision and configuration are the same everywhere. Collective."""
    facts = {"python": platform.python_version(), "device": _device_name(env)}
    facts |= {name: importlib.metadata.version(name) for name in _PACKAGES}
    if env.device.type == "cuda":
        facts["cuda"] = str(torch.version.cuda)
        facts["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    settings = json.dumps(config_to_dict(config), sort_keys=True).encode()
    facts["configuration"] = hashlib.sha256(settings).hexdigest()[:12]
    everywhere = collectives.all_gather_object(facts)
    differing = [
        f"{name}: {', '.join(sorted({str(other.get(name)) for other in everywhere}))}"
        for name in facts
        if len({other.get(name) for other in everywhere}) > 1
    ]
    same = (
        f"torch {facts['torch']}, deepspeed {facts['deepspeed']}, python {facts['python']}, {facts['device']}"
    )
    remedy = "install constraints.txt on every node and start all ranks from one configuration."
    checks = [Check("versions", not differing, "; ".join(differing) or same, remedy)]
    if config.distributed.precision == "bf16" and env.device.type == "cuda":
        supported = not collectives.any_rank(not torch.cuda.is_bf16_supported(including_emulation=False))
        checks.append(
            Check(
                "bf16",
                supported,
                "supported" if supported else "not supported",
                "set distributed.precision=fp32.",
            )
        )
    return checks


def check_clocks(config: Config, env: DistributedEnv) -> list[Check]:
    """Wall clocks of all ranks, read right after a barrier. Collective.

    Nothing in a run depends on the wall clock, but S3 refuses requests from a clock that is minutes
    off, and logs of several nodes cannot be laid side by side.
    """
    # The smallest spread of several rounds: a rank that leaves a barrier late looks like skew.
    spreads = []
    for _ in range(_CLOCK_ROUNDS):
        collectives.barrier()
        clocks = collectives.all_gather_object(time.time())
        spreads.append(max(clocks) - min(clocks))
    skew = min(spreads)
    remedy = "synchronise the nodes' clocks (chrony or systemd-timesyncd)."
    detail = f"differ by at most {skew * 1000:.1f} ms"
    return [Check("clocks", skew < _MAX_SKEW_S, detail, remedy, machine=env.num_nodes > 1)]


def check_all_reduce(config: Config, env: DistributedEnv) -> list[Check]:
    """Bandwidth of a large all-reduce on the training device. Collective."""
    name, kind = "all-reduce", env.device.type
    if env.world_size == 1:
        return [Check(name, True, "one rank, nothing to reduce")]
    elements = min(config.distributed.reduce_bucket_elements, _REDUCE_ELEMENTS[kind])
    payload = torch.ones(elements, device=env.device)
    dist.all_reduce(payload)  # connections are made by the first one
    seconds = []
    for _ in range(_REDUCE_ROUNDS):
        payload.fill_(1.0)
        _synchronize(env)
        collectives.barrier()
        started = time.perf_counter()
        dist.all_reduce(payload)
        _synchronize(env)
        seconds.append(time.perf_counter() - started)
    correct = not collectives.any_rank(bool((payload != env.world_size).any()))
    slowest = max(collectives.all_gather_object(min(seconds)))
    # Every rank sends and receives 2 (N - 1) / N of the payload (Patarasuk and Yuan 2009).
    moved = 2 * (env.world_size - 1) / env.world_size * elements * payload.element_size()
    rate = moved / slowest
    detail = f"{rate / 1e9:.2f} GB/s per rank for {elements * payload.element_size() / 1e6:.0f} MB"
    if not correct:
        detail = f"the sum over {env.world_size} ranks is wrong"
    remedy = (
        "look at NCCL_DEBUG=INFO for the chosen transport (slurm/README.md lists the variables), or leave "
        "out the slow node."
    )
    machine = correct and env.num_nodes > 1  # a slow node may not be there next time
    return [Check(name, correct and rate > _MIN_BYTES_PER_S[kind], detail, remedy, machine)]


def check_memory(config: Config, env: DistributedEnv) -> list[Check]:
    """Device and host memory on every rank. Collective."""
    needed = plan(config, env.world_size, env.ranks_per_node)
    parameters = f"{needed.trained_parameters / 1e6:.1f} M trained"

    def examine() -> str:
        host = available_host_bytes() / env.local_world_size
        on_device = needed.device_bytes
        if env.device.type == "cuda":
            free, total = torch.cuda.mem_get_info(env.device)
            limit, where = free - _RESERVE * total, "GPU"
        else:
            limit, where = host * (1 - _RESERVE), "host"
            on_device += needed.staging_bytes
        detail = (
            f"{parameters}: {on_device / 2**30:.2f} GiB of {limit / 2**30:.1f} GiB {where} memory per rank "
            "before activations"
        )
        if on_device > limit or needed.staging_bytes > host:
            raise MemoryError(f"{detail}, {needed.staging_bytes / 2**30:.2f} GiB on the host for checkpoints")
        return detail

    more = "distributed.shard_ranks" if config.distributed.engine == "fsdp" else "distributed.zero_stage"
    remedy = f"raise {more}, use more ranks, or drop EMA profiles (ema.power_stds)."
    return [on_every_rank("memory", remedy, examine)]


def check_disk(config: Config, env: DistributedEnv) -> list[Check]:
    """Room for the checkpoints that retention keeps and are not stored yet, plus the one being written.
    Collective."""
    size = plan(config, env.world_size, env.ranks_per_node).checkpoint_bytes
    kept = config.checkpoint.keep_last + config.checkpoint.keep_best + 1
    if config.checkpoint.keep_every:
        kept += config.steps // config.checkpoint.keep_every
    local = is_local(config.run_dir)
    stored = collectives.from_main_rank(lambda: _stored_checkpoints(config.run_dir)) if local else 0
    wanted = size * max(1, kept - stored)
    there = f" ({stored} there)" if stored else ""
    detail = f"{kept} checkpoints{there} of {size / 2**30:.2f} GiB"

    def examine() -> str:
        if not local:
            return f"{detail} in object storage"
        free = shutil.disk_usage(_existing_parent(Path(local_path(config.run_dir)))).free
        if free < wanted:
            raise OSError(f"{detail} need {wanted / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free")
        return f"{detail}, {free / 2**30:.1f} GiB are free"

    remedy = "free space, choose another run_dir, or lower checkpoint.keep_last, keep_every or keep_best."
    return [on_every_rank("disk", remedy, examine)]


def _stored_checkpoints(run_dir: str) -> int:
    """How many are committed; 0 where the folder does not say, which is for another check to tell."""
    folder = checkpoints_url(run_dir)
    try:
        return sum(is_committed(folder, step) for step in steps_found(folder))
    except Failure:
        return 0


def _device_name(env: DistributedEnv) -> str:
    return torch.cuda.get_device_name(env.device) if env.device.type == "cuda" else platform.machine()


def _synchronize(env: DistributedEnv) -> None:
    if env.device.type == "cuda":
        torch.cuda.synchronize(env.device)


def available_host_bytes() -> int:
    """Memory that this container may still use, or that the machine has left."""
    available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        available = int(fields["MemAvailable"].split()[0]) * 1024
    limit = Path("/sys/fs/cgroup/memory.max")
    used = Path("/sys/fs/cgroup/memory.current")
    if limit.exists() and used.exists() and limit.read_text().strip() != "max":
        available = min(available, int(limit.read_text()) - int(used.read_text()))
    return available


def _existing_parent(path: Path) -> Path:
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path
