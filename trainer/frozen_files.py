"""What a run reads from files and never trains, known by what it held and not by where it lay.

A checkpoint holds neither first stage nor towers, only where their files were. Another file may lie there by
now, and fit: a tower that was trained on, a first stage of the same latent scale, a vocabulary in another
order. The weights beside it would go on, or draw, as something else. So a checkpoint keeps a checksum of
what was read, by the setting that names the file. It is of the tensors: a file that moved, or was written
anew with the same values, is the same.

Random networks have none: they follow from the configuration.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from operator import attrgetter

from torch import Tensor

from data_pipeline.storage.files import read_bytes
from data_pipeline.storage.large import checksum_bytes
from trainer.checkpoint.export import CONTENTS
from trainer.conditioning.build import Conditioner
from trainer.config.models import RANDOM
from trainer.config.run import Config, ConfigError
from trainer.first_stage.base import LATENT_BUFFERS, FirstStage
from trainer.first_stage.perceptual import SETTING as PERCEPTUAL
from trainer.first_stage.perceptual import PerceptualDistance
from trainer.weights import bits_of, metadata_object

FIRST_STAGE = "first_stage.weights"


def contents_of_frozen(config: Config, first_stage: FirstStage, conditioner: Conditioner) -> dict[str, str]:
    """Checksums of what a second stage stands on, by setting, before anything changes its type.

    Latent statistics are left out: they are compared by themselves, where another first stage may be meant.
    """
    found = {}
    if config.first_stage.name != "identity":
        tensors = {name: t for name, t in first_stage.state_dict().items() if name not in LATENT_BUFFERS}
        found[FIRST_STAGE] = _checksum(tensors)
    for name, module in conditioner.frozen.modules().items():
        if getattr(config.conditioning, name).pretrained != RANDOM:
            found[f"conditioning.{name}.pretrained"] = _checksum(module.state_dict())
    text = config.conditioning.text_transformer
    if text is not None and text.tokenizer == "wordpiece" and text.vocabulary is not None:
        found["conditioning.text_transformer.vocabulary"] = checksum_bytes(read_bytes(text.vocabulary))[:16]
    return found


def contents_of_perceptual(perceptual: PerceptualDistance | None) -> dict[str, str]:
    """The same of what a first stage's reconstructions are compared by."""
    if perceptual is None or not perceptual.is_lpips:
        return {}
    return {PERCEPTUAL: _checksum(perceptual.network.state_dict())}


def require_contents(
    metadata: Mapping[str, str],
    config: Config,
    found: Mapping[str, str],
    source: str,
    *,
    meant: Collection[str] = (),
) -> None:
    """Refuse to draw with other frozen networks than the weights were trained beside.

    Args:
        metadata: of the weights; older ones do not say it, and nothing is refused.
        found: what there is now, as `contents_of_frozen` gives it.
        source: names the weights.
        meant: settings for which the user has named a file, whatever it holds.

    Raises:
        ConfigError: something else lies where a file lay.
    """
    trained = metadata_object(metadata, CONTENTS, source) if CONTENTS in metadata else {}
    for setting, checksum in found.items():
        if setting in meant or trained.get(setting, checksum) == checksum:
            continue
        remedy = ", or name it by --first-stage if it is what you want" if setting == FIRST_STAGE else ""
        raise ConfigError(
            f"{source} was trained with other contents of {setting} than {attrgetter(setting)(config)} has "
            f"now (checksum {trained[setting]}, now {checksum}); put that file back{remedy}."
        )


def _checksum(tensors: Mapping[str, Tensor]) -> str:
    """Changes with any name, shape, type or value."""
    about = [
        [name, list(tensor.shape), str(tensor.dtype), checksum_bytes(bits_of(tensor))]
        for name, tensor in sorted(tensors.items())
    ]
    return checksum_bytes(json.dumps(about).encode())[:16]
