"""Refuses diffusion and sampling settings that divide by zero or make no sense. Torch-free."""

from __future__ import annotations

import math
from typing import get_args

from trainer.config.run import ConfigError
from trainer.config.training import DiffusionConfig, SamplerName, SamplingConfig


def check_diffusion(config: DiffusionConfig) -> None:
    """Raise ConfigError for the first setting of the forward process or the objective that cannot work."""
    _check_schedule(config)
    if config.zero_terminal_snr and config.prediction == "eps":
        raise ConfigError(
            "diffusion.zero_terminal_snr=true makes the last step pure noise, where eps prediction says "
            "nothing about the image (x0 = (x - sigma eps) / 0); set diffusion.prediction=v (or x0)."
        )
    if config.min_snr_gamma is not None:
        _check_min_snr(config)
    if config.loss == "huber" and not (math.isfinite(config.huber_delta) and config.huber_delta > 0):
        raise ConfigError(f"diffusion.huber_delta={config.huber_delta} must be above 0.")
    if not (math.isfinite(config.offset_noise) and config.offset_noise >= 0):
        raise ConfigError(f"diffusion.offset_noise={config.offset_noise} must be 0 (off) or above.")


def check_sampling(diffusion: DiffusionConfig, sampling: SamplingConfig) -> None:
    """Raise ConfigError for sampling settings that cannot work with this forward process."""
    if sampling.sampler not in get_args(SamplerName):
        raise ConfigError(
            f"sampling.sampler={sampling.sampler!r} is unknown; choose one of "
            f"{', '.join(get_args(SamplerName))}."
        )
    if not 1 <= sampling.steps <= diffusion.num_timesteps:
        raise ConfigError(
            f"sampling.steps={sampling.steps} must lie between 1 and diffusion.num_timesteps="
            f"{diffusion.num_timesteps}."
        )
    if not 0.0 <= sampling.eta <= 1.0:
        raise ConfigError(f"sampling.eta={sampling.eta} must lie between 0 and 1.")
    if sampling.eta > 0 and sampling.sampler != "ddim":
        raise ConfigError(
            f"sampling.eta={sampling.eta} only applies to sampling.sampler=ddim, not "
            f"{sampling.sampler}; set it to 0."
        )
    if not (math.isfinite(sampling.guidance_scale) and sampling.guidance_scale >= 0):
        raise ConfigError(
            f"sampling.guidance_scale={sampling.guidance_scale} must be 0 or above (1: no guidance)."
        )
    if not 0.0 <= sampling.guidance_rescale <= 1.0:
        raise ConfigError(f"sampling.guidance_rescale={sampling.guidance_rescale} must lie between 0 and 1.")
    if diffusion.zero_terminal_snr and sampling.spacing != "trailing":
        raise ConfigError(
            f"sampling.spacing={sampling.spacing} misses the last step (or asks for an infinite sigma), "
            "where diffusion.zero_terminal_snr=true starts sampling; set sampling.spacing=trailing."
        )


def _check_schedule(config: DiffusionConfig) -> None:
    if config.num_timesteps < 2:
        raise ConfigError(f"diffusion.num_timesteps={config.num_timesteps} must be at least 2.")
    if config.beta_schedule == "cosine":
        return
    if not 0.0 < config.beta_start <= config.beta_end < 1.0:
        raise ConfigError(
            f"diffusion.beta_start={config.beta_start} and diffusion.beta_end={config.beta_end} must satisfy "
            "0 < beta_start <= beta_end < 1."
        )


def _check_min_snr(config: DiffusionConfig) -> None:
    gamma = config.min_snr_gamma
    assert gamma is not None
    if not (math.isfinite(gamma) and gamma > 0):
        raise ConfigError(f"diffusion.min_snr_gamma={gamma} must be above 0 (the paper uses 5), or unset.")
    if config.loss != "l2":
        raise ConfigError(
            "diffusion.min_snr_gamma is derived for the squared error, not for diffusion.loss="
            f"{config.loss}; set diffusion.loss=l2 or unset min_snr_gamma."
        )
    if config.zero_terminal_snr:
        raise ConfigError(
            "diffusion.min_snr_gamma gives the last step, whose SNR diffusion.zero_terminal_snr makes 0, "
            "the weight 0, so the step where sampling starts would never be trained; unset one of them."
        )
