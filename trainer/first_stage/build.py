"""Choose, load, save and normalise first stages."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from trainer.config.models import FirstStageConfig
from trainer.config.network_plan import norm_groups
from trainer.config.run import ConfigError
from trainer.first_stage.autoencoder_kl import AutoencoderKL
from trainer.first_stage.autoencoder_vq import AutoencoderVQ
from trainer.first_stage.base import LATENT_BUFFERS, FirstStage
from trainer.first_stage.identity import Identity
from trainer.weights import check_fit, read_weights, shapes_of

FIRST_STAGES: dict[str, type[FirstStage]] = {
    "kl": AutoencoderKL,
    "vq": AutoencoderVQ,
    "identity": Identity,
}
WEIGHTS_FILE = "first_stage.safetensors"
"""Name of the weights inside an exported folder."""
STRUCTURE = (
    "name", "base_channels", "channel_multipliers", "num_res_blocks", "latent_channels",
    "attention_factors", "middle_attention", "codebook_size", "num_groups",
)  # fmt: skip
"""Fields of the configuration that the weights depend on; they travel in the file's metadata."""


def build_first_stage(config: FirstStageConfig) -> FirstStage:
    """The network, with fresh weights from torch's global generator; works on the meta device."""
    return FIRST_STAGES[config.name](config)


def load_first_stage(config: FirstStageConfig, device: torch.device | str = "cpu") -> FirstStage:
    """The frozen network in eval mode on the device, with its weights and latent statistics.

    Raises:
        ConfigError: no weights are named, they belong to another structure, or nothing says how
            latents are scaled.
    """
    if config.name == "identity":
        return _frozen(build_first_stage(config).to(device), config)
    if config.weights is None:
        raise ConfigError(
            "first_stage.weights is not set: a diffusion run needs a trained first stage; name an exported "
            "file, or train one with stage=autoencoder first."
        )
    url = config.weights
    if not url.endswith(".safetensors"):
        url = f"{url.rstrip('/')}/{WEIGHTS_FILE}"
    tensors, metadata = read_weights(url)
    with torch.device("meta"):
        module = build_first_stage(config)
    _check_structure(config, metadata, url)
    module.to_empty(device=device)
    load_first_stage_tensors(module, tensors, url)
    if config.latent_scale is None and any(name not in tensors for name in LATENT_BUFFERS):
        raise ConfigError(
            f"{url} does not say how latents are scaled; set first_stage.latent_scale "
            "(Stable Diffusion: 0.18215, SDXL: 0.13025, the paper's VQ models: 1)."
        )
    return _frozen(module, config)


def load_first_stage_tensors(module: FirstStage, tensors: dict[str, Tensor], source: str) -> None:
    """Copy weights in, all or nothing; missing latent statistics are left as they are.

    Raises:
        ConfigError: names or shapes differ; they are listed.
    """
    own = module.state_dict()
    given = {name: value for name, value in tensors.items() if name != "logvar" or name in own}
    optional = (*LATENT_BUFFERS, "logvar")
    wanted = {
        name: tuple(value.shape) for name, value in own.items() if name in given or name not in optional
    }
    remedy = (
        f"Adapt the first_stage section (first_stage.name={module.config.name}), or convert the file with "
        "`ldm import`."
    )
    check_fit(wanted, shapes_of(given), source, remedy)
    module.load_state_dict(given, strict=False)


def first_stage_tensors(module: FirstStage) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Weights with latent statistics, and metadata with the structure, for `write_weights`."""
    tensors = {n: v.detach() for n, v in module.state_dict().items() if n != "logvar"}
    return tensors, first_stage_metadata(module.config)


def first_stage_metadata(config: FirstStageConfig) -> dict[str, str]:
    """{"first_stage": JSON of the fields that the weights depend on}"""
    fields = dataclasses.asdict(config) | {"num_groups": norm_groups(config)}
    return {"first_stage": json.dumps({name: fields[name] for name in STRUCTURE})}


def measure_latent_statistics(
    first_stage: FirstStage,
    pixels: Iterable[Tensor],
    sum_over_ranks: Callable[[Tensor], Tensor],
    *,
    per_channel: bool,
) -> tuple[Tensor, Tensor]:
    """Shift and scale [z] that give latents unit variance over everything all ranks have seen.

    Moments of the posterior are taken in closed form, so nothing is drawn. Every rank gets the same
    result, whatever its share of the pictures.

    Args:
        first_stage: its present statistics do not matter.
        pixels: this rank's pictures, [B, 3, H, W] each, in -1 .. 1.
        sum_over_ranks: sums a float64 tensor over all ranks (the identity function on one).
        per_channel: mean and std of each channel; otherwise shift 0 and one global std.
    """
    device = first_stage.latent_shift.device
    # Rows: number of elements, sum of z, sum of z**2.
    sums = torch.zeros(3, first_stage.config.channels, dtype=torch.float64, device=device)
    with torch.no_grad():
        for batch in pixels:
            first, second = first_stage.second_moment(first_stage.encode(batch))
            terms = (torch.ones_like(first), first, second)
            sums += torch.stack([x.sum(dim=(0, 2, 3), dtype=torch.float64) for x in terms])
    count, first, second = sum_over_ranks(sums).unbind()
    assert bool((count > 0).all()), "no pictures to measure latent statistics on"
    if not per_channel:
        count, first, second = (x.sum().expand_as(x) for x in (count, first, second))
    mean = first / count
    std = (second / count - mean.square()).clamp(min=1e-12).sqrt()
    shift = mean if per_channel else torch.zeros_like(mean)
    return shift.float(), (1.0 / std).float()


def _frozen(module: FirstStage, config: FirstStageConfig) -> FirstStage:
    if config.latent_scale is not None:
        shift = torch.zeros_like(module.latent_shift)
        module.set_latent_statistics(shift, shift + config.latent_scale)
    return module.requires_grad_(False).eval()


def _check_structure(config: FirstStageConfig, metadata: dict[str, str], url: str) -> None:
    """Name the differing field where the file knows its structure: clearer than tensor shapes."""
    if "first_stage" not in metadata:
        return
    stored = json.loads(metadata["first_stage"])
    wanted = json.loads(first_stage_metadata(config)["first_stage"])
    for name, value in wanted.items():
        relevant = name != "codebook_size" or config.name == "vq"
        if relevant and name in stored and stored[name] != value:
            raise ConfigError(
                f"{url} was trained with first_stage.{name}={stored[name]}, but the configuration says "
                f"{value}; set first_stage.{name} accordingly."
            )
