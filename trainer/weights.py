"""Safetensors files at any fsspec URL: the only form in which weights enter or leave."""

from __future__ import annotations

import json

import fsspec
import safetensors
import safetensors.torch
import torch
from torch import Tensor

from trainer.config.run import ConfigError

_MAX_HEADER_BYTES = 100_000_000


def read_weights(url: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors (on the CPU) and metadata of a safetensors file.

    Raises:
        ConfigError: the file does not exist or is not a safetensors file.
    """
    try:
        with fsspec.open(url, "rb") as file:
            data = file.read()
    except FileNotFoundError as error:
        raise ConfigError(f"there is no weights file at {url}; check the path or URL.") from error
    return parse_weights(data, url)


def parse_weights(data: bytes, url: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The same, from bytes already read; `url` is named in errors."""
    try:
        tensors = safetensors.torch.load(data)
        header_bytes = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + header_bytes])
    except (safetensors.SafetensorError, ValueError) as error:
        raise ConfigError(f"{url} is not a safetensors file ({error}).") from error
    return tensors, {str(k): str(v) for k, v in header.get("__metadata__", {}).items()}


def read_metadata(url: str) -> dict[str, str]:
    """Metadata alone: reads the header, not the tensors.

    Raises:
        ConfigError: as `read_weights`.
    """
    try:
        with fsspec.open(url, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > _MAX_HEADER_BYTES:
                raise ConfigError(f"{url} is not a safetensors file (its header would be {length} bytes).")
            header = json.loads(file.read(length))
    except FileNotFoundError as error:
        raise ConfigError(f"there is no weights file at {url}; check the path or URL.") from error
    except json.JSONDecodeError as error:
        raise ConfigError(f"{url} is not a safetensors file ({error}).") from error
    return {str(k): str(v) for k, v in header.get("__metadata__", {}).items()}


def write_weights(url: str, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write contiguous CPU copies of the tensors with string metadata."""
    whole = {name: value.detach().to("cpu").contiguous() for name, value in tensors.items()}
    assert all(value.dtype != torch.float64 for value in whole.values())
    data = safetensors.torch.save(whole, metadata)
    filesystem, path = fsspec.core.url_to_fs(url)
    parent = filesystem._parent(path)
    if "file" in filesystem.protocol:
        filesystem.makedirs(parent, exist_ok=True)
    with filesystem.open(path, "wb") as file:
        file.write(data)
