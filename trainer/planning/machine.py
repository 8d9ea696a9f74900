"""The machines that a plan can be made for: data sheets, how much of them is reached, how often they fail.

Shares of the data sheet were measured on one H100 (benchmarks/RESULTS.md, One GPU) and are taken to hold for
every other GPU, which nobody has measured here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from data_pipeline.errors import UserError

GIB = 2**30

# Measured by Kokolis et al. (2024, arXiv 2410.21680) on 1,024 A100: 7.9 hours between failures; the mean
# time falls as 1 / GPUs.
MTTF_1024_S = 7.9 * 3600
RESTART_S = 180.0
"""Assumed, not measured: scheduler, imports, NCCL, loading."""


@dataclass(frozen=True)
class GPU:
    """One accelerator, by its data sheet."""

    name: str
    peak_tflops: float
    """bf16, dense."""
    memory_gib: float
    bandwidth_tb_s: float
    link_gb_s: float
    """To the other GPUs of its node, each way."""
    network_gb_s: float
    """Of a usual node of eight, each way: what its network cards carry together."""


GPUS = {
    gpu.name: gpu
    for gpu in (
        GPU("a100-40", 312, 39.4, 1.555, 300, 200),
        GPU("a100-80", 312, 79.2, 2.039, 300, 200),
        GPU("h100", 989, 79.1, 3.35, 450, 400),
        GPU("h200", 989, 139.8, 4.8, 450, 400),
        GPU("b200", 2250, 178.0, 8.0, 900, 400),
        GPU("l40s", 362, 44.4, 0.864, 25, 50),
    )
}
"""a100-80: 8 x 200 Gbit/s, h100: 8 x 400 Gbit/s per node."""


@dataclass(frozen=True)
class Reached:
    """How much of a data sheet software reaches, and what it spends beside."""

    network: float = 0.435
    """Share of the peak, by the trained network's forward and backward once they are long enough."""
    frozen: float = 0.49
    """The same of the first stage and the towers."""
    gap_s: float = 7.2e-6
    """Of the device between two launches, queued or replayed from a graph."""
    encode_s: float = 7.4e-3
    """Per micro-batch, for tokens, random numbers and copies beside the frozen networks."""
    memory: float = 0.63
    """Share of the memory's bandwidth, by optimizer and averages."""
    link: float = 0.8
    """Share of links and network, by collectives of many megabytes."""
    latency_s: float = 20e-6
    """Per message of a collective and doubling of the ranks."""
    hidden: float = 0.5
    """Share of the communication that costs nothing where it overlaps with backward."""
    room: float = 0.94
    """Share of the memory that tensors may take: the rest is CUDA, NCCL and what lies between tensors."""


@dataclass(frozen=True)
class Machine:
    """GPUs in nodes."""

    gpu: GPU
    gpus: int
    gpus_per_node: int = 8
    network_gb_s: float = 0.0
    """Of a node, each way."""
    launch_s: float = 20e-6
    """The processor's time for one launch, in Python; 80 on the virtual cores of benchmarks/RESULTS.md."""
    reached: Reached = Reached()

    @property
    def nodes(self) -> int:
        """Nodes that the job takes."""
        return -(-self.gpus // self.gpus_per_node)

    def bus_bytes_s(self, *, within_node: bool = False, groups: int = 1) -> float:
        """What a ring of all ranks, or of those of a node, moves past each of them.

        groups: of ranks that leave a node at once, each with rings of its own: they share its network.
        """
        slowest = self.gpu.link_gb_s
        if self.nodes > 1 and not within_node:
            # A group has several rings, each through another network card: one alone has all the cards.
            slowest = min(slowest, (self.network_gb_s or self.gpu.network_gb_s) / groups)
        return slowest * 1e9 * self.reached.link


def machine(
    name: str, gpus: int, *, gpus_per_node: int = 8, network_gbit_s: float = 0.0, launch_us: float = 20.0
) -> Machine:
    """The machine that a person names.

    Raises:
        UserError: an unknown GPU, or impossible numbers.
    """
    if name not in GPUS:
        raise UserError(f"there is no GPU {name!r} in the table; choose one of {', '.join(GPUS)}.")
    if gpus < 1 or gpus_per_node < 1:
        raise UserError("a plan needs at least one GPU, in nodes of at least one.")
    for flag, value in (("--network", network_gbit_s), ("--launch-us", launch_us)):
        if not 0 <= value < math.inf:
            raise UserError(f"{flag} is {value:g}; it must be a finite number, at least 0.")
    per_node = min(gpus, gpus_per_node)
    return Machine(GPUS[name], gpus, per_node, network_gbit_s / 8, launch_us * 1e-6)


def mttf_s(gpus: int) -> float:
    """Mean seconds between failures of a job on so many GPUs."""
    return MTTF_1024_S * 1024 / gpus


def ettr(interval_s: float, detect_s: float, restart_s: float, stall_s: float, mttf_s: float) -> float:
    """Effective training time ratio: 1 - (I/2 + D + R) / MTTF - S / I (first order in 1 / MTTF)."""
    return max(0.0, 1 - (interval_s / 2 + detect_s + restart_s) / mttf_s - stall_s / interval_s)
