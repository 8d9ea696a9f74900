"""Refuses diffusion and sampling settings that divide by zero or make no sense. Torch-free."""

from __future__ import annotations

from collections.abc import Sequence
from typing import get_args

from trainer.config.models import OpenCLIPConfig
from trainer.config.ranges import check_ranges
from trainer.config.run import Config, ConfigError
from trainer.config.training import DiffusionConfig, SamplerName, SamplingConfig

FITTING: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "discrete": (("eps", "v", "x0"), ("uniform", "logit_normal", "mode", "cosmap")),
    "flow": (("velocity", "x0"), ("uniform", "logit_normal", "mode", "cosmap")),
    "edm": (("edm",), ("log_normal",)),
}
"""Process -> predictions that are defined at each of its levels, densities over what it draws."""


def check_diffusion(config: DiffusionConfig) -> None:
    """Raise ConfigError for the first setting of the forward process or the objective that cannot work."""
    check_ranges(config, "diffusion.")
    if config.process != "discrete":
        _check_beta_settings_absent(config)
    _check_belongs_together(config)
    by_betas = config.process == "discrete" and config.beta_schedule != "cosine"
    if by_betas and not 0.0 < config.beta_start <= config.beta_end < 1.0:
        raise ConfigError(
            f"diffusion.beta_start={config.beta_start} and diffusion.beta_end={config.beta_end} must satisfy "
            "0 < beta_start <= beta_end < 1."
        )
    if config.zero_terminal_snr and config.prediction == "eps":
        raise ConfigError(
            "diffusion.zero_terminal_snr=true makes the last step pure noise, where eps prediction says "
            "nothing about the image (x0 = (x - sigma eps) / 0); set diffusion.prediction=v (or x0)."
        )
    if config.min_snr_gamma is not None:
        _check_min_snr(config)


def check_sampling(diffusion: DiffusionConfig, sampling: SamplingConfig) -> None:
    """Raise ConfigError for sampling settings that cannot work with this forward process."""
    if sampling.sampler not in get_args(SamplerName):
        raise ConfigError(
            f"sampling.sampler={sampling.sampler!r} is unknown; choose one of "
            f"{', '.join(get_args(SamplerName))}."
        )
    check_ranges(sampling, "sampling.")
    if sampling.steps > diffusion.num_timesteps:
        raise ConfigError(
            f"sampling.steps={sampling.steps} must be at most diffusion.num_timesteps="
            f"{diffusion.num_timesteps}."
        )
    if sampling.eta > 0 and sampling.sampler != "ddim":
        raise ConfigError(
            f"sampling.eta={sampling.eta} only applies to sampling.sampler=ddim, not "
            f"{sampling.sampler}; set it to 0."
        )
    if diffusion.zero_terminal_snr and sampling.spacing != "trailing":
        raise ConfigError(
            f"sampling.spacing={sampling.spacing} misses the last step (or asks for an infinite sigma), "
            "where diffusion.zero_terminal_snr=true starts sampling; set sampling.spacing=trailing."
        )


GUIDED = ("openclip", "openclip_second", "text_transformer", "class_label", "layout")
"""Sections that guidance always drops in its unconditional branch. The others stay unless they were dropped
in training, since without them there is nothing to enlarge or to fill."""


def check_guidance(config: Config, *, told: Sequence[str] = ()) -> None:
    """Raise ConfigError where guidance would ask for a null form that training never showed.

    Of the sections in `told` guidance is told something else instead, a negative prompt. The empty caption
    through a frozen tower is a caption like others, near which training was (`guidance_note`).
    """
    for name in _untrained(config, told):
        if not _is_caption(config, name):
            raise ConfigError(
                f"guidance {config.sampling.guidance_scale:g} compares with a picture without {name}, which "
                f"conditioning.{name}.drop_probability=0 never trains; set guidance to 1 "
                "(sampling.guidance_scale, --guidance), or train with a drop_probability above 0."
            )


