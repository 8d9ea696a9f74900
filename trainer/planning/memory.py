"""Bytes that a run needs: on each rank, on the host beside it, and in storage for a checkpoint."""

from __future__ import annotations

import functools
from dataclasses import dataclass

from trainer.config.run import Config
from trainer.distributed.acceleration import keeps_kernels
from trainer.ema import profile_names
from trainer.model import count_kernels, count_parameters

FP32 = 4


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes that one rank holds through the run, before activations."""

    trained_parameters: int
    weights: float
    """Compute weights of the trained network, on the device; so the next four."""
    gradients: float
    optimizer: float
    """Master weights and the optimizer's moments; Adafactor's means, below 0.02 bytes a parameter, are not
    counted."""
    ema: float
    frozen: float
    """Weights of the first stage and of frozen towers."""
    staging_bytes: int
    """Host memory of a checkpoint on its way to storage."""
    checkpoint_bytes: int
    """One checkpoint, over all ranks."""

    @property
    def device_bytes(self) -> int:
        """All that lies on the device."""
        return round(self.weights + self.gradients + self.optimizer + self.ema + self.frozen)


@functools.cache
def plan(config: Config, world_size: int, ranks_per_node: int) -> MemoryPlan:
    """Parameter counts (on the meta device) times bytes, divided as the engine divides them."""
    counts = count_parameters(config)
    trained, frozen = counts["trained"]["total"], counts["frozen"]["total"]
    d = config.distributed
    compute = 2 if d.precision == "bf16" else FP32
    profiles, moments = len(profile_names(config.ema)), len(config.optimizer.moments)
    zero = d.zero_stage if d.engine == "deepspeed" else 0
    master = FP32 if compute != FP32 or d.engine == "fsdp" or zero > 0 else 0
    cut = world_size if zero >= 1 else 1  # ranks over which the optimizer's state is spread
    if d.engine == "fsdp":
        cut = config.shard_size(world_size, ranks_per_node)
    stored = (1 + moments + profiles) * FP32 * trained
    kept = (
        count for name, count in counts["frozen"].items() if name != "total" and name in counts["trained"]
    )
    stored += FP32 * sum(kept)  # of the network, where a part of it is trained
    relaid = count_kernels(config) if zero == 1 and keeps_kernels(d) else 0  # beside the flat ones
    return MemoryPlan(
        trained_parameters=trained,
        weights=(trained + relaid) * compute / (world_size if zero == 3 else 1),
        gradients=trained * FP32 / (world_size if zero >= 2 else 1),  # fsdp: whole until a step's last
        optimizer=trained * (master + moments * FP32) / cut,
        # The averages lie beside what each rank owns at every stage.
        ema=trained * profiles * FP32 / world_size,
        frozen=float(frozen * compute),
        staging_bytes=round(stored / world_size),
        checkpoint_bytes=stored,
    )
