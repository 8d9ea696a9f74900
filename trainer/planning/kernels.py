"""The fused kernels of a configuration's micro-batch, compiled before training comes to its first step."""

from __future__ import annotations

from math import prod
from typing import Any

import torch

from trainer.config.run import Config
from trainer.first_stage.build import build_first_stage, frozen_dtype
from trainer.kernels import philox
from trainer.kernels.accumulate import FlatGradients
from trainer.kernels.ahead import compile_launches
from trainer.model import build_trainable
from trainer.planning.work import AttentionCounter, network_inputs


def compile_kernels(config: Config, ranks: int, threads: int) -> list[tuple[str, Any]]:
    """Into Triton's cache on disk, for this process's GPU: what a rank of the diffusion stage launches.

    Square pictures of data.image_size; other buckets share most of it. Softmax of the first stage's attention
    is left to the first step.

    Returns:
        See `compile_launches`; nothing where the configuration takes no fused kernels.
    """
    if config.stage != "diffusion" or not config.distributed.fuses:
        return []
    dtype = frozen_dtype(config.distributed)  # which the trained network computes in, too
    rows = config.sharing(ranks).rows

    def micro_batch() -> None:
        network, conditioner = build_trainable(config)
        network.to(dtype)
        x, timesteps, named = network_inputs(config, network, conditioner, rows)
        with AttentionCounter():
            network.unet(x, timesteps, **named).float().square().mean().backward()
        parameters = [parameter for parameter in network.unet.parameters() if parameter.requires_grad]
        sizes = [parameter.numel() for parameter in parameters]
        FlatGradients(torch.empty(sum(sizes)), sizes).add([parameter.grad for parameter in parameters])

        ordinals = torch.empty(rows, dtype=torch.int64)
        philox.draw(ordinals, config.seed, 0, prod(x.shape[1:]), True)
        philox.draw(ordinals, config.seed, 0, 1, False)  # a timestep, what is dropped

        stage = build_first_stage(config.first_stage).to(dtype).eval().requires_grad_(False)
        stage.to(memory_format=torch.channels_last)
        size = config.data.image_size
        pixels = torch.empty(rows, 3, size, size, dtype=dtype)
        with torch.no_grad(), AttentionCounter():
            stage.encode(pixels.contiguous(memory_format=torch.channels_last))

    return compile_launches(micro_batch, threads)
