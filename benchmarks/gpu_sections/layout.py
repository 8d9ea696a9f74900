"""What the layout of kernels and of pixels costs, each form beside the other in one process, in turns.

The UNet with kernels of convolutions as ZeRO's partition has them and as training keeps them; all gradients
on their way into one flat vector; the first convolution of the first stage at 3 channels and at more; what
renewing the kernels costs a step; and the copy of a save.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gpu_sections.networks import training_step
from gpu_sections.recipe import Setup, network_inputs, random_network
from gpu_sections.timing import forget, in_turns, measure, profile_kinds
from trainer.checkpoint.host_buffer import HostBuffer
from trainer.distributed.acceleration import ChannelsLastKernels, GraphedForward
from trainer.distributed.process import configure_process
from trainer.kernels.accumulate import FlatGradients

SAVED_BYTES = 4 << 30
"""Of a checkpoint, enough to see how many a second are copied."""


def kernels(setup: Setup) -> None:
    """Training step, kernels `flat` and `kept`, at batch 32 and 16 and, by CUDA graphs, 2; renewing them."""
    config = setup.config()
    configure_process(config.distributed)
    networks = {name: random_network(config, setup.device, setup.dtype).train() for name in ("flat", "kept")}
    for network in networks.values():
        network.to(memory_format=torch.contiguous_format)
    relaid = ChannelsLastKernels(networks["kept"].parameters())
    setup.report(renewed=measure(relaid.follow, setup.device, repeats=setup.repeats))
    for size, graphs in ((32, False), (16, False), (2, True)):
        forget()
        batch = setup.batch(size)
        inputs = network_inputs(config, batch, setup.device, setup.dtype)
        if graphs and setup.device.type != "cuda":
            continue
        forwards: dict[str, Callable[..., Any]] = {
            name: GraphedForward(network) if graphs else network for name, network in networks.items()
        }
        arms = {name: training_step(networks[name], inputs, forward) for name, forward in forwards.items()}
        found = in_turns(arms, setup.device, repeats=setup.repeats // 2)
        for times in found.values():
            times["images_per_s"] = 1e3 * batch / times["ms"]
        setup.report(**{f"batch_{size}{'_graphs' if graphs else ''}": found})
        if size == 16:
            setup.report(kernels=profile_kinds(arms["kept"], setup.device))
            setup.report(kernels_flat=profile_kinds(arms["flat"], setup.device))
    _gradients(setup, networks)
    for network in networks.values():
        network.zero_grad(set_to_none=True)


def _gradients(setup: Setup, networks: Mapping[str, nn.Module]) -> None:
    """Milliseconds until the gradients of a micro-batch are in the flat vector: as they lie in memory when
    kernels are flat, and when they are channels-last."""
    parameters = list(networks["flat"].parameters())
    sizes = [parameter.numel() for parameter in parameters]
    sums = FlatGradients(torch.zeros(sum(sizes), device=setup.device), sizes)
    flat = [torch.zeros_like(parameter) for parameter in parameters]
    kept = [torch.zeros_like(parameter) for parameter in networks["kept"].parameters()]
    arms: dict[str, Callable[[], object]] = {
        "flat": lambda: sums.add(flat),
        "kept": lambda: sums.add(kept),
    }
    setup.report(gradients=in_turns(arms, setup.device, repeats=setup.repeats))


def pixels(setup: Setup) -> None:
    """First convolution of the first stage, forward, on fp32 pixels: 3 channels, and padded to 4 and to 8."""
    config = setup.config()
    configure_process(config.distributed)
    batch, edge, width = setup.batch(16), config.data.image_size, config.first_stage.base_channels
    x = torch.rand(batch, 3, edge, edge, device=setup.device).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(width, 3, 3, 3, device=setup.device, dtype=setup.dtype) / 5
    weight = weight.contiguous(memory_format=torch.channels_last)

    def convolve(channels: int) -> Callable[[], Tensor]:
        wide = F.pad(weight, (0, 0, 0, 0, 0, channels - 3)).contiguous(memory_format=torch.channels_last)

        def run() -> Tensor:
            padded = x.new_zeros(batch, edge, edge, channels, dtype=setup.dtype).permute(0, 3, 1, 2)
            padded[:, :3] = x
            return F.conv2d(padded, wide, padding=1)

        return run

    arms: dict[str, Callable[[], Tensor]] = {
        "channels_3": lambda: F.conv2d(x.to(setup.dtype), weight, padding=1),
        "channels_4": convolve(4),
        "channels_8": convolve(8),
    }
    want = arms["channels_3"]().float()
    for name in ("channels_4", "channels_8"):
        error = float((arms[name]().float() - want).norm() / want.norm())
        setup.report(**{f"error_{name}": error})
    setup.report(**in_turns(arms, setup.device, repeats=setup.repeats))


def save(setup: Setup) -> None:
    """GB/s of the copy that blocks a save: into the checkpoint's buffer, and into torch's pinned memory."""
    count = (1 << 20 if setup.small else SAVED_BYTES) // 4
    source = torch.randn(count, device=setup.device)
    begun = time.perf_counter()
    buffer = HostBuffer(4 * count, setup.device)
    buffer.wait()
    setup.report(made_ready_s=time.perf_counter() - begun)
    on_gpu = setup.device.type == "cuda"
    own = torch.empty(count, pin_memory=on_gpu)

    def direct() -> None:
        own.copy_(source, non_blocking=True)
        if on_gpu:
            torch.cuda.synchronize()

    arms: dict[str, Callable[[], object]] = {"buffer": lambda: buffer.fill([source]), "pinned": direct}
    for name, times in in_turns(arms, setup.device, repeats=2).items():
        setup.report(**{name: {**times, "gb_per_s": 4 * count / times["wall_ms"] / 1e6}})
    buffer.close()
