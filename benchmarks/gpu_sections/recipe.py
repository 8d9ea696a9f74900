"""What the sections have in common: the configurations, networks with random weights, inputs, results."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gpu_sections.processes import ROOT
from trainer.conditioning.build import Conditioner, build_conditioner
from trainer.config.io import load_config
from trainer.config.run import Config
from trainer.distributed.acceleration import ChannelsLastKernels, keeps_kernels
from trainer.first_stage.base import FirstStage
from trainer.first_stage.build import build_first_stage
from trainer.model import ConditionedUNet, build_network

CONFIGS = {512: "configs/sd/sd2_base_512.yaml", 256: "configs/sd/sd2_base_256.yaml"}
SMALL_EDGE = {512: 32, 256: 16}
SMALL = (
    "unet.model_channels=32",
    "unet.channel_multipliers=[1,2]",
    "unet.attention_factors=[2]",
    "unet.num_res_blocks=1",
    "unet.head_dim=16",
    "unet.num_groups=16",
    "first_stage.base_channels=16",
    "first_stage.channel_multipliers=[1,1,1,1]",
    "first_stage.num_res_blocks=1",
    "conditioning.openclip.model=ViT-B-32",
    "conditioning.openclip.pretrained=random",
    "conditioning.openclip.width=32",
    "conditioning.openclip.layers=2",
    "conditioning.openclip.heads=2",
    "conditioning.openclip.context_length=16",
    "distributed.precision=fp32",
)
"""The same structure at a size that two CPU cores train in seconds."""

FIRST_STAGE_FILE = "first_stage.safetensors"
TOWER_FILE = "text_tower.safetensors"
SHARDS = "shards"


@dataclass(frozen=True)
class Setup:
    """Where a section runs, at what size, and where it leaves its figures."""

    work: Path
    """Holds the shards and weights that `prepare` made."""
    result: Path
    """JSON file, rewritten with every figure."""
    small: bool
    train_steps: int
    overrides: tuple[str, ...] = ()
    """Extra settings of the recipe."""

    @property
    def device(self) -> torch.device:
        """The GPU, or the CPU where none is visible."""
        return torch.device("cpu" if self.small or not torch.cuda.is_available() else "cuda")

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the networks."""
        return torch.float32 if self.small else torch.bfloat16

    @property
    def repeats(self) -> int:
        """Measured calls."""
        return 2 if self.small else 8

    def batch(self, size: int) -> int:
        """A batch of the real run, or what stands for it in a small one."""
        return max(1, size // 16) if self.small else size

    def files(self) -> list[str]:
        """Overrides that name the prepared shards and weights (a shrunk tower's are seeded)."""
        named = [
            f"data.shards={self.work}/{SHARDS}/*.tar",
            f"first_stage.weights={self.work}/{FIRST_STAGE_FILE}",
        ]
        tower = [] if self.small else [f"conditioning.openclip.pretrained={self.work}/{TOWER_FILE}"]
        return [*named, *tower]

    def arguments(self, edge: int) -> list[str]:
        """Configuration file of the recipe at `edge` pixels, and the overrides that make it run here."""
        small = [*SMALL, f"data.image_size={SMALL_EDGE[edge]}"] if self.small else []
        return [str(ROOT / CONFIGS[edge]), *small, *self.files()]

    def config(self, edge: int = 512, overrides: Sequence[str] = ()) -> Config:
        """The same as an object."""
        path, *own = self.arguments(edge)
        return load_config(path, [*own, *self.overrides, *overrides])

    def report(self, **figures: Any) -> None:
        """Add figures to the result file at once: a section that is killed later keeps them."""
        known = json.loads(self.result.read_text()) if self.result.exists() else {}
        self.result.write_text(json.dumps({**known, **figures}, indent=1, default=str))


def trained_conditioner(config: Config, device: torch.device, dtype: torch.dtype) -> Conditioner:
    """The conditioner as training has it, with the weights that the configuration names."""
    with device:
        conditioner = build_conditioner(config.conditioning, config.first_stage)
    conditioner.frozen.to(device, dtype)
    return conditioner


def meta_conditioner(config: Config) -> Conditioner:
    """Names and widths only, in no memory and without reading weights."""
    with torch.device("meta"):
        return build_conditioner(config.conditioning, config.first_stage)


def meta_network(config: Config) -> ConditionedUNet:
    """The trained network's structure."""
    conditioner = meta_conditioner(config)
    with torch.device("meta"):
        return build_network(config, conditioner)


def random_network(config: Config, device: torch.device, dtype: torch.dtype) -> ConditionedUNet:
    """The trained network with random weights, drawn on the device, laid out as training has them."""
    network = meta_network(config).to_empty(device=device)
    fill(network)
    network.to(dtype)
    if keeps_kernels(config.distributed):
        ChannelsLastKernels(network.parameters())
    return network


def random_first_stage(config: Config, device: torch.device, dtype: torch.dtype) -> FirstStage:
    """The frozen first stage with random weights, drawn on the device."""
    with torch.device("meta"):
        module = build_first_stage(config.first_stage)
    module.to_empty(device=device)
    fill(module)
    scale = torch.full_like(module.latent_scale, config.first_stage.latent_scale or 1.0)
    module.set_latent_statistics(torch.zeros_like(scale), scale)
    if config.distributed.channels_last and device.type == "cuda":  # as training has it
        module.to(memory_format=torch.channels_last)
    return module.to(dtype).requires_grad_(False).eval()


@torch.no_grad()
def fill(module: nn.Module, seed: int = 0) -> None:
    """Scaled normal weights, norms that change nothing, biases of zero."""
    torch.manual_seed(seed)
    for name, parameter in module.named_parameters():
        if parameter.dim() > 1:
            parameter.normal_(std=math.sqrt(1.0 / parameter[0].numel()))
        else:
            is_norm = name.endswith("weight") and ("norm" in name or "ln_" in name)
            parameter.fill_(1.0 if is_norm else 0.0)


def network_inputs(config: Config, batch: int, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """What the trained network is called with: noisy latents, timesteps, inputs, drop masks."""
    conditioner = meta_conditioner(config)
    tower = config.conditioning.openclip
    assert tower is not None, "the recipes here are conditioned on text"
    edge = config.data.image_size // config.first_stage.downsampling
    length, width = tower.context_length or 77, conditioner.context_dim or 0
    drawn = torch.Generator(device).manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=drawn, device=device)

    null = normal(1, length, width).to(dtype)
    return {
        "noisy": normal(batch, config.first_stage.channels, edge, edge),
        "timesteps": torch.randint(0, 1000, (batch,), generator=drawn, device=device),
        "inputs": {
            "openclip.context": normal(batch, length, width).to(dtype),
            "openclip.null_context": null.expand(batch, -1, -1),
        },
        "drop": {"openclip": torch.arange(batch, device=device) % 10 == 9},
    }
