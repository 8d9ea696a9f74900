"""The only importer of open_clip, which takes seconds: its towers, their weights, and its vocabulary."""

from __future__ import annotations

import contextlib
import difflib
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from data_pipeline.processes import without_packages
from data_pipeline.storage.urls import is_local, local_path
from trainer.config.models import RANDOM, OpenCLIPConfig
from trainer.config.run import ConfigError
from trainer.weights import Undrawn, check_fit, read_once, read_tensors, shapes_of

# It wants them for towers that are not its own, which `architecture` refuses: half of its import.
with without_packages("timm", "transformers"):
    import open_clip
    import open_clip.model
    from open_clip import SimpleTokenizer
    from open_clip.transformer import TextTransformer

__all__ = [
    "SimpleTokenizer",
    "TextTransformer",
    "architecture",
    "build_image_tower",
    "build_tower",
    "load_tower",
    "pretrained_settings",
    "require_activation",
    "weights_file",
]

logger = logging.getLogger(__name__)

QUICK = "-quickgelu"
"""Ends the name of a model of which there is another one with GELU."""
_ACTIVATIONS = {True: "QuickGELU", False: "GELU"}


def architecture(config: OpenCLIPConfig) -> dict[str, Any]:
    """open_clip's model configuration with the overrides for small towers applied.

    Raises:
        ConfigError: no such model, a text tower that is not open_clip's own, or sizes that do not fit.
    """
    names = open_clip.list_models()
    if config.model not in names:
        near = difflib.get_close_matches(config.model, names, n=3, cutoff=0.4)
        raise ConfigError(
            f"open_clip has no model {config.model!r}; did you mean {', '.join(near) or 'ViT-H-14'}?"
        )
    model: dict[str, Any] = open_clip.get_model_config(config.model)
    text = model["text_cfg"]
    foreign = text.get("hf_model_name") or text.get("hf_tokenizer_name")
    if foreign:
        raise ConfigError(
            f"the text tower of {config.model} needs {foreign} from the Hugging Face hub; choose a model "
            "with CLIP's own tokenizer, such as ViT-H-14, ViT-bigG-14 or ViT-L-14."
        )
    for name in ("width", "layers", "heads", "context_length"):
        value = getattr(config, name)
        if value is not None:
            text[name] = value
            if name == "width":
                model["embed_dim"] = value
    if text["width"] % text["heads"]:
        raise ConfigError(
            f"a text tower of width {text['width']} cannot have {text['heads']} heads; set the tower's "
            "heads to a divisor of its width."
        )
    if config.layer == "penultimate" and text["layers"] < 2:
        raise ConfigError("the penultimate layer needs a text tower of at least 2 layers; use layer=last.")
    return model


def build_tower(config: OpenCLIPConfig, model: Mapping[str, Any], seed: int) -> TextTransformer:
    """open_clip's text tower without its image tower, with its weights, on torch's default device.

    Under `torch.device("meta")` no memory is used and no weights are read. What the chosen output never
    reads (last layer, projection) is left out.

    Args:
        config: with `pretrained` set, on a device that has memory.
        model: what `architecture` says.
        seed: of the weights of a random tower.

    Raises:
        ConfigError: the weights cannot be had, or do not fit.
    """
    target = torch.get_default_device()
    assert config.pretrained is not None or target.type == "meta"
    with torch.random.fork_rng(devices=[]), contextlib.ExitStack() as stack:
        if config.pretrained != RANDOM:
            stack.enter_context(Undrawn())
        elif target.type != "meta":
            # A frozen random tower is part of the model: the same for every run, resume and sampling,
            # and on every device. The generators of other devices keep their places.
            stack.enter_context(torch.device("cpu"))
            torch.default_generator.manual_seed(seed)
        tower = open_clip.model._build_text_tower(
            model["embed_dim"], dict(model["text_cfg"]), quick_gelu=model.get("quick_gelu", False)
        )
    if not config.pooled:
        tower.text_projection = None
        if config.layer == "penultimate":
            tower.transformer.resblocks = tower.transformer.resblocks[:-1]
    if tower.positional_embedding.is_meta:
        return tower
    if config.pretrained == RANDOM:
        logger.warning("text tower %s has seeded RANDOM weights, as pretrained=random says", config.model)
        tower.to(target)
    else:
        assert config.pretrained is not None
        with torch.device("cpu"):  # where the file's pages are; copied once, to where the tower lies
            load_tower(tower, weights_file(config.model, config.pretrained))
    return tower


def pretrained_settings(model: str, pretrained: str) -> dict[str, Any]:
    """What a tag of open_clip says of its weights: quick_gelu, mean, std, resize_mode; of a file nothing."""
    return dict(open_clip.get_pretrained_cfg(model, pretrained) or {})


