"""Weights: tensors from a URL, tensors to a URL, and whether tensors fit a network.

Ours are safetensors files. Torch files of other programs are read as well, without running what they contain.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor
from torch.nn import init
from torch.overrides import TorchFunctionMode

from data_pipeline.errors import NotFound
from data_pipeline.storage.files import read_bytes, read_head
from data_pipeline.storage.large import write_whole
from data_pipeline.storage.urls import is_local, local_path
from trainer.config.run import ConfigError

TORCH_ENDINGS = (".ckpt", ".pt", ".pth", ".bin")
WEIGHT_ENDINGS = (".safetensors", *TORCH_ENDINGS)
MAX_LISTED = 40
"""Names that follow the sentence about tensors that do not fit, at most."""

Shapes = Mapping[str, tuple[int, ...]]
Choice = Callable[[Sequence[str]], Iterable[str]]
"""Names in a file -> those that are wanted."""

_MAX_HEADER_BYTES = 100_000_000


class _InertCallback:
    """Stands for the Lightning class that old checkpoints use as a dictionary key; never instantiated."""


_INERT_NAMES = (
    "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint",
    "lightning.pytorch.callbacks.model_checkpoint.ModelCheckpoint",
)


class Undrawn(TorchFunctionMode):
    """Inside, modules are built without drawing their random weights, which a file is about to replace.

    Everything else of a constructor happens as ever: zeros, ones, masks, and the draws of `torch.randn`.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Skip what fills a tensor with random numbers in place; see TorchFunctionMode."""
        kwargs = kwargs or {}
        if func in _DRAWS:
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


_DRAWS = frozenset(
    {
        Tensor.normal_,
        Tensor.uniform_,
        init.uniform_,
        init.normal_,
        init.trunc_normal_,
        init.kaiming_uniform_,
        init.kaiming_normal_,
        init.xavier_uniform_,
        init.xavier_normal_,
    }
)


def read_weights(url: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors (on the CPU) and metadata of a safetensors file.

    Raises:
        ConfigError: the file does not exist or is not a safetensors file.
    """
    data = _bytes_of(url)
    try:
        tensors = safetensors.torch.load(data)
        header_bytes = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + header_bytes])
    except (safetensors.SafetensorError, ValueError) as error:
        raise ConfigError(f"{url} is not a safetensors file ({error}).") from error
    return tensors, _texts(header)


def read_metadata(url: str) -> dict[str, str]:
    """Metadata alone: reads the header, not the tensors.

    Raises:
        ConfigError: as `read_weights`.
    """
    try:
        length = int.from_bytes(read_head(url, 8), "little")
        if length > _MAX_HEADER_BYTES:
            raise ConfigError(f"{url} is not a safetensors file (its header would be {length} bytes).")
        header = json.loads(read_head(url, 8 + length)[8:])
    except NotFound as error:
        raise _absent(url) from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{url} is not a safetensors file ({error}).") from error
    return _texts(header)


def read_tensors(url: str, choose: Choice | None = None) -> dict[str, Tensor]:
    """Tensors of a .safetensors, .ckpt, .pt or .pth file at any URL, on the CPU.

    Torch files are read with weights_only: tensors and plain containers, no code.

    Args:
        choose: gets the names in the file and gives those that are wanted. From a file on this machine
            only these are read; they may share its pages, so copy them before the file can change.

    Raises:
        ConfigError: no such file, not such a file, or a torch file that wants to run code.
    """
    if url.endswith(TORCH_ENDINGS):
        tensors = _read_torch(url, mapped=choose is not None)
    elif choose is not None and is_local(url):
        return _chosen_from_file(url, choose)
    else:
        tensors = read_weights(url)[0]
    return tensors if choose is None else {name: tensors[name] for name in choose(list(tensors))}


def write_weights(url: str, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    """Write contiguous CPU copies of the tensors with string metadata."""
    whole = {name: value.detach().to("cpu").contiguous() for name, value in tensors.items()}
    assert all(value.dtype != torch.float64 for value in whole.values())
    write_whole(url, safetensors.torch.save(whole, metadata))


def shapes_of(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Shapes by name, as `check_fit` compares them; meta tensors will do."""
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def check_fit(wanted: Shapes, found: Shapes, source: str, remedy: str, *, listed: int = MAX_LISTED) -> None:
    """Refuse unless both have the same names with the same shapes: call it before anything is copied.

    Args:
        source: where the tensors come from; begins the sentence.
        remedy: what to do about it; ends the sentence.
        listed: how many of the names that differ are listed at most.

    Raises:
        ConfigError: every missing and unexpected name with its shape, and every differing shape.
    """
    missing = [f"missing {name} {shape}" for name, shape in wanted.items() if name not in found]
    unexpected = [f"unexpected {name} {shape}" for name, shape in found.items() if name not in wanted]
    different = [
        f"{name} is {found[name]} and should be {shape}"
        for name, shape in wanted.items()
        if name in found and found[name] != shape
    ]
    problems = missing + unexpected + different
    if not problems:
        return
    lines = [*problems[:listed], *([f"and {len(problems) - listed} more"] if len(problems) > listed else [])]
    names = "".join(f"\n  {line}" for line in lines)
    raise ConfigError(
        f"{source} does not fit the configured structure: {len(missing)} tensors missing, {len(unexpected)} "
        f"unexpected, {len(different)} of another shape; nothing was loaded. {remedy}{names}"
    )


def _absent(url: str) -> ConfigError:
    return ConfigError(f"there is no weights file at {url}; check the path or URL.")


def _bytes_of(url: str) -> bytes:
    try:
        return read_bytes(url)
    except NotFound as error:
        raise _absent(url) from error


def _texts(header: object) -> dict[str, str]:
    metadata = header.get("__metadata__") if isinstance(header, dict) else None
    return {str(key): str(value) for key, value in (metadata or {}).items()}


def _chosen_from_file(url: str, choose: Choice) -> dict[str, Tensor]:
    path = local_path(url)
    if not os.path.isfile(path):
        raise _absent(url)
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in choose(list(file.keys()))}
    except (safetensors.SafetensorError, ValueError) as error:
        raise ConfigError(f"{url} is not a safetensors file ({error}).") from error


def _read_torch(url: str, *, mapped: bool) -> dict[str, Tensor]:
    source: str | io.BytesIO
    if is_local(url):
        source = local_path(url)
        if not os.path.isfile(source):
            raise _absent(url)
        mapped = mapped and zipfile.is_zipfile(source)  # those of old versions of torch are not
    else:
        source, mapped = io.BytesIO(_bytes_of(url)), False
    try:
        with torch.serialization.safe_globals([(_InertCallback, name) for name in _INERT_NAMES]):
            content = torch.load(source, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        raise ConfigError(
            f"{url} holds more than tensors and was not read, since unpickling it could run code; "
            "convert it to safetensors on a machine that trusts it."
        ) from error
    except (RuntimeError, EOFError, ValueError) as error:
        raise ConfigError(f"{url} is not a torch weights file ({error}).") from error
    for key in ("state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict):
        raise ConfigError(f"{url} holds no dictionary of tensors.")
    return {str(name): value for name, value in content.items() if isinstance(value, Tensor)}
