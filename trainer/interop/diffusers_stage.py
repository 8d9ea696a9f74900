"""First stage and noise schedule as diffusers' config files say them, in both directions."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

from trainer.config.models import FirstStageConfig, LowResolutionConfig
from trainer.config.run import ConfigError
from trainer.config.training import DiffusionConfig
from trainer.diffusion.levels import Spacing
from trainer.diffusion.schedule import KARRAS_RHO
from trainer.interop.diffusers_unet import (
    BLOCK_KINDS,
    Json,
    Kinds,
    factors_of,
    require_fixed,
    require_kinds,
    require_known,
)


def _is_positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf


def _are_numbers(value: Any) -> bool:
    return value is None or (isinstance(value, list) and all(isinstance(v, int | float) for v in value))


STAGE_KINDS: Kinds = {
    **BLOCK_KINDS,
    "latent_channels": (lambda v: isinstance(v, int) and v > 0, "a number of channels", 4),
    "num_vq_embeddings": (lambda v: isinstance(v, int) and v > 0, "a number of codes", 8192),
    "mid_block_add_attention": (lambda v: isinstance(v, bool), "true or false", True),
    "scaling_factor": (_is_positive, "a number above 0", 0.18215),
    "shift_factor": (lambda v: v is None or isinstance(v, int | float), "a number or null", None),
}

BETA_SCHEDULES = {"linear": "linear", "scaled_linear": "scaled_linear", "cosine": "squaredcos_cap_v2"}
PREDICTIONS: dict[str, str] = {"eps": "epsilon", "v": "v_prediction", "x0": "sample"}


_PROCESSES = {
    "EDMEulerScheduler": "edm",
    "EDMDPMSolverMultistepScheduler": "edm",
    "FlowMatchEulerDiscreteScheduler": "flow",
    "FlowMatchHeunDiscreteScheduler": "flow",
    "FlowMatchLCMScheduler": "flow",
}
SCALES = ("scaling_factor", "shift_factor", "latents_mean", "latents_std")
"""Settings of an autoencoder that say its latent statistics."""


def first_stage_to_diffusers(
    config: FirstStageConfig, shift: list[float], scale: list[float], sample_size: int, num_groups: int
) -> Json:
    """config.json of the equal AutoencoderKL or VQModel.

    A scale common to all channels becomes `scaling_factor`, anything else latents_mean and latents_std.
    """
    levels = len(config.channel_multipliers)
    attends = [2**i in config.attention_factors for i in range(levels)]
    down = ["AttnDownEncoderBlock2D" if a else "DownEncoderBlock2D" for a in attends]
    json: Json = {
        "_class_name": "AutoencoderKL" if config.name == "kl" else "VQModel",
        "in_channels": 3,
        "out_channels": 3,
        "down_block_types": down,
        "up_block_types": [n.replace("DownEncoder", "UpDecoder") for n in reversed(down)],
        "block_out_channels": [config.base_channels * m for m in config.channel_multipliers],
        "layers_per_block": config.num_res_blocks,
        "act_fn": "silu",
        "latent_channels": config.latent_channels,
        "norm_num_groups": num_groups,
        "sample_size": sample_size,
        "mid_block_add_attention": config.middle_attention,
        "scaling_factor": 1.0,
    }
    if config.name == "vq":
        json["num_vq_embeddings"] = config.codebook_size
        json["vq_embed_dim"] = config.latent_channels
    if len(set(scale)) == 1 and not any(shift):
        json["scaling_factor"] = scale[0]
    elif config.name == "kl":
        json["latents_mean"] = shift
        json["latents_std"] = [1.0 / s for s in scale]
    else:
        raise ConfigError("diffusers' VQModel has one scaling_factor and no per-channel latent statistics.")
    return json


def first_stage_from_diffusers(json: Mapping[str, Any]) -> tuple[FirstStageConfig, list[float], list[float]]:
    """Configuration, latent shift and latent scale (per channel) of an AutoencoderKL or VQModel.

    Raises:
        ConfigError: a setting that our autoencoders do not have; it is named.
    """
    name: Literal["kl", "vq"] = "vq" if json.get("_class_name") == "VQModel" else "kl"
    require_kinds(json, STAGE_KINDS)
    z = json.get("latent_channels", 4)
    fixed: Json = {
        "act_fn": "silu",
        "use_quant_conv": True,
        "use_post_quant_conv": True,
        "norm_type": "group",
    }
    fixed |= {"vq_embed_dim": (None, z), "in_channels": 3, "out_channels": 3}
    require_fixed(json, fixed)
    require_known(json["down_block_types"], {"AttnDownEncoderBlock2D", "DownEncoderBlock2D"})
    channels = json["block_out_channels"]
    config = FirstStageConfig(
        name=name,
        base_channels=channels[0],
        channel_multipliers=tuple(c // channels[0] for c in channels),
        num_res_blocks=json.get("layers_per_block", 2),
        latent_channels=z,
        attention_factors=factors_of(json["down_block_types"], "Attn"),
        middle_attention=json.get("mid_block_add_attention", True),
        codebook_size=json.get("num_vq_embeddings", 8192),
        num_groups=json.get("norm_num_groups", 32),
    )
    scaling = float(json.get("scaling_factor", 0.18215))
    shift = json.get("latents_mean") or [json.get("shift_factor") or 0.0] * z
    std = json.get("latents_std") or [1.0] * z
    if not (_are_numbers(shift) and _are_numbers(std) and len(shift) == len(std) == z and all(std)):
        raise ConfigError(f"latents_mean and latents_std must have {z} values each, one per latent channel.")
    return config, [float(s) for s in shift], [scaling / s for s in std]


def noise_level_scheduler(config: LowResolutionConfig) -> Json:
    """scheduler_config.json (DDPMScheduler) that hides flaws of a low-resolution picture as we do."""
    return {
        "_class_name": "DDPMScheduler",
        "num_train_timesteps": config.noise_num_timesteps,
        "beta_start": config.noise_beta_start,
        "beta_end": config.noise_beta_end,
        "beta_schedule": "scaled_linear",
        "clip_sample": False,
    }


def process_from_diffusers(json: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of DiffusionConfig that a scheduler_config.json says; what is absent there is not told.

    Absent settings are the defaults of a class of diffusers, of which there are dozens.
    """
    process = _PROCESSES.get(str(json.get("_class_name")), "discrete")
    found: dict[str, Any] = {"process": process}
    if process != "discrete" or json.get("trained_betas") is not None:
        return found
    ours = {theirs: name for name, theirs in PREDICTIONS.items()}
    if "prediction_type" in json:
        found["prediction"] = ours.get(json["prediction_type"], json["prediction_type"])
    if "rescale_betas_zero_snr" in json:
        found["zero_terminal_snr"] = bool(json["rescale_betas_zero_snr"])
    ours = {theirs: name for name, theirs in BETA_SCHEDULES.items()}
    if "beta_schedule" in json:
        found["beta_schedule"] = ours.get(json["beta_schedule"], json["beta_schedule"])
    ends = ("beta_start", "beta_end") if found.get("beta_schedule") != "cosine" else ()
    names = {"num_train_timesteps": "num_timesteps"} | {name: name for name in ends}
    return found | {name: json[theirs] for theirs, name in names.items() if theirs in json}