def require_activation(name: str, config: OpenCLIPConfig) -> None:
    """Raise ConfigError where a tag's weights were trained with another activation than the model has.

    No shape shows it, and open_clip's own loader says it in a warning. `name`: section of `conditioning`.
    """
    if config.pretrained in (None, RANDOM) or _is_file(config.pretrained):
        return
    told = pretrained_settings(config.model, config.pretrained)
    wanted = told.get("quick_gelu", False)
    if not told or wanted == architecture(config).get("quick_gelu", False):
        return  # of what is no tag `weights_file` tells
    other = f"{config.model}{QUICK}" if wanted else config.model.removesuffix(QUICK)
    raise ConfigError(
        f"the weights {config.pretrained} of {config.model} were trained with {_ACTIVATIONS[wanted]}, and "
        f"the model has {_ACTIVATIONS[not wanted]}; set conditioning.{name}.model={other}, or name the file "
        "of the weights as pretrained where the other one is meant."
    )


def build_image_tower(name: str, model: Mapping[str, Any], pretrained: str) -> nn.Module:
    """open_clip's image tower without its text tower, with its weights, on the CPU.

    Args:
        name: of the model.
        model: what `architecture` gives, with quick_gelu as the weights want it.
        pretrained: tag, file or URL; the file may hold a whole CLIP model.

    Raises:
        ConfigError: a tower of another library, no such weights, or weights that do not fit.
    """
    if model["vision_cfg"].get("timm_model_name"):
        raise ConfigError(
            f"the image tower of {name} is one of timm's; choose a model with open_clip's own, such as "
            "ViT-H-14, ViT-L-14-336 or RN50."
        )
    url = weights_file(name, pretrained)
    with torch.random.fork_rng(devices=[]), torch.device("cpu"), Undrawn():
        tower: nn.Module = open_clip.model._build_vision_tower(
            model["embed_dim"], dict(model["vision_cfg"]), quick_gelu=model.get("quick_gelu", False)
        )
    _load(tower, url, mark="conv1.weight", what="image tower")
    return tower


def weights_file(model: str, pretrained: str) -> str:
    """Where the weights lie: a file or URL as given, or open_clip's (downloaded) file for a tag.

    On the machine of whoever reads weights (`trainer.weights.read_once`), who alone asks the hub.

    Raises:
        ConfigError: neither a file nor a tag, or the tag cannot be downloaded.
    """
    return read_once(lambda: _weights_file(model, pretrained))


def load_tower(tower: TextTransformer, url: str) -> None:
    """Load the text tower's weights out of a file that may hold a whole CLIP model or SD checkpoint.

    Raises:
        ConfigError: tensors are missing or have other shapes; nothing is loaded then.
    """
    _load(tower, url, mark="token_embedding.weight", what="text tower")


def _weights_file(model: str, pretrained: str) -> str:
    if _is_file(pretrained):
        return pretrained
    if pretrained not in _tags(model):
        tags = ", ".join(_tags(model)) or "none"
        raise ConfigError(
            f"pretrained={pretrained!r} is neither a file nor one of open_clip's tags for {model} ({tags}), "
            f"nor the word {RANDOM}."
        )
    try:
        path = open_clip.download_pretrained(open_clip.get_pretrained_cfg(model, pretrained))
    except (OSError, RuntimeError) as error:
        raise ConfigError(
            f"cannot download {model} {pretrained} ({error}); fetch the file elsewhere and name its path as "
            "pretrained."
        ) from error
    return str(path)


def _is_file(pretrained: str) -> bool:
    """Whether it is a file or a URL, and no tag."""
    return not is_local(pretrained) or Path(local_path(pretrained)).is_file()


def _tags(model: str) -> list[str]:
    tags: list[str] = open_clip.list_pretrained_tags_by_model(model)
    return tags


def _load(tower: nn.Module, url: str, *, mark: str, what: str) -> None:
    """`mark`: a tensor that every such tower has, by which its prefix in the file is found."""
    wanted = shapes_of(tower.state_dict())
    stored = read_tensors(url, lambda names: _names_in_file(names, wanted, mark).values())
    found = {name: stored[theirs] for name, theirs in _names_in_file(list(stored), wanted, mark).items()}
    remedy = "Name a file in open_clip's layout (`ldm import` converts others)."
    check_fit(wanted, shapes_of(found), f"the {what} in {url}", remedy)
    tower.load_state_dict(found, strict=True)


def _names_in_file(stored: Sequence[str], wanted: Mapping[str, Any], mark: str) -> dict[str, str]:
    """Tower name -> name in the file, under the prefix that covers most of the tower."""
    present = set(stored)
    prefixes = [name.removesuffix(mark) for name in stored if name.endswith(mark)]
    candidates = [{name: p + name for name in wanted if p + name in present} for p in prefixes]
    return max(candidates, key=len, default={})
