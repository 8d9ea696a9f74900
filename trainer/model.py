"""The one builder: from a configuration to network, conditioner and first stage, on the meta device too."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.checkpoint.export import open_weights, read_about
from trainer.conditioning.build import Conditioner, TrainedConditions, build_conditioner
from trainer.config.checks import require_tower
from trainer.config.identity import as_trained
from trainer.config.io import config_from_dict
from trainer.config.models import TOWERS
from trainer.config.ranges import check_ranges
from trainer.config.run import Config, ConfigError
from trainer.distributed.frozen import freeze
from trainer.distributed.lora import add_adapters
from trainer.first_stage.base import FirstStage
from trainer.first_stage.build import build_first_stage, check_first_stage, load_first_stage
from trainer.first_stage.losses import PatchDiscriminator
from trainer.first_stage.statistics import require_same_statistics
from trainer.frozen_files import FIRST_STAGE, contents_of_frozen, require_contents
from trainer.interop.initialise import initialise
from trainer.models.layers import zero_module
from trainer.models.unet import UNet
from trainer.weights import Undrawn, metadata_object, read_once


class LevelUncertainty(nn.Module):
    """u at each noise level, 0 at first: one linear layer on Fourier features of the timestep.

    As EDM2's (Karras et al. 2024, equation 21 and its code), whose frequencies and phases are random, once:
    here they are quantiles of the same laws, so that there is nothing to store.
    """

    def __init__(self, timestep_scale: float, num_features: int = 128) -> None:
        """`timestep_scale` brings timesteps to about -1 .. 1."""
        super().__init__()
        self.timestep_scale = timestep_scale
        self.num_features = num_features
        self.linear = zero_module(nn.Linear(num_features, 1))

    def forward(self, timesteps: Tensor) -> Tensor:
        """[B] -> u, float32 [B]."""
        features = self.features(timesteps)
        return F.linear(features, self.linear.weight.float(), self.linear.bias.float())[:, 0]

    def features(self, timesteps: Tensor) -> Tensor:
        """[B] -> sqrt(2) cos(2 pi (f t + p)), float32 [B, num_features], of mean square 1."""
        index = torch.arange(self.num_features, device=timesteps.device, dtype=torch.float32)
        frequencies = torch.special.ndtri((index + 0.5) / self.num_features)
        phases = index * ((math.sqrt(5.0) - 1.0) / 2.0)  # golden section: even over the turn, whatever k
        turns = self.timestep_scale * timesteps.float()[:, None] * frequencies + phases
        return math.sqrt(2.0) * (2.0 * math.pi * turns).cos()


class ConditionedUNet(nn.Module):
    """The trained network: the UNet and whatever is learned with it, conditions and uncertainty."""

    def __init__(
        self,
        unet: UNet,
        conditions: TrainedConditions,
        *,
        channels_last: bool,
        uncertainty: LevelUncertainty | None = None,
    ) -> None:
        super().__init__()
        # The layout of activations follows the input's; weights stay flat slices of ZeRO's partitions.
        self._memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self.unet = unet
        self.conditions = conditions
        self.uncertainty = uncertainty

    def forward(
        self, noisy: Tensor, timesteps: Tensor, inputs: dict[str, Tensor], drop: dict[str, Tensor]
    ) -> Tensor | tuple[Tensor, Tensor]:
        """[B, C, H, W], [B], prepared conditions and their drop masks -> prediction [B, C, H, W].

        In training mode with an uncertainty: (prediction, u [B]).
        """
        dtype = self.unet.conv_in.weight.dtype
        condition = self.conditions(inputs, drop).to(dtype)
        x = noisy.to(dtype)
        if condition.concat is not None:
            x = torch.cat([x, condition.concat], dim=1)
        prediction = self.unet(
            x.contiguous(memory_format=self._memory_format),
            timesteps,
            context=condition.context,
            vector=condition.vector,
            class_labels=condition.class_labels,
        )
        if self.uncertainty is None or not self.training:
            return prediction
        return prediction, self.uncertainty(timesteps)


@dataclass(frozen=True)
class DiffusionModel:
    """A second stage: the network that is trained, and the frozen halves that feed it."""

    network: nn.Module
    """A `ConditionedUNet`, or what an engine made of it; called as (x, timesteps, inputs, drop)."""
    conditioner: Conditioner
    first_stage: FirstStage
    """Frozen, in evaluation mode."""


def build_model(config: Config, device: torch.device | None = None, *, fresh: bool = True) -> DiffusionModel:
    """The second stage: a first stage and towers with their weights, a network with fresh ones.

    Fresh weights are drawn from torch's global generator, conditions before the UNet, so seed it first.

    Args:
        device: where everything is built and drawn, so by another generator than on the CPU, the default.
        fresh: False leaves the network's random weights undrawn, for weights that are about to be loaded.

    Raises:
        ConfigError: the first stage has no weights or other ones, or the configuration contradicts itself.
    """
    device = device or torch.device("cpu")
    first_stage = load_first_stage(config.first_stage, device)
    with device:
        conditioner = build_conditioner(config.conditioning, config.first_stage)
        with nullcontext() if fresh else Undrawn():
            network = build_network(config, conditioner)
    return DiffusionModel(network, conditioner, first_stage)


def build_network(config: Config, conditioner: Conditioner) -> ConditionedUNet:
    """The trained network alone, on the default device, its UNet as wide as latents and conditions want."""
    channels = config.first_stage.channels
    unet = UNet(
        config.unet,
        in_channels=channels + conditioner.concat_channels,
        out_channels=channels,
        context_dim=conditioner.context_dim,
        vector_dim=conditioner.vector_dim,
        num_classes=conditioner.num_classes,
    )
    uncertainty = None
    if config.diffusion.learned_uncertainty:
        of_levels = config.diffusion.process != "edm"
        uncertainty = LevelUncertainty(1.0 / config.diffusion.num_timesteps if of_levels else 1.0)
    return ConditionedUNet(
        unet,
        conditioner.trained,
        channels_last=config.distributed.channels_last,
        uncertainty=uncertainty,
    )


def build_trainable(config: Config) -> tuple[ConditionedUNet, Conditioner]:
    """The network as a run trains it, with frozen parts and adapters, and its conditioner; without weights.

    On the default device: on the meta device SD2 takes seconds and no memory, and nothing is read.
    """
    conditioner = build_conditioner(config.conditioning, config.first_stage)
    network = build_network(config, conditioner)
    freeze(network, config.trainable)
    add_adapters(network, config.lora)
    return network, conditioner


def build_autoencoder(config: Config) -> dict[str, nn.Module]:
    """The networks that a first stage is trained with, by the name of their engine, on the default device.

    {"autoencoder": FirstStage, "discriminator": ... unless its weight is 0}; weights are drawn from the
    run's seed, whatever torch's global generators stand at.

    Raises:
        ConfigError: the first stage has nothing to train.
    """
    loss = config.autoencoder_loss
    device = torch.get_default_device()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(config.seed)
        autoencoder = build_first_stage(config.first_stage)
        if not autoencoder.trainable:
            raise ConfigError(
                f"first_stage.name={config.first_stage.name} has nothing to train; stage=autoencoder needs "
                "kl or vq."
            )
        if loss.learned_logvar:
            autoencoder.learn_logvar(loss.logvar_init)
        networks: dict[str, nn.Module] = {"autoencoder": autoencoder}
        if loss.discriminator_weight:
            networks["discriminator"] = PatchDiscriminator(
                channels=loss.discriminator_channels, num_layers=loss.discriminator_layers
            )
    return networks


def count_parameters(config: Config) -> dict[str, dict[str, int]]:
    """{"trained": {module: count, ..., "total": sum}, "frozen": the same}.

    Everything is built on the meta device: SD2 takes seconds and no memory, and nothing is read.
    """
    with torch.device("meta"):
        trained, frozen = _modules(config)
    counts = {
        "trained": {name: _count(module, trained=True) for name, module in trained.items()},
        "frozen": {name: _count(module, trained=None) for name, module in frozen.items()},
    }
    if config.freezes:  # the rest of what is otherwise trained
        rest = {name: _count(module, trained=False) for name, module in trained.items()}
        counts["frozen"] |= {name: count for name, count in rest.items() if count}
    return {kind: {**modules, "total": sum(modules.values())} for kind, modules in counts.items()}


def count_kernels(config: Config) -> int:
    """Elements of the trained convolutions whose kernels have more than one cell; as `count_parameters`."""
    with torch.device("meta"):
        trained, _ = _modules(config)
    parameters = [p for module in trained.values() for p in module.parameters() if p.requires_grad]
    return sum(p.numel() for p in parameters if p.dim() == 4 and p.shape[2] * p.shape[3] > 1)


def _count(module: nn.Module, *, trained: bool | None) -> int:
    return sum(p.numel() for p in module.parameters() if trained is None or p.requires_grad == trained)


def _modules(config: Config) -> tuple[dict[str, nn.Module], dict[str, nn.Module]]:
    """Trained and frozen modules by name; the first stage gets fresh weights, so that no file is needed."""
    if config.stage == "autoencoder":
        return build_autoencoder(config), {}
    network, conditioner = build_trainable(config)
    trained: dict[str, nn.Module] = {"unet": network.unet}
    if network.uncertainty is not None:
        trained["uncertainty"] = network.uncertainty
    parts = conditioner.trained.parts.items()
    trained |= {f"conditioning.{name}": part for name, part in parts if any(True for _ in part.parameters())}
    frozen: dict[str, nn.Module] = {"first_stage": build_first_stage(config.first_stage)}
    frozen |= {f"conditioning.{name}": module for name, module in conditioner.frozen.modules().items()}
    return trained, frozen


@dataclass(frozen=True)
class ModelFound:
    """A second stage with the weights of a run, before they are read: what is known in a moment."""

    config: Config
    step: int | None
    """Optimizer steps of the weights; None where a file does not say it."""
    profile: str
    """Average, or "weights"."""

    @property
    def description(self) -> str:
        """Which weights these are, for people."""
        return f"step {'?' if self.step is None else self.step}, {self.profile}"


@dataclass(frozen=True)
class TrainedModel:
    """A second stage with the weights of a run, ready to draw."""

    config: Config
    model: DiffusionModel
    description: str
    """Which weights these are, for people."""


def find_model(
    source: str,
    *,
    profile: str | None = None,
    step: int | None = None,
    first_stage_weights: str | None = None,
    latent_scale: float | None = None,
) -> ModelFound:
    """What `load_model` would load, from small files and headers alone, so that mistakes are told at once.

    Raises:
        ConfigError: as `load_model`, as far as it shows there.
    """
    metadata = read_about(source, profile=profile, step=step)
    config = _config_of(metadata, source, first_stage_weights, latent_scale)
    for name in TOWERS:
        tower = getattr(config.conditioning, name)
        if tower is not None:
            require_tower(name, tower)
    check_first_stage(config.first_stage)
    return _found(config, metadata)


def load_model(
    source: str,
    *,
    profile: str | None = None,
    step: int | None = None,
    first_stage_weights: str | None = None,
    latent_scale: float | None = None,
    device: torch.device,
    precision: Literal["fp32", "bf16"] = "fp32",
) -> TrainedModel:
    """Networks with their weights, in evaluation mode.

    Args:
        source: run folder, checkpoint folder or exported .safetensors file.
        profile: average to take, or "weights"; unset: the average where there is one.
        step: which checkpoint of a run folder; unset: the newest.
        first_stage_weights: in place of the file that the run was trained with.
        latent_scale: in place of first_stage.latent_scale, for a first stage that does not say it.
        precision: of all weights and what is computed with them, frozen ones too, as training does it.

    Raises:
        ConfigError: nothing there, not a diffusion model, or a first stage that scales latents otherwise
            than the one that it was trained with.
    """
    tensors, metadata = read_once(lambda: open_weights(source, profile=profile, step=step))
    config = _config_of(metadata, source, first_stage_weights, latent_scale)
    model = build_model(config, device, fresh=False)
    require_same_statistics(model.first_stage, tensors)
    found = contents_of_frozen(config, model.first_stage, model.conditioner)
    require_contents(
        metadata, config, found, source, meant=() if first_stage_weights is None else (FIRST_STAGE,)
    )
    new = initialise(model.network, tensors, source).new
    absent = [name for name in new if not name.startswith("uncertainty.")]  # which sampling does not read
    if absent:
        raise ConfigError(
            f"{source} lacks {len(absent)} tensors of the network, such as {absent[0]}; name a run or an "
            "export of it."
        )
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    model.network.to(dtype).eval().requires_grad_(False)
    model.first_stage.to(device, dtype)
    if config.distributed.channels_last and device.type == "cuda":
        for network in (model.network, model.first_stage):  # as their maps, or each step would convert them
            network.to(memory_format=torch.channels_last)
    model.conditioner.frozen.to(device, dtype)
    return TrainedModel(config, model, _found(config, metadata).description)


def _found(config: Config, metadata: Mapping[str, str]) -> ModelFound:
    step = metadata.get("step", "")
    return ModelFound(config, int(step) if step.isdigit() else None, metadata.get("profile", "weights"))


def _config_of(
    metadata: Mapping[str, str], source: str, first_stage_weights: str | None, latent_scale: float | None
) -> Config:
    """The configuration that weights carry, with what was said about their first stage."""
    config = config_from_dict(metadata_object(metadata, "config", source))
    if config.stage != "diffusion":
        raise ConfigError(f"{source} is a first stage, which draws nothing by itself; name a diffusion run.")
    if "network" in metadata:  # a run's; an imported network was never trained with a tower
        config = as_trained(config)
    first = config.first_stage
    if first_stage_weights is not None:
        if first.name == "identity":
            raise ConfigError(f"{source} draws pixels without a first stage; leave out --first-stage.")
        first = dataclasses.replace(first, weights=first_stage_weights)
    if latent_scale is not None:
        first = dataclasses.replace(first, latent_scale=latent_scale)
        check_ranges(first, "first_stage.")
    return dataclasses.replace(config, first_stage=first)
