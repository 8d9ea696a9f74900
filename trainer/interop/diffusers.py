"""Folders of diffusers: components with their config.json and weights, read and written at any URL."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from data_pipeline.storage.files import exists, read_bytes, write_bytes
from trainer.config.run import ConfigError
from trainer.interop.diffusers_unet import Json
from trainer.weights import read_weights, write_weights

UNETS = ("UNet2DConditionModel", "UNet2DModel")
AUTOENCODERS = ("AutoencoderKL", "VQModel")
TEXT_TOWERS = ("CLIPTextModel", "CLIPTextModelWithProjection")
FOLDERS = ("unet", "vae", "vqvae", "text_encoder", "text_encoder_2")
NETWORK_FILE = "diffusion_pytorch_model.safetensors"
TEXT_FILE = "model.safetensors"
INDEX_FILE = "model_index.json"
LIBRARIES = {"CLIPTextModel": "transformers", "CLIPTextModelWithProjection": "transformers"}


VARIANTS = ("", "fp16", "bf16", "fp32", "non_ema", "ema")
"""Of a component's weights; the first that is there is read."""


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
        names = self.config.get("architectures")
        first = names[0] if isinstance(names, list) and names else "?"
        return str(self.config.get("_class_name") or first)


def is_folder(url: str) -> bool:
    """Whether the URL is the folder of a pipeline, with or without its index, or of a component."""
    places = (INDEX_FILE, "config.json", *(f"{name}/config.json" for name in FOLDERS))
    return any(exists(f"{url}/{place}") for place in places)


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


def read_scheduler(url: str) -> Json | None:
    """scheduler_config.json of a pipeline's folder, where it has one."""
    place = f"{url.rstrip('/')}/scheduler/scheduler_config.json"
    return read_json(place) if exists(place) else None


def write_folder(
    url: str,
    components: Mapping[str, Component],
    schedulers: Mapping[str, Json],
    tokenizers: Mapping[str, Mapping[str, bytes]],
    pipeline: Json | None,
) -> list[str]:
    """Write a pipeline's folder; weights come first and model_index.json last. The folders and files written.

    Args:
        url: folder, at any URL.
        components: networks by folder name.
        schedulers: scheduler_config.json by folder name.
        tokenizers: files of a CLIPTokenizer by folder name.
        pipeline: model_index.json without its components; None where no pipeline draws this, and only the
            components are written.
    """
    url = url.rstrip("/")
    index: Json = {}
    for name, component in components.items():
        library = LIBRARIES.get(component.kind, "diffusers")
        file = TEXT_FILE if library == "transformers" else NETWORK_FILE
        write_weights(f"{url}/{name}/{file}", component.tensors, {"format": "pt"})
        write_json(f"{url}/{name}/config.json", component.config)
        index[name] = [library, component.kind]
    for name, files in tokenizers.items():
        for file, content in files.items():
            write_bytes(f"{url}/{name}/{file}", content)
        index[name] = ["transformers", "CLIPTokenizer"]
    for name, scheduler in schedulers.items():
        write_json(f"{url}/{name}/scheduler_config.json", scheduler)
        index[name] = ["diffusers", scheduler["_class_name"]]
    written = [f"{url}/{name}" for name in index]
    if pipeline is not None:
        write_json(f"{url}/{INDEX_FILE}", pipeline | index)
        written.append(f"{url}/{INDEX_FILE}")
    return written


def read_json(url: str) -> Json:
    """A JSON object at any URL."""
    try:
        content = json.loads(read_bytes(url))
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{url} is not JSON, or cut short ({error}); copy or download it again.") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{url} is not a JSON object.")
    return content


def write_json(url: str, content: Mapping[str, Any]) -> None:
    """Write a JSON object at any URL."""
    write_bytes(url, (json.dumps(content, indent=2) + "\n").encode())


def _read_component(folder: str) -> Component:
    config = read_json(f"{folder}/config.json")
    stems = (NETWORK_FILE.removesuffix(".safetensors"), TEXT_FILE.removesuffix(".safetensors"))
    for variant in VARIANTS:
        for stem in stems:
            for file, index in _weight_files(stem, variant):
                if exists(f"{folder}/{file}"):
                    shards = _shards_of(f"{folder}/{file}") if index else [file]
                    parts = [read_weights(f"{folder}/{shard}")[0] for shard in shards]
                    return Component(config, {n: t for part in parts for n, t in part.items()})
    raise ConfigError(
        f"{folder} has no {NETWORK_FILE}, whole or in parts, nor a variant of it "
        f"({', '.join(VARIANTS[1:])}); .bin files are pickles and are not read; "
        "save the model with safe_serialization=True."
    )


def _weight_files(stem: str, variant: str) -> Iterator[tuple[str, bool]]:
    """Names under which diffusers and transformers save weights, and whether each is an index of parts."""
    dotted = f".{variant}" if variant else ""
    yield f"{stem}{dotted}.safetensors", False
    yield f"{stem}.safetensors.index{dotted}.json", True
    if variant:  # the older place of the variant
        yield f"{stem}{dotted}.safetensors.index.json", True


def _shards_of(url: str) -> list[str]:
    """Files that an index names. Raises ConfigError where it names none, or files outside its folder."""
    parts = read_json(url).get("weight_map")
    files = sorted({str(file) for file in parts.values()}) if isinstance(parts, dict) else []
    if not files or any("/" in file or not file.endswith(".safetensors") for file in files):
        raise ConfigError(f"{url} has no weight_map of safetensors files beside it; save the model again.")
    return files


def _role(kind: str) -> str:
    for kinds, role in ((UNETS, "unet"), (AUTOENCODERS, "vae"), (TEXT_TOWERS, "text_encoder")):
        if kind in kinds:
            return role
    known = ", ".join((*UNETS, *AUTOENCODERS, *TEXT_TOWERS))
    raise ConfigError(f"a component of class {kind} cannot be imported; {known} can.")
