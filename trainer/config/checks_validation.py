"""What validation records, which of it is better high, and settings of it that cannot work together."""

from __future__ import annotations

from trainer.config.models import RANDOM
from trainer.config.run import Config, ConfigError

TRAINING_LOSS = "loss"
"""`checkpoint.best_metric` of the recent training loss."""
PREFIX = "validation/"
RAW = "raw_"
"""Before the names of what the trained weights give, beside their averages."""
RECONSTRUCTION_DISTANCES = {"inception": "rfid", "dinov2": "rfd_dinov2", "random": "rfd_random"}
"""Frechet distance of pictures from their reconstructions, by `validation.features`."""
_BETTER_HIGH = ("psnr", "ssim", "codebook_usage", "codebook_perplexity")


def better_high(metric: str) -> bool:
    """Whether more of a metric is better; of the others, less."""
    return metric.removeprefix(PREFIX).removeprefix(RAW) in _BETTER_HIGH


def metrics_of(config: Config) -> tuple[str, ...]:
    """Names that a checkpoint may be the best by, `validation/` ones where the run validates."""
    if not config.validation.every:
        return (TRAINING_LOSS,)
    if config.stage == "diffusion":
        names = ["loss", *(["error"] if config.diffusion.learned_uncertainty else [])]
    else:
        names = ["reconstruction", "psnr", "ssim"]
        if config.autoencoder_loss.perceptual_weight:
            random = config.autoencoder_loss.perceptual_weights == RANDOM
            names.append("random_features" if random else "psim")
        vector_quantised = config.first_stage.name == "vq"
        names += ["codebook_usage", "codebook_perplexity"] if vector_quantised else ["kl"]
        if config.validation.features is not None:
            names.append(RECONSTRUCTION_DISTANCES[config.validation.features])
    raw = [f"{RAW}{name}" for name in names] if config.ema.decay and config.validation.raw else []
    return (TRAINING_LOSS, *(f"{PREFIX}{name}" for name in (*names, *raw)))


def check_validation(config: Config) -> None:
    """Raise ConfigError, with the remedy, for settings of validation that contradict each other."""
    held_out = config.data.validation
    if held_out.shards and held_out.share:
        raise ConfigError(
            "give either data.validation.shards or data.validation.share, not both: shards of their own are "
            "measured whole."
        )
    if config.validation.every and not (held_out.shards or held_out.share):
        raise ConfigError(
            "validation.every is set and nothing is held out to be measured; set data.validation.share, e.g. "
            "0.01, or data.validation.shards."
        )
    _check_features(config)
    _check_best_metric(config)


def _check_features(config: Config) -> None:
    features, weights = config.validation.features, config.validation.features_weights
    if features is None:
        if weights is not None:
            raise ConfigError(
                "validation.features_weights is set and no network that they are of; set validation.features."
            )
        return
    if not config.validation.every:
        raise ConfigError(
            f"validation.features={features} belongs to validation, which is off; set validation.every."
        )
    if config.stage != "autoencoder":
        raise ConfigError(
            f"validation.features={features} compares pictures with what a first stage makes of them; with "
            "stage=diffusion leave it out, and measure FID beside the run by `ldm evaluate watch`."
        )
    if features == "random" and weights is not None:
        raise ConfigError("validation.features=random has no file; leave validation.features_weights out.")
    if features == "dinov2" and weights is None:
        raise ConfigError(
            "validation.features=dinov2 needs the file of dinov2_vitl14; name its path or URL in "
            "validation.features_weights."
        )


def _check_best_metric(config: Config) -> None:
    metric = config.checkpoint.best_metric
    if metric not in metrics_of(config):
        if metric.startswith(PREFIX) and not config.validation.every:
            raise ConfigError(
                f"checkpoint.best_metric={metric} is recorded by validation, which is off; set "
                "validation.every."
            )
        raise ConfigError(
            f"checkpoint.best_metric={metric} is nothing that this run records; choose one of "
            f"{', '.join(metrics_of(config))}."
        )
    saves, measures = config.checkpoint.every, config.validation.every
    if metric == TRAINING_LOSS or not saves or saves % measures == 0 or measures % saves == 0:
        return
    raise ConfigError(
        f"checkpoints of every {saves} steps would not have the {metric} that is measured every {measures}; "
        "make one of checkpoint.every and validation.every a multiple of the other."
    )