def scheduler_to_diffusers(config: DiffusionConfig, spacing: Spacing = "leading") -> Json:
    """scheduler_config.json of our forward process.

    DDIMScheduler, FlowMatchEulerDiscreteScheduler or EDMEulerScheduler. DDIM ends without noise, as our
    samplers do. Karras spacing, which it does not have, becomes leading; zero terminal SNR needs trailing.
    The other two have leading and Karras spacing; trailing, which they are given by hand, becomes leading.

    Raises:
        ConfigError: no scheduler of diffusers reads what the network predicts.
    """
    if config.process == "edm":
        return {
            "_class_name": "EDMEulerScheduler",
            "num_train_timesteps": config.num_timesteps,
            "prediction_type": "epsilon",
            "sigma_data": config.sigma_data,
            "sigma_max": config.sigma_max,
            "sigma_min": config.sigma_min,
            "sigma_schedule": "karras" if spacing == "karras" else "exponential",
            "rho": KARRAS_RHO,
            "final_sigmas_type": "zero",
        }
    if config.process == "flow":
        if config.prediction != "velocity":
            raise ConfigError(
                "diffusers' FlowMatchEulerDiscreteScheduler reads a velocity, not diffusion.prediction="
                f"{config.prediction}; export in the native layout."
            )
        return {
            "_class_name": "FlowMatchEulerDiscreteScheduler",
            "num_train_timesteps": config.num_timesteps,
            "shift": config.shift,
            "use_dynamic_shifting": False,
            "use_karras_sigmas": spacing == "karras",
        }
    return {
        "_class_name": "DDIMScheduler",
        "num_train_timesteps": config.num_timesteps,
        "beta_start": config.beta_start,
        "beta_end": config.beta_end,
        "beta_schedule": BETA_SCHEDULES[config.beta_schedule],
        "prediction_type": PREDICTIONS[config.prediction],
        "rescale_betas_zero_snr": config.zero_terminal_snr,
        "timestep_spacing": "trailing" if config.zero_terminal_snr or spacing == "trailing" else "leading",
        "steps_offset": 1,
        "set_alpha_to_one": True,
        "clip_sample": False,
    }
