"""The doctor on the machines: all-reduce bandwidth, clocks, and the same software on every rank."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
import time

import torch
import torch.distributed as dist

from trainer.config.io import config_to_dict
from trainer.config.run import Config
from trainer.distributed import collectives
from trainer.distributed.env import DistributedEnv
from trainer.doctor.check import Check

_PACKAGES = ("torch", "deepspeed", "numpy", "webdataset", "safetensors", "fsspec")
_REDUCE_ELEMENTS = {"cpu": 4_000_000, "cuda": 64_000_000}
_REDUCE_ROUNDS = 3
_MIN_BYTES_PER_S = {"cpu": 2e7, "cuda": 1e9}
_CLOCK_ROUNDS = 5
_MAX_SKEW_S = 2.0


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


def _device_name(env: DistributedEnv) -> str:
    return torch.cuda.get_device_name(env.device) if env.device.type == "cuda" else platform.machine()


def _synchronize(env: DistributedEnv) -> None:
    if env.device.type == "cuda":
        torch.cuda.synchronize(env.device)
