"""Count trained and frozen parameters per module.

Everything is built on the meta device: SD2 takes seconds and no memory, and nothing is downloaded.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable

import torch
from torch import nn

from trainer.config.io import load_config
from trainer.config.run import Config

EXAMPLE = "example: ldm params configs/sd/sd2_base_512.yaml --json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """CONFIG, overrides and the output form."""
    parser.add_argument("config", metavar="CONFIG", help="YAML file")
    parser.add_argument("overrides", nargs="*", metavar="a.b=c", help="settings that win over the file")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Print the table or the JSON object."""
    counts = count_parameters(load_config(args.config, args.overrides))
    if args.json:
        print(json.dumps(counts))
        return 0
    for kind, modules in counts.items():
        for name, count in modules.items():
            print(f"{kind:8} {name:28} {count:>15,}  {count / 1e6:10.2f} M")
    return 0


def count_parameters(config: Config) -> dict[str, dict[str, int]]:
    """{"trained": {module: count, ..., "total": sum}, "frozen": the same}."""
    with torch.device("meta"):
        trained, frozen = _networks(config)
    counts = {
        kind: {name: _count(module.parameters()) for name, module in modules.items()}
        for kind, modules in (("trained", trained), ("frozen", frozen))
    }
    return {kind: {**modules, "total": sum(modules.values())} for kind, modules in counts.items()}


def _networks(config: Config) -> tuple[dict[str, nn.Module], dict[str, nn.Module]]:
    if config.stage == "autoencoder":
        from trainer.stages.autoencoder import build_networks

        return build_networks(config), {}
    from trainer.conditioning.build import build_conditioner
    from trainer.first_stage.build import build_first_stage
    from trainer.stages.diffusion import build_network

    conditioner = build_conditioner(config.conditioning, config.first_stage)
    network = build_network(config, conditioner)
    trained: dict[str, nn.Module] = {"unet": network.unet}
    parts = conditioner.trained.parts.items()
    trained |= {f"conditioning.{name}": part for name, part in parts if _count(part.parameters())}
    frozen: dict[str, nn.Module] = {"first_stage": build_first_stage(config.first_stage)}
    frozen |= {f"conditioning.{name}": module for name, module in conditioner.frozen.modules().items()}
    return trained, frozen


def _count(parameters: Iterable[nn.Parameter]) -> int:
    return sum(parameter.numel() for parameter in parameters)
