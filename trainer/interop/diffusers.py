"""Folders of diffusers: components with their config.json and weights, read and written at any URL."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from data_pipeline.storage.files import exists, read_bytes, write_bytes
from trainer.config.run import ConfigError
from trainer.interop.diffusers_unet import Json
from trainer.weights import read_weights, write_weights

UNETS = ("UNet2DConditionModel", "UNet2DModel")
FIRST_STAGES = ("AutoencoderKL", "VQModel")
TEXT_TOWERS = ("CLIPTextModel", "CLIPTextModelWithProjection")
FOLDERS = ("unet", "vae", "vqvae", "text_encoder", "text_encoder_2")
NETWORK_FILE = "diffusion_pytorch_model.safetensors"
TEXT_FILE = "model.safetensors"
LIBRARIES = {"CLIPTextModel": "transformers", "CLIPTextModelWithProjection": "transformers"}


@dataclass
class Component:
    """One network of a pipeline."""

    config: Json
    """Its config.json."""
    tensors: dict[str, Tensor] = field(default_factory=dict)
    """Its weights."""

    @property
    def kind(self) -> str:
        """Class in diffusers or transformers."""
        return str(self.config.get("_class_name") or (self.config.get("architectures") or ["?"])[0])


def is_folder(url: str) -> bool:
    """Whether the URL is a pipeline's or a component's folder."""
    return exists(f"{url}/model_index.json") or exists(f"{url}/config.json")


def read_folder(url: str) -> dict[str, Component]:
    """The networks of a pipeline by folder name; a lone component is called by its role.

    Raises:
        ConfigError: no network of a kind that we know, or weights are missing.
    """
    url = url.rstrip("/")
    if exists(f"{url}/config.json"):
        component = _read_component(url)
        return {_role(component.kind): component}
    found = {name: f"{url}/{name}" for name in FOLDERS if exists(f"{url}/{name}/config.json")}
    if not found:
        raise ConfigError(f"{url} holds none of {', '.join(FOLDERS)}; name a folder that diffusers saved.")
    return {name: _read_component(folder) for name, folder in found.items()}


def write_folder(
    url: str, components: Mapping[str, Component], scheduler: Json | None, pipeline: str
) -> None:
    """Write a pipeline folder; weights come first and model_index.json last.

    Args:
        url: folder, at any URL.
        components: by folder name.
        scheduler: scheduler_config.json.
        pipeline: class of the pipeline, written into model_index.json.
    """
    url = url.rstrip("/")
    index: dict[str, Any] = {"_class_name": pipeline}
    for name, component in components.items():
        library = LIBRARIES.get(component.kind, "diffusers")
        file = TEXT_FILE if library == "transformers" else NETWORK_FILE
        write_weights(f"{url}/{name}/{file}", component.tensors, {"format": "pt"})
        write_json(f"{url}/{name}/config.json", component.config)
        index[name] = [library, component.kind]
    if scheduler is not None:
        write_json(f"{url}/scheduler/scheduler_config.json", scheduler)
        index["scheduler"] = ["diffusers", scheduler["_class_name"]]
    write_json(f"{url}/model_index.json", index)


def read_json(url: str) -> Json:
    """A JSON object at any URL."""
    try:
        content = json.loads(read_bytes(url))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{url} is not JSON ({error}).") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{url} is not a JSON object.")
    return content


def write_json(url: str, content: Mapping[str, Any]) -> None:
    """Write a JSON object at any URL."""
    write_bytes(url, (json.dumps(content, indent=2) + "\n").encode())


def _read_component(folder: str) -> Component:
    component = Component(read_json(f"{folder}/config.json"))
    stems = ("diffusion_pytorch_model", "model")
    for stem in stems:
        if exists(f"{folder}/{stem}.safetensors"):
            component.tensors = read_weights(f"{folder}/{stem}.safetensors")[0]
            return component
        if exists(f"{folder}/{stem}.safetensors.index.json"):
            shards = set(read_json(f"{folder}/{stem}.safetensors.index.json")["weight_map"].values())
            for shard in sorted(shards):
                component.tensors |= read_weights(f"{folder}/{shard}")[0]
            return component
    raise ConfigError(
        f"{folder} has no {stems[0]}.safetensors; .bin files are pickles and are not read; "
        "save the model with safe_serialization=True."
    )


def _role(kind: str) -> str:
    for kinds, role in ((UNETS, "unet"), (FIRST_STAGES, "vae"), (TEXT_TOWERS, "text_encoder")):
        if kind in kinds:
            return role
    known = ", ".join((*UNETS, *FIRST_STAGES, *TEXT_TOWERS))
    raise ConfigError(f"a component of class {kind} cannot be imported; {known} can.")
