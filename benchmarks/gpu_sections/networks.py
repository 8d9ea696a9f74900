"""The UNet, the first stage's encoder, the text tower with all random numbers, and what limits the card."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map
from torch.utils.flop_counter import FlopCounterMode

from gpu_sections.recipe import (
    Setup,
    meta_network,
    network_inputs,
    random_first_stage,
    random_network,
    trained_conditioner,
)
from gpu_sections.timing import forget, measure, peak_gib, profile_kinds
from trainer.config.run import Config
from trainer.distributed.acceleration import GraphedForward, compile_regions
from trainer.distributed.process import configure_process
from trainer.kernels.language import plain
from trainer.rng import Purpose, normal, permutation, uniform

PEAK_TFLOPS = 989.0
"""Dense bf16 of an H100 or H200 SXM by the datasheet."""
CAPTIONS = (
    "a small red circle left of a large blue square on a white background",
    "two green triangles above a yellow circle, photographed from afar",
    "a street at dusk after the rain, neon signs reflected in the puddles, 35 mm film",
    "portrait of an old fisherman with a grey beard, oil on canvas",
)


def training_step(
    network: nn.Module, inputs: dict[str, Any], forward: Callable[..., torch.Tensor] | None = None
) -> Callable[[], object]:
    """Forward and backward with fresh gradients, as one micro-batch of training has them.

    `forward` is what stands for the network's own forward, such as its CUDA graphs.
    """
    call, args = forward or network, tuple(inputs.values())

    def run() -> None:
        network.zero_grad(set_to_none=True)
        call(*args).float().square().mean().backward()

    return run


def flops_per_sample(config: Config) -> float:
    """FLOP of forward and backward of one sample, counted on the meta device."""
    inputs = network_inputs(config, 1, torch.device("cpu"), torch.float32)
    network = meta_network(config)
    with FlopCounterMode(display=False) as counter:
        network(**tree_map(lambda tensor: tensor.to("meta"), inputs)).float().sum().backward()
    return float(counter.get_total_flops())


def unet(setup: Setup) -> None:
    """Images per second of forward and backward at batch 32, 16 and 2, its kernels, and without our own."""
    bench = Bench(setup)
    rates = {size: bench.rate(size, f"batch_{size}") for size in (32, 16, 2)}
    setup.report(small_batch_ratio=rates[2] / rates[32])
    inputs = network_inputs(bench.config, setup.batch(16), setup.device, setup.dtype)
    setup.report(kernels=profile_kinds(training_step(bench.network, inputs), setup.device))
    with plain():
        bench.rate(16, "batch_16_plain")
    torch.backends.cudnn.benchmark = True
    bench.rate(16, "batch_16_cudnn_benchmark")


def unet_compiled(setup: Setup) -> None:
    """The same with `distributed.compile`, how long its first call takes, and graphs on top."""
    bench = Bench(setup)
    compile_regions(bench.network)
    begun = time.perf_counter()
    bench.rate(32, "batch_32", repeats=1)
    setup.report(first_call_s=time.perf_counter() - begun)
    for size in (32, 2):  # each size is compiled anew
        bench.rate(size, f"batch_{size}")
    inputs = network_inputs(bench.config, setup.batch(32), setup.device, setup.dtype)
    setup.report(
        kernels=profile_kinds(training_step(bench.network, inputs), setup.device),
        compilations=dict(torch._dynamo.utils.counters["stats"]),
    )
    if not setup.small:
        bench.rate(2, "batch_2_graphs", graphs=True)


def unet_graphs(setup: Setup) -> None:
    """The same with `distributed.cuda_graphs`, for small batches."""
    if setup.device.type != "cuda":
        setup.report(skipped="no GPU, no CUDA graphs")
        return
    bench = Bench(setup)
    for size in (2, 4, 8, 16):
        bench.rate(size, f"batch_{size}", graphs=True)


class Bench:
    """A UNet with random weights whose training step is measured at several batch sizes."""

    def __init__(self, setup: Setup) -> None:
        self.setup, self.config = setup, setup.config()
        configure_process(self.config.distributed)
        self.flops = flops_per_sample(self.config)
        self.network = random_network(self.config, setup.device, setup.dtype).train()
        parameters = sum(p.numel() for p in self.network.parameters())
        setup.report(parameters=parameters, flops_per_sample=self.flops)

    def rate(self, size: int, name: str, *, repeats: int | None = None, graphs: bool = False) -> float:
        """Images per second at one batch size, reported under `name`; NaN where memory does not suffice."""
        setup, network = self.setup, self.network
        forget()
        batch = setup.batch(size)
        inputs = network_inputs(self.config, batch, setup.device, setup.dtype)
        forward = GraphedForward(network) if graphs else None
        try:
            run = training_step(network, inputs, forward)
            times = measure(run, setup.device, repeats=repeats or setup.repeats)
        except torch.OutOfMemoryError:
            setup.report(**{name: "out of memory"})
            return math.nan
        finally:
            network.zero_grad(set_to_none=True)
        rate = 1e3 * batch / times["ms"]
        tflops = rate * self.flops / 1e12
        work = {"tflops": tflops, "share_of_peak": tflops / PEAK_TFLOPS, "peak_gib": peak_gib()}
        setup.report(**{name: {**times, "images_per_s": rate, **work}})
        return rate


def vae(setup: Setup) -> None:
    """Images per second of the frozen encoder at batch 16 and 32, posterior sample included."""
    config = setup.config()
    configure_process(config.distributed)
    first_stage = random_first_stage(config, setup.device, setup.dtype)
    edge = config.data.image_size
    for size in (16, 32):
        forget()
        batch = setup.batch(size)
        pixels = torch.rand(batch, 3, edge, edge, device=setup.device) * 2 - 1
        noise = torch.randn(batch, *latent_shape(config), device=setup.device)

        def encode(pixels: torch.Tensor = pixels, noise: torch.Tensor = noise) -> None:
            with torch.no_grad():
                first_stage.latents(pixels, noise)

        times = measure(encode, setup.device, repeats=setup.repeats)
        rate = 1e3 * batch / times["ms"]
        setup.report(**{f"batch_{size}": {**times, "images_per_s": rate, "peak_gib": peak_gib()}})
        if size == 16:
            setup.report(kernels=profile_kinds(encode, setup.device))
            with plain():
                setup.report(batch_16_plain=measure(encode, setup.device, repeats=setup.repeats))
            torch.backends.cudnn.benchmark = True
            setup.report(batch_16_cudnn_benchmark=measure(encode, setup.device, repeats=setup.repeats))
            torch.backends.cudnn.benchmark = config.distributed.cudnn_benchmark


def text(setup: Setup) -> None:
    """Milliseconds per micro-batch of 32: tokens, tower, null form, and every random number of a step."""
    config = setup.config()
    configure_process(config.distributed)
    conditioner = trained_conditioner(config, setup.device, setup.dtype)
    batch, device, shape = setup.batch(32), setup.device, latent_shape(config)
    ordinals = torch.arange(batch, device=device)
    captions = tuple(f"{CAPTIONS[i % len(CAPTIONS)]}, number {i}" for i in range(batch))

    def encode() -> None:
        conditioner.frozen.prepare(captions, {}, None, first_stage=None, seed=config.seed, ordinals=ordinals)

    def draw() -> None:
        if config.diffusion.timesteps == "stratified":
            permutation(config.seed, 1, Purpose.STRATUM, 2 * batch, device)
        normal(config.seed, ordinals, Purpose.POSTERIOR, shape)
        uniform(config.seed, ordinals, Purpose.TIMESTEP, ())
        normal(config.seed, ordinals, Purpose.NOISE, shape)
        conditioner.drop_masks(config.seed, ordinals)

    def both() -> None:
        encode()
        draw()

    for name, run in (("both", both), ("text", encode), ("random", draw)):
        setup.report(**{name: measure(run, device, repeats=2 * setup.repeats)})
    with plain():
        setup.report(random_plain=measure(draw, device, repeats=setup.repeats))
    setup.report(kernels=profile_kinds(both, device))


def machine(setup: Setup) -> None:
    """The two ceilings: a bf16 product of random 8192-cubes, and a copy within device memory."""
    edge, count = (256, 1 << 20) if setup.small else (8192, 1 << 31)
    a, b = (torch.randn(edge, edge, device=setup.device, dtype=setup.dtype) for _ in range(2))
    product = measure(lambda: a @ b, setup.device, repeats=10)
    source = torch.randn(count // 4, device=setup.device)
    target = torch.empty_like(source)
    copy = measure(lambda: target.copy_(source), setup.device, repeats=10)
    setup.report(
        matmul_tflops=2 * edge**3 / product["ms"] / 1e9,
        copy_tb_per_s=2 * 4 * source.numel() / copy["ms"] / 1e9,
    )


def latent_shape(config: Config) -> tuple[int, int, int]:
    """(z, h, w)"""
    edge = config.data.image_size // config.first_stage.downsampling
    return config.first_stage.channels, edge, edge
