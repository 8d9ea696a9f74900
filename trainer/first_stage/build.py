"""Choose, load and save first stages."""

from __future__ import annotations

import dataclasses
import json

import torch
from torch import Tensor

from trainer.config.checks import require_first_stage
from trainer.config.models import FirstStageConfig
from trainer.config.network_plan import norm_groups
from trainer.config.run import ConfigError
from trainer.config.training import DistributedConfig
from trainer.first_stage.autoencoders import AutoencoderKL, AutoencoderVQ, Identity
from trainer.first_stage.base import LATENT_BUFFERS, FirstStage
from trainer.first_stage.statistics import MARK, MEASURED, UNMEASURED, require_statistics
from trainer.weights import TORCH_ENDINGS, check_fit, metadata_object, read_metadata, read_weights, shapes_of

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
            latents are scaled: their statistics were never measured, or are absent.
    """
    if config.name == "identity":
        return _frozen(build_first_stage(config).to(device), config)
    url = _weights_url(config)
    tensors, metadata = read_weights(url)
    _check_structure(config, metadata, url)
    module = first_stage_of(config, tensors, url, device)
    if config.latent_scale is None:
        require_statistics(tensors, metadata, url)
    module.statistics_measured = True
    return _frozen(module, config)


def frozen_dtype(config: DistributedConfig) -> torch.dtype:
    """What frozen networks compute in while a second stage is trained."""
    return torch.bfloat16 if config.precision == "bf16" else torch.float32


def place_first_stage(module: FirstStage, config: DistributedConfig, device: torch.device) -> None:
    """Move a frozen first stage to the device, in the dtype and memory layout of training."""
    module.to(device, frozen_dtype(config))
    if config.channels_last and device.type == "cuda":
        # Frozen, so no flat slice of ZeRO's: its weights may be channels-last, too.
        module.to(memory_format=torch.channels_last)


def check_first_stage(config: FirstStageConfig) -> None:
    """What `load_first_stage` refuses and the header of the file shows, before anything large is read.

    Raises:
        ConfigError: no weights are named, there are none, or they belong to another structure.
    """
    if config.name != "identity":
        url = _weights_url(config)
        _check_structure(config, read_metadata(url), url)


def first_stage_of(
    config: FirstStageConfig, tensors: dict[str, Tensor], source: str, device: torch.device | str
) -> FirstStage:
    """The network with these weights on the device, whether or not they say how latents are scaled.

    Raises:
        ConfigError: names or shapes differ; they are listed.
    """
    with torch.device("meta"):
        module = build_first_stage(config)
    module.to_empty(device=device)
    load_first_stage_tensors(module, tensors, source)
    return module


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
    """Weights, latent statistics where they were measured, and metadata with the structure and the mark of
    the statistics, for `write_weights`."""
    left = ("logvar",) if module.statistics_measured else ("logvar", *LATENT_BUFFERS)
    tensors = {n: v.detach() for n, v in module.state_dict().items() if n not in left}
    mark = MEASURED if module.statistics_measured else UNMEASURED
    return tensors, first_stage_metadata(module.config) | {MARK: mark}


def first_stage_metadata(config: FirstStageConfig) -> dict[str, str]:
    """{"first_stage": JSON of the fields that the weights depend on}"""
    fields = dataclasses.asdict(config) | {"num_groups": norm_groups(config)}
    return {"first_stage": json.dumps({name: fields[name] for name in STRUCTURE})}


def _weights_url(config: FirstStageConfig) -> str:
    require_first_stage(config)
    url = config.weights
    assert url is not None
    if url.endswith(TORCH_ENDINGS):
        raise ConfigError(
            f"first_stage.weights={url} is a file of another program; convert it with `ldm import`."
        )
    return url if url.endswith(".safetensors") else f"{url.rstrip('/')}/{WEIGHTS_FILE}"


def _frozen(module: FirstStage, config: FirstStageConfig) -> FirstStage:
    if config.latent_scale is not None:
        shift = torch.zeros_like(module.latent_shift)
        module.set_latent_statistics(shift, shift + config.latent_scale)
    return module.requires_grad_(False).eval()


def _check_structure(config: FirstStageConfig, metadata: dict[str, str], url: str) -> None:
    """Name the differing field where the file knows its structure: clearer than tensor shapes."""
    if "first_stage" not in metadata:
        return
    stored = metadata_object(metadata, "first_stage", url)
    wanted = json.loads(first_stage_metadata(config)["first_stage"])
    for name, value in wanted.items():
        relevant = name != "codebook_size" or config.name == "vq"
        if relevant and name in stored and stored[name] != value:
            raise ConfigError(
                f"{url} was trained with first_stage.{name}={stored[name]}, but the configuration says "
                f"{value}; set first_stage.{name} accordingly."
            )
