"""The doctor on room: what the run will need in memory and on disk, against what is free."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import torch

from data_pipeline.storage.urls import is_local, local_path
from trainer.config.run import Config
from trainer.distributed.env import DistributedEnv
from trainer.doctor.check import Check, on_every_rank
from trainer.planning.memory import plan

# Activations depend on micro-batch and resolution; without this much left there is no point.
_RESERVE = 0.2


def check_memory(config: Config, env: DistributedEnv) -> list[Check]:
    """Device and host memory on every rank. Collective."""
    needed = plan(config, env.world_size)
    parameters = f"{needed.trained_parameters / 1e6:.1f} M trained"

    def examine() -> str:
        host = _available_host_bytes() / env.local_world_size
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

    remedy = "raise distributed.zero_stage, use more ranks, or drop EMA profiles (ema.power_stds)."
    return [on_every_rank("memory", remedy, examine)]


def check_disk(config: Config, env: DistributedEnv) -> list[Check]:
    """Room for the checkpoints that retention keeps, plus the one being written. Collective."""
    size = plan(config, env.world_size).checkpoint_bytes
    kept = config.checkpoint.keep_last + config.checkpoint.keep_best + 1
    if config.checkpoint.keep_every:
        kept += config.steps // config.checkpoint.keep_every
    wanted = size * kept
    detail = f"{kept} checkpoints of {size / 2**30:.2f} GiB"

    def examine() -> str:
        if not is_local(config.run_dir):
            return f"{detail} in object storage"
        free = shutil.disk_usage(_existing_parent(Path(local_path(config.run_dir)))).free
        if free < wanted:
            raise OSError(f"{detail} need {wanted / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free")
        return f"{detail}, {free / 2**30:.1f} GiB are free"

    remedy = "free space, choose another run_dir, or lower checkpoint.keep_last, keep_every or keep_best."
    return [on_every_rank("disk", remedy, examine)]


def _available_host_bytes() -> int:
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
