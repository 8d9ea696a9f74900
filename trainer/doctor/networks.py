"""The doctor on frozen networks: which ones the run reads, and whether their files are there."""

from __future__ import annotations

from collections.abc import Iterator

from data_pipeline.storage.files import exists
from data_pipeline.storage.urls import is_local
from trainer.config.checks import check_networks as check_named
from trainer.config.models import RANDOM, TOWERS
from trainer.config.run import Config, ConfigError
from trainer.distributed.env import DistributedEnv
from trainer.doctor.check import Check, on_every_rank
from trainer.first_stage.build import WEIGHTS_FILE
from trainer.first_stage.perceptual import perceptual_source
from trainer.weights import WEIGHT_ENDINGS


def check_networks(config: Config, env: DistributedEnv) -> list[Check]:
    """Each network whose weights the run reads is named, and a named file is there; by one rank of each node.
    Collective."""

    def examine() -> str:
        if env.local_rank != 0:
            return ""
        check_named(config)
        found = list(_described(config))
        return ", ".join(found) or "none is read"

    remedy = "name weights that are there, or the word random where an untrained network is meant."
    return [on_every_rank("networks", remedy, examine)]


def _described(config: Config) -> Iterator[str]:
    """Network by network, what it is.

    Raises:
        ConfigError: a file that is named is not there.
    """
    if config.stage == "autoencoder":
        loss = config.autoencoder_loss
        if loss.perceptual_weight:
            source = perceptual_source(loss.perceptual_weights)
            yield (
                "perceptual network: random features, not LPIPS"
                if source == RANDOM
                else (f"LPIPS with {_present(source, 'autoencoder_loss.perceptual_weights')}")
            )
        return
    weights = config.first_stage.weights
    if config.first_stage.name != "identity" and weights is not None:
        url = weights if weights.endswith(".safetensors") else f"{weights.rstrip('/')}/{WEIGHTS_FILE}"
        yield f"first stage {_present(url, 'first_stage.weights')}"
    for name in TOWERS:
        tower = getattr(config.conditioning, name)
        if tower is not None and tower.pretrained == RANDOM:
            yield f"{name} {tower.model} with random weights"
        elif tower is not None:
            yield f"{name} {tower.model} {_present(tower.pretrained, f'conditioning.{name}.pretrained')}"


def _present(source: str, setting: str) -> str:
    """The source itself, where it is a file that exists or a tag of open_clip."""
    if (source.endswith(WEIGHT_ENDINGS) or not is_local(source)) and not exists(source):
        raise ConfigError(f"{setting}={source} is not there")
    return source
