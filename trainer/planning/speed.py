"""Seconds of an optimizer step, from counted work and a machine: few terms, each with its source.

micro-batch    launches x gap + samples x FLOPs / (peak x share), or launches x the processor's launch
               where that is longer and no graph is replayed
encoding       the same for the frozen networks, with a constant of their own
optimizer      bytes of masters, moments, averages and gradients that a rank owns, over the bandwidth
communication  passes x bytes x (n - 1) / n over the slowest link of a ring, a node's network being shared
               by the groups that leave it at once, and a latency per message that grows with log2 n; a
               share is hidden behind backward where it overlaps
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from trainer.config.run import Config
from trainer.ema import profile_names
from trainer.planning.machine import Machine
from trainer.planning.work import Work

_OPTIMIZER_BYTES = 38
"""Of a trained parameter, read and written in a step: gradient 12 (norm, update, zero), master 8, moments 16,
compute weight 2."""
_AVERAGE_BYTES = 8
_BLOCKS = 39
"""Messages of fsdp each way: the blocks of SD2's UNet, and what is in none."""


@dataclass(frozen=True)
class Collective:
    """One kind of exchange between the ranks."""

    kind: Literal["all-reduce", "reduce-scatter", "all-gather"]
    num_bytes: float
    """Of the whole tensor."""
    times: int = 1
    """In an optimizer step."""
    messages: int = 1
    """Pieces that it is done in."""
    within_node: bool = False
    ranks: int = 0
    """That take part; 0: all of the node or of the machine."""
    groups: int = 1
    """That do it at once and leave the same node."""

    def seconds(self, machine: Machine) -> float:
        """Of a step; nothing where it is among one rank."""
        ranks = self.ranks or (machine.gpus_per_node if self.within_node else machine.gpus)
        if ranks == 1:
            return 0.0
        passes = 2 if self.kind == "all-reduce" else 1
        moved = passes * self.num_bytes * (ranks - 1) / ranks
        bus = machine.bus_bytes_s(within_node=self.within_node, groups=self.groups)
        latency = passes * self.messages * machine.reached.latency_s * math.ceil(math.log2(ranks))
        return self.times * (moved / bus + latency)


@dataclass(frozen=True)
class Step:
    """Where the seconds of one optimizer step go."""

    encode_s: float
    network_s: float
    optimizer_s: float
    communication_s: float
    """All of it, hidden or not."""
    exposed_s: float
    """What of it training waits for."""
    bound_by_launches: bool
    """The processor launches more slowly than the GPU works."""

    @property
    def seconds(self) -> float:
        """Of the whole step."""
        return self.encode_s + self.network_s + self.optimizer_s + self.exposed_s


def micro_batch_s(work: Work, samples: int, machine: Machine, *, graphs: bool) -> float:
    """Forward and backward of the trained network."""
    return max(_device_s(work, samples, machine), 0.0 if graphs else work.launches * machine.launch_s)


def _device_s(work: Work, samples: int, machine: Machine) -> float:
    flops = samples * work.network_flops
    reached = machine.reached
    return work.launches * reached.gap_s + flops / (machine.gpu.peak_tflops * 1e12 * reached.network)


def encode_s(work: Work, samples: int, machine: Machine) -> float:
    """The frozen networks, of one micro-batch; nothing where there are none."""
    if not work.frozen_flops:
        return 0.0
    flops = samples * work.frozen_flops
    return machine.reached.encode_s + flops / (machine.gpu.peak_tflops * 1e12 * machine.reached.frozen)


def optimizer_s(parameters: float, averages: int, machine: Machine, *, update: int, average: int) -> float:
    """Norm, clip, AdamW and averages.

    Args:
        update: ranks over which the optimizer's state is spread. average: ranks that share the averages.
    """
    moved = parameters * (_OPTIMIZER_BYTES / update + averages * _AVERAGE_BYTES / average)
    return moved / (machine.gpu.bandwidth_tb_s * 1e12 * machine.reached.memory)


def collectives(config: Config, parameters: int, accumulation: int, machine: Machine) -> list[Collective]:
    """What the configured engine exchanges in an optimizer step; docs/engines.md has the table."""
    d = config.distributed
    compute = 2 if d.precision == "bf16" else 4
    whole = compute * float(parameters)
    pieces = max(1, -(-parameters // d.reduce_bucket_elements))
    sent = (2.0 if d.reduce_precision == "bf16" else 4.0) * parameters
    if d.engine == "fsdp":
        cut, node = config.shard_size(machine.gpus, machine.gpus_per_node), machine.gpus_per_node
        copies = machine.gpus // cut
        # Neighbours cut together: where that does not come out even with nodes, two groups meet in one.
        leaving = 2 if cut % node and min(copies, machine.nodes - 1) > 1 else 1
        inside = {"messages": _BLOCKS, "within_node": node % cut == 0, "ranks": cut, "groups": leaving}
        # Each rank of a node with those of the other nodes that hold its rows, all at once.
        across = Collective("all-reduce", sent / cut, messages=_BLOCKS, ranks=copies, groups=min(cut, node))
        return [
            Collective("reduce-scatter", sent, **inside),  # type: ignore[arg-type]
            *([across] if copies > 1 else []),
            Collective("all-gather", whole, **inside),  # type: ignore[arg-type]
        ]
    if d.engine == "torch" or d.zero_stage == 0:
        # DeepSpeed accumulates and reduces stage 0 in the compute precision, the plain engine in fp32.
        each = 4.0 if d.engine == "torch" else float(compute)
        return [Collective("all-reduce", each * parameters, messages=pieces)]
    # Stages 1 in fp32 and 2 of DeepSpeed all-reduce buckets that hold parts of several ranks.
    scatters = d.zero_stage == 3 or (d.zero_stage == 1 and d.precision == "bf16")
    reduce = Collective(
        "reduce-scatter" if scatters else "all-reduce",
        sent,
        times=1 if d.zero_stage == 1 else accumulation,
        messages=pieces,
    )
    gathers = 2 * accumulation if d.zero_stage == 3 else 1
    return [reduce, Collective("all-gather", whole, times=gathers, messages=pieces)]


def step(config: Config, work: Work, machine: Machine, parameters: int) -> Step:
    """One optimizer step of a configuration.

    Raises:
        ConfigError: the global batch has no sample for each of so many GPUs.
    """
    sharing, d = config.sharing(machine.gpus), config.distributed
    accumulation, samples = sharing.micro_batches, sharing.rows
    device = _device_s(work, samples, machine)
    network = micro_batch_s(work, samples, machine, graphs=d.cuda_graphs)
    total = sum(each.seconds(machine) for each in collectives(config, parameters, accumulation, machine))
    update = machine.gpus if d.engine == "deepspeed" and d.zero_stage > 0 else 1
    if d.engine == "fsdp":
        update = config.shard_size(machine.gpus, machine.gpus_per_node)
    hidden = machine.reached.hidden if d.overlap_communication or d.engine == "fsdp" else 0.0
    return Step(
        encode_s=accumulation * encode_s(work, samples, machine),
        network_s=accumulation * network,
        optimizer_s=optimizer_s(
            parameters,
            len(profile_names(config.ema)),
            machine,
            update=update,
            average=machine.gpus,
        ),
        communication_s=total,
        exposed_s=total * (1 - hidden),
        bound_by_launches=network > device,
    )
