"""What a run will need on a number of GPUs, before any of them is asked: memory, time, data, days."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from data_pipeline.errors import UserError
from trainer.config.run import Config, ConfigError
from trainer.config.sharing import Sharing
from trainer.planning.machine import GIB, RESTART_S, Machine, ettr, mttf_s
from trainer.planning.memory import MemoryPlan, plan
from trainer.planning.speed import Step, step
from trainer.planning.work import Work, count_work
from trainer.reliability.watchdog import silence_s

STALL_BYTES_S = 30e9
"""At which the state goes to pinned host memory: 13.9 GB blocked training for 0.45 s on an H100."""
_MILLION = 1_000_000
_SAVE_S = 10.0
"""Shortest time that a save is allowed to take beside training, for the rate that storage must bear."""


@dataclass(frozen=True)
class Feed:
    """What the data set's files are like; nobody looks at them. Raises UserError for impossible numbers."""

    bytes_per_sample: float = 100e3
    samples_per_shard: int = 10_000

    def __post_init__(self) -> None:
        if not 0 < self.bytes_per_sample < math.inf:
            kilobytes = self.bytes_per_sample / 1e3
            raise UserError(f"--sample-kb is {kilobytes:g}; it must be a finite number above 0.")
        if self.samples_per_shard < 1:
            raise UserError(f"--shard-samples is {self.samples_per_shard}; it must be at least 1.")


