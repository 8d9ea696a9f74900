"""How far `ldm plan` is from what others and we have measured: the residuals of docs/planning.md.

    python benchmarks/planning.py

For published runs the model is given their machine: its data sheet, the rate on one node (from which the
share of the peak that their code reaches follows) and how their code spreads its state. The other rows are
predicted. Nothing is measured here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from trainer.config.io import load_config
from trainer.planning.machine import GIB, Machine, machine
from trainer.planning.plan import make_plan
from trainer.planning.speed import Collective, micro_batch_s, optimizer_s
from trainer.planning.work import Work, count_work

CONFIGS = {edge: f"configs/sd/sd2_base_{edge}.yaml" for edge in (256, 512)}
PARAMETERS = 865_910_724
# NVIDIA's submission of MLPerf Training v4.0, Stable Diffusion v2, 512 px: (GPUs, samples per GPU, images/s
# per GPU), from the logs' median block throughput. Latents and text precomputed, 16-bit gradients in six
# buckets that overlap, state spread within the node, the whole iteration one CUDA graph, no average.
MLPERF = ((8, 64, 126.0), (64, 16, 110.5), (512, 4, 73.5), (1024, 2, 48.7))
# MosaicML's SD2 (mosaicml/diffusion README): global batch 2048, latents precomputed, state spread over all
# ranks, no average, no graphs: edge -> (GPUs, images/s).
MOSAIC = {
    256: ((8, 1100.0), (16, 2180.0), (32, 4080.0), (64, 8530.0), (128, 11600.0)),
    512: ((8, 290.0), (16, 585.0), (32, 1195.0), (64, 2340.0), (128, 4590.0)),
}
MOSAIC_BATCH = 2048
MOSAIC_MICRO_BATCH = {256: 32, 512: 16}
"""Assumed: the largest of their benchmarks; the last row of each is 16 anyway."""
MOSAIC_LAUNCHES_S = 0.16
"""Of a forward and backward: fitted to the one row where a micro-batch is too short for the processor."""
# benchmarks/RESULTS.md, One GPU (H100): edge, micro-batch, global batch, CUDA graphs, images/s.
OURS = ((512, 32, 64, False, 110.0), (256, 64, 256, True, 427.0))
OUR_MEMORY_GIB = 42.5
# The UNet alone there, with CUDA graphs: samples -> images/s.
OUR_NETWORK = {2: 78.0, 4: 113.0, 8: 142.0, 16: 159.0, 32: 168.0}


@dataclass(frozen=True)
class Row:
    """One figure, predicted and measured."""

    what: str
    predicted: float
    measured: float
    given: bool = False
    """It is what the model was given."""

    @property
    def residual(self) -> float:
        """Relative."""
        return self.predicted / self.measured - 1


def count(edge: int) -> Work:
    """SD2's work at this edge."""
    return count_work(load_config(CONFIGS[edge]))


def others_step_s(
    work: Work,
    samples: int,
    accumulation: int,
    place: Machine,
    exchanged: Sequence[Collective],
    *,
    spread: int,
) -> float:
    """Step of another code: its frozen networks precomputed, its optimizer spread over `spread` ranks."""
    network = accumulation * micro_batch_s(work, samples, place, graphs=place.launch_s == 0)
    update = optimizer_s(PARAMETERS, 0, place, update=spread, average=1)
    exposed = (1 - place.reached.hidden) * sum(each.seconds(place) for each in exchanged)
    return network + update + exposed


def reaching(place: Machine, share: float) -> Machine:
    """The same machine, with code that reaches this share of the peak."""
    return replace(place, reached=replace(place.reached, network=share))


def share_for(
    work: Work, samples: int, accumulation: int, place: Machine, seconds: float, rest: float
) -> float:
    """Share of the peak at which a step of one node takes so long; `rest` is what is not its FLOPs."""
    flops = accumulation * samples * work.network_flops
    return flops / (place.gpu.peak_tflops * 1e12 * (seconds - rest))


