"""The UNet, the first stage's encoder, the text tower with all random numbers, and what limits the card."""

from __future__ import annotations

import math
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


def training_step(network: nn.Module, inputs: dict[str, Any]) -> Callable[[], object]:
    """Forward and backward with fresh gradients, as one micro-batch of training has them."""

    def run() -> None:
        network.zero_grad(set_to_none=True)
        network(**inputs).float().square().mean().backward()

    return run


def flops_per_sample(config: Config) -> float:
    """FLOP of forward and backward of one sample, counted on the meta device."""
    inputs = network_inputs(config, 1, torch.device("cpu"), torch.float32)
    network = meta_network(config)
    with FlopCounterMode(display=False) as counter:
        network(**tree_map(lambda tensor: tensor.to("meta"), inputs)).float().sum().backward()
    return float(counter.get_total_flops())


def unet(setup: Setup) -> None:
    """Images per second of forward and backward at batch 32, 16 and 2, fused or not, and its kernels."""
    config = setup.config()
    flops = flops_per_sample(config)
    network = random_network(config, setup.device, setup.dtype).train()
    parameters = sum(p.numel() for p in network.parameters())
    setup.report(parameters=parameters, flops_per_sample=flops)
    rates = {size: _unet_rate(setup, network, size, flops) for size in (32, 16, 2)}
    setup.report(small_batch_ratio=rates[2] / rates[32])
    with plain():
        _unet_rate(setup, network, 16, flops, suffix="_plain")
    inputs = network_inputs(config, setup.batch(16), setup.device, setup.dtype)
    setup.report(kernels=profile_kinds(training_step(network, inputs), setup.device))


def _unet_rate(setup: Setup, network: nn.Module, size: int, flops: float, suffix: str = "") -> float:
    """Images per second at one batch size, reported; NaN where memory does not suffice."""
    forget()
    batch = setup.batch(size)
    inputs = network_inputs(setup.config(), batch, setup.device, setup.dtype)
    try:
        times = measure(training_step(network, inputs), setup.device, repeats=setup.repeats)
    except torch.OutOfMemoryError:
        setup.report(**{f"batch_{size}{suffix}": "out of memory"})
        network.zero_grad(set_to_none=True)
        return math.nan
    rate = 1e3 * batch / times["ms"]
    tflops = rate * flops / 1e12
    work = {"tflops": tflops, "share_of_peak": tflops / PEAK_TFLOPS, "peak_gib": peak_gib()}
    setup.report(**{f"batch_{size}{suffix}": {**times, "images_per_s": rate, **work}})
    return rate


def vae(setup: Setup) -> None:
    """Images per second of the frozen encoder at batch 16 and 32, posterior sample included."""
    config = setup.config()
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


def text(setup: Setup) -> None:
    """Milliseconds per micro-batch of 32: tokens, tower, null form, and every random number of a step."""
    config = setup.config()
    conditioner = trained_conditioner(config, setup.device, setup.dtype)
    batch, device, shape = setup.batch(32), setup.device, latent_shape(config)
    ordinals = torch.arange(batch, device=device)
    captions = tuple(f"{CAPTIONS[i % len(CAPTIONS)]}, number {i}" for i in range(batch))

    def encode() -> None:
        conditioner.frozen.prepare(captions, {}, None, first_stage=None, seed=config.seed, ordinals=ordinals)

    def draw() -> None:
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