@dataclass(frozen=True)
class RunPlan:
    """One run on one machine."""

    config: Config
    machine: Machine
    memory: MemoryPlan
    work: Work
    step: Step
    feed: Feed
    cached: Step | None = None
    """With `first_stage.cache`, a step whose samples all lie in it; `step` is one of which none does."""

    @property
    def cached_bytes(self) -> int:
        """What `first_stage.cache` keeps of a picture, small members and tables left out."""
        stage = self.config.first_stage
        edge = self.config.data.image_size // stage.downsampling
        return 2 * stage.latent_channels * edge**2 * (4 if stage.cache_dtype == "fp32" else 2)

    @property
    def spared_hours(self) -> float:
        """GPU-hours that a visit of a million cached samples takes less; 0 without a cache."""
        spared_s = self.step.seconds - self.cached.seconds if self.cached is not None else 0.0
        return spared_s * self.machine.gpus / self.config.global_batch_size * _MILLION / 3600

    @property
    def sharing(self) -> Sharing:
        """Of the global batch on these GPUs."""
        return self.config.sharing(self.machine.gpus)

    @property
    def activation_bytes(self) -> float:
        """Of a micro-batch, on each rank."""
        return self.sharing.rows * self.work.activation_bytes

    @property
    def device_bytes(self) -> float:
        """Of each rank, at the end of a forward."""
        return self.memory.device_bytes + self.activation_bytes

    @property
    def limit_bytes(self) -> float:
        """What tensors may take of a GPU's memory."""
        return self.machine.gpu.memory_gib * GIB * self.machine.reached.room

    @property
    def largest_micro_batch(self) -> int:
        """The most samples of a forward pass that fit; 0 where not even the weights do."""
        return max(0, int((self.limit_bytes - self.memory.device_bytes) // self.work.activation_bytes))

    @property
    def best_micro_batch(self) -> int:
        """Samples of each of the fewest passes that fit; 0 where none fits."""
        most = self.largest_micro_batch
        return replace(self.sharing, at_once=most).rows if most else 0

    @property
    def images_per_s(self) -> float:
        """Of all ranks."""
        return self.config.global_batch_size / self.step.seconds

    @property
    def mfu(self) -> float:
        """Model FLOPs of the trained network over the peak, while training."""
        rate = self.images_per_s / self.machine.gpus * 3 * self.work.forward_flops
        return rate / (self.machine.gpu.peak_tflops * 1e12)

    @property
    def interval_s(self) -> float:
        """Between checkpoints, the first of which is at the start and the last after the last step."""
        return min(self.config.checkpoint.every or self.config.steps, self.config.steps) * self.step.seconds

    @property
    def stall_s(self) -> float:
        """For which a save blocks training."""
        return self.memory.staging_bytes / STALL_BYTES_S

    @property
    def goodput(self) -> float:
        """Share of the time that makes steps that last, by the formula of docs/reliability.md."""
        d = self.config.distributed
        detect = silence_s(d, self.machine.nodes) or d.timeout_s  # of the collective that hangs
        return ettr(self.interval_s, detect, RESTART_S, self.stall_s, mttf_s(self.machine.gpus))

    @property
    def hours(self) -> float | None:
        """Of the whole run, faults included; None where it would not get on."""
        return self.config.steps * self.step.seconds / 3600 / self.goodput if self.goodput else None

    def figures(self) -> dict[str, Any]:
        """For programs."""
        m, s, work = self.memory, self.step, self.work
        rate = self.images_per_s
        return {
            "gpu": self.machine.gpu.name,
            "gpus": self.machine.gpus,
            "nodes": self.machine.nodes,
            "memory_bytes": {
                "weights": m.weights,
                "gradients": m.gradients,
                "optimizer": m.optimizer,
                "ema": m.ema,
                "frozen": m.frozen,
                "activations": self.activation_bytes,
                "total": self.device_bytes,
                "limit": self.limit_bytes,
                "host_staging": m.staging_bytes,
            },
            "fits": self.device_bytes <= self.limit_bytes,
            "largest_micro_batch": self.largest_micro_batch,
            "best_micro_batch": self.best_micro_batch,
            "accumulation": self.sharing.micro_batches,
            "micro_batch": self.sharing.rows,
            "padding": self.sharing.waste,
            "flops_per_sample": {"network": work.network_flops, "frozen": work.frozen_flops},
            "launches": work.launches,
            "seconds_per_step": {
                "encode": s.encode_s,
                "network": s.network_s,
                "optimizer": s.optimizer_s,
                "communication": s.communication_s,
                "exposed_communication": s.exposed_s,
                "total": s.seconds,
            },
            "seconds_per_cached_step": None if self.cached is None else self.cached.seconds,
            "cached_bytes_per_sample": None if self.cached is None else self.cached_bytes,
            "gpu_hours_spared_per_million": None if self.cached is None else self.spared_hours,
            "bound_by_launches": s.bound_by_launches,
            "images_per_s": rate,
            "images_per_s_per_gpu": rate / self.machine.gpus,
            "mfu": self.mfu,
            "data_bytes_per_s": rate * self.feed.bytes_per_sample,
            "shards_per_s": rate / self.feed.samples_per_shard,
            "checkpoint": {
                "bytes": m.checkpoint_bytes,
                "every_s": self.interval_s,
                "bytes_per_s": m.checkpoint_bytes / self.interval_s,
                "stall_s": self.stall_s,
            },
            "mttf_s": mttf_s(self.machine.gpus),
            "goodput": self.goodput,
            "days": None if self.hours is None else self.hours / 24,
            "gpu_hours": None if self.hours is None else self.hours * self.machine.gpus,
        }


def make_plan(config: Config, machine: Machine, feed: Feed | None = None) -> RunPlan:
    """Count on the meta device and model the rest: seconds, no GPU, nothing downloaded.

    Raises:
        ConfigError: it is a first stage, its global batch has no sample for each of so many GPUs, or the
            machine is no place for its precision.
    """
    work = count_work(config)
    if config.distributed.precision != "bf16":
        raise ConfigError("a plan knows the rates of bf16 alone; set distributed.precision=bf16.")
    needed = plan(config, machine.gpus, machine.gpus_per_node)
    timed = step(config, work, machine, needed.trained_parameters)
    cached = None
    if config.first_stage.cache is not None:
        cached = step(config, replace(work, encoder_flops=0.0), machine, needed.trained_parameters)
    return RunPlan(config, machine, needed, work, timed, feed or Feed(), cached)


def describe(planned: RunPlan) -> str:
    """One screen for people."""
    p, m, s, gpus = planned, planned.memory, planned.step, planned.machine.gpus
    rate = p.images_per_s
    parts = {
        "weights": m.weights,
        "gradients": m.gradients,
        "optimizer": m.optimizer,
        "averages": m.ema,
        "frozen": m.frozen,
        "activations": p.activation_bytes,
    }
    memory = ", ".join(f"{name} {size / GIB:.2f}" for name, size in parts.items())
    verdict = "fits" if p.device_bytes <= p.limit_bytes else "DOES NOT FIT"
    sharing = p.sharing
    most = p.largest_micro_batch
    best = f"; {p.best_micro_batch} makes the fewest passes" if p.best_micro_batch else ""
    padding = sharing.sentence() if sharing.waste else None
    bound = " (bound by launches: distributed.cuda_graphs=true replays them)" if s.bound_by_launches else ""
    exposed = f"{1e3 * s.exposed_s:.1f} of {1e3 * s.communication_s:.1f} ms of communication"
    parts_ms = f"encode {1e3 * s.encode_s:.1f} ms, network {1e3 * s.network_s:.1f} ms"
    step_parts = f"{parts_ms}, optimizer and averages {1e3 * s.optimizer_s:.1f} ms, {exposed}"
    save_s = min(p.interval_s, _SAVE_S)
    traffic = f"{m.checkpoint_bytes / save_s / 1e9:.2g} GB/s to be done in {save_s:.0f} s"
    saved = f"{m.checkpoint_bytes / 1e9:.1f} GB every {p.interval_s / 60:.1f} min"
    flops = p.work.network_flops, p.work.frozen_flops
    shards = rate / p.feed.samples_per_shard
    rows = {
        "machine": f"{gpus} x {p.machine.gpu.name} in {p.machine.nodes} node(s)",
        "memory": f"{p.device_bytes / GIB:.1f} of {p.limit_bytes / GIB:.1f} GiB per rank: {verdict}",
        "": f"GiB: {memory}; on the host {m.staging_bytes / GIB:.2f} for checkpoints",
        "micro-batch": f"{sharing.rows} x {sharing.micro_batches}; at most {most} fit{best}",
        "padding": padding,
        "FLOPs": f"{flops[0] / 1e12:.3f} T per sample trained, {flops[1] / 1e12:.3f} T frozen",
        "step": f"{s.seconds:.4g} s{bound}",
        " ": step_parts,
        "once cached": _cached(p),
        "  ": _worth(p),
        "speed": f"{rate:,.0f} images/s, {rate / gpus:.1f} per GPU; {100 * p.mfu:.1f} % of the peak",
        "data": f"{rate * p.feed.bytes_per_sample / 1e6:,.0f} MB/s, {shards:.3g} shards/s",
        "checkpoint": f"{saved}, {traffic}; blocks {p.stall_s:.3f} s",
        "goodput": f"{100 * p.goodput:.1f} % at a fault every {mttf_s(gpus) / 3600:.1f} h",
        "time": _time(p),
    }
    lines = [f"{name:<12} {text}" for name, text in rows.items() if text]
    return "\n".join([*lines, "A model, not a measurement: docs/planning.md has its formulas and residuals."])


def _cached(planned: RunPlan) -> str | None:
    """What first_stage.cache makes of a step, once it holds every sample."""
    if planned.cached is None:
        return None
    seconds = planned.cached.seconds
    rate = planned.config.global_batch_size / seconds
    return f"{seconds:.4g} s, {rate:,.0f} images/s; below, as if nothing is"


def _worth(planned: RunPlan) -> str | None:
    """From which price of storage on first_stage.cache does not pay."""
    if planned.cached is None:
        return None
    gigabytes, hours = planned.cached_bytes * _MILLION / 1e9, planned.spared_hours
    return (
        f"a million samples take {gigabytes:,.1f} GB and spare {hours:.3g} GPU-hours at each later visit: "
        f"it pays while keeping 1 GB until then costs less than {hours / gigabytes:.2g} GPU-hours"
    )


def _time(planned: RunPlan) -> str:
    if planned.hours is None:
        return "it would not get on: more time is lost than made"
    days, hours = planned.hours / 24, planned.hours * planned.machine.gpus
    return f"{days:.2f} days for {planned.config.steps:,} steps, {hours:,.0f} GPU-hours"