def guidance_note(config: Config, *, told: Sequence[str] = ()) -> str:
    """What whoever draws with guidance is to know; empty where there is nothing.

    SD 1.1 and MLPerf's models were trained on no empty captions, and are drawn with guidance all the same.
    """
    names = [name for name in _untrained(config, told) if _is_caption(config, name)]
    if not names:
        return ""
    return (
        f"guidance {config.sampling.guidance_scale:g} compares with the empty caption, which training did "
        f"not show (conditioning.{names[0]}.drop_probability=0)."
    )


def _untrained(config: Config, told: Sequence[str]) -> list[str]:
    """Sections that guidance drops and training did not; weights that a run began with may know how."""
    conditioning = config.conditioning
    if (
        config.sampling.guidance_scale == 1.0
        or config.init_from is not None
        or conditioning.drop_all_probability
    ):
        return []
    sections = {name: getattr(conditioning, name) for name in GUIDED if name not in told}
    return [n for n, section in sections.items() if section is not None and section.drop_probability == 0.0]


def _is_caption(config: Config, name: str) -> bool:
    """Whether the null form of a section is the empty caption, read by a tower that is not trained."""
    section = getattr(config.conditioning, name)
    return isinstance(section, OpenCLIPConfig) and section.null == "empty"


def _check_belongs_together(config: DiffusionConfig) -> None:
    predictions, densities = FITTING[config.process]
    wanted = [
        f"diffusion.{key}={' or '.join(fitting)}"
        for key, fitting in (("prediction", predictions), ("density", densities))
        if getattr(config, key) not in fitting
    ]
    if wanted:
        raise ConfigError(
            f"diffusion.process={config.process} does not go with diffusion.prediction={config.prediction} "
            f"and diffusion.density={config.density}; set {' and '.join(wanted)}."
        )
    has_normal = config.density in ("logit_normal", "log_normal")
    if not has_normal and not (config.density_mean is None and config.density_std is None):
        raise ConfigError(
            f"diffusion.density={config.density} has no mean and deviation; unset diffusion.density_mean and "
            "diffusion.density_std, or set diffusion.density=logit_normal (edm: log_normal)."
        )
    if config.process != "flow" and (config.shift != 1.0 or config.shift_pixels is not None):
        raise ConfigError(
            "diffusion.shift and diffusion.shift_pixels move the times of a flow, not of diffusion.process="
            f"{config.process}; unset them, or set diffusion.process=flow."
        )
    if config.weighting != "uniform" and config.prediction != "velocity":
        raise ConfigError(
            f"diffusion.weighting={config.weighting} weights the error of a velocity, not of "
            f"diffusion.prediction={config.prediction}; set diffusion.weighting=uniform."
        )
    if config.learned_uncertainty and config.loss != "l2":
        raise ConfigError(
            "diffusion.learned_uncertainty is a variance, so it is for the squared error, not for "
            f"diffusion.loss={config.loss}; set diffusion.loss=l2 or diffusion.learned_uncertainty=false."
        )
    if config.process == "edm" and config.sigma_min >= config.sigma_max:
        raise ConfigError(
            f"diffusion.sigma_min={config.sigma_min:g} must be below diffusion.sigma_max="
            f"{config.sigma_max:g}."
        )


def _check_beta_settings_absent(config: DiffusionConfig) -> None:
    """What belongs to the levels of a beta schedule."""
    if config.zero_terminal_snr:
        raise ConfigError(
            "diffusion.zero_terminal_snr rescales a beta schedule, which diffusion.process="
            f"{config.process} does not have; set diffusion.zero_terminal_snr=false."
        )
    if config.min_snr_gamma is not None:
        raise ConfigError(
            "diffusion.min_snr_gamma weights the levels of a beta schedule, which diffusion.process="
            f"{config.process} does not have; unset it (diffusion.density says how often each level is seen)."
        )


def _check_min_snr(config: DiffusionConfig) -> None:
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