def mlperf() -> list[Row]:
    """Images per second and GPU, and efficiency against 8 GPUs."""
    work = count(512)
    half = 2.0 * PARAMETERS
    exchanged = [
        Collective("all-reduce", half, messages=6),
        Collective("all-gather", half, messages=6, within_node=True),
    ]

    def seconds(gpus: int, samples: int, share: float) -> float:
        place = replace(reaching(machine("h100", gpus), share), launch_s=0.0)
        return others_step_s(work, samples, 1, place, exchanged, spread=8)

    gpus, samples, rate = MLPERF[0]
    rest = seconds(gpus, 0, 1.0)
    share = share_for(work, samples, 1, machine("h100", gpus), samples / rate, rest)
    base = samples / seconds(gpus, samples, share)
    rows = []
    for gpus, samples, rate in MLPERF:
        made = samples / seconds(gpus, samples, share)
        rows.append(Row(f"MLPerf v4.0, {gpus} H100 x {samples}, images/s per GPU", made, rate, gpus == 8))
        if gpus > 8:
            rows.append(Row(f"  efficiency against 8, {gpus}", made / base, rate / MLPERF[0][2]))
    return rows


def mosaic() -> list[Row]:
    """Images per second, and efficiency against 8 GPUs."""
    rows = []
    for edge, published in MOSAIC.items():
        work = count(edge)
        exchanged = [
            Collective("reduce-scatter", 4.0 * PARAMETERS, messages=18),
            Collective("all-gather", 2.0 * PARAMETERS, messages=18),
        ]

        def seconds(
            gpus: int,
            share: float,
            *,
            edge: int = edge,
            work: Work = work,
            exchanged: list[Collective] = exchanged,
        ) -> float:
            samples = min(MOSAIC_MICRO_BATCH[edge], MOSAIC_BATCH // gpus)
            place = reaching(machine("a100-40", gpus), share)
            place = replace(place, launch_s=MOSAIC_LAUNCHES_S / work.launches)
            accumulation = MOSAIC_BATCH // gpus // samples
            return others_step_s(work, samples, accumulation, place, exchanged, spread=gpus)

        gpus, rate = published[0]
        low, high = 0.05, 1.0
        for _ in range(60):  # the share of the peak that gives the rate of one node
            middle = (low + high) / 2
            low, high = (low, middle) if MOSAIC_BATCH / seconds(gpus, middle) > rate else (middle, high)
        base = MOSAIC_BATCH / seconds(gpus, low) / gpus
        for gpus, rate in published:
            made = MOSAIC_BATCH / seconds(gpus, low)
            rows.append(Row(f"Mosaic, {edge} px, {gpus} A100, images/s", made, rate, gpus == 8))
        rate_of_one = published[0][1] / published[0][0]
        kept = rate / gpus / rate_of_one
        rows.append(Row(f"  efficiency against 8 at {edge} px, {gpus}", made / gpus / base, kept))
    return rows


def ours() -> list[Row]:
    """Our own runs on one H100, and the network alone."""
    rows = []
    for edge, micro, batch, graphs, rate in OURS:
        config = load_config(
            CONFIGS[edge],
            [
                f"micro_batch_size={micro}",
                f"global_batch_size={batch}",
                f"distributed.cuda_graphs={str(graphs).lower()}",
                "distributed.channels_last_kernels=false",  # which came after these figures
            ],
        )
        planned = make_plan(config, machine("h100", 1))
        rows.append(Row(f"ours, {edge} px, micro-batch {micro}, images/s", planned.images_per_s, rate))
        if edge == 512:
            rows.append(Row("  memory, GiB", planned.device_bytes / GIB, OUR_MEMORY_GIB))
    work, place = count(512), machine("h100", 1)
    for samples, rate in OUR_NETWORK.items():
        made = samples / micro_batch_s(work, samples, place, graphs=True)
        rows.append(Row(f"  the UNet alone, {samples} at once, images/s", made, rate))
    return rows


def main() -> None:
    """Print the table of docs/planning.md."""
    print("| figure | predicted | measured | residual |\n| --- | --- | --- | --- |")
    for row in [*ours(), *mlperf(), *mosaic()]:
        said = "given" if row.given else f"{100 * row.residual:+.1f} %"
        digits = ".2f" if row.measured < 1 else ".4g"
        print(f"| {row.what.strip()} | {row.predicted:{digits}} | {row.measured:{digits}} | {said} |")


if __name__ == "__main__":
    main()
