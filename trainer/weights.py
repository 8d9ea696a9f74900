"""Weights: tensors from a URL, tensors to a URL, and whether tensors fit a network.

Ours are safetensors files. Torch files of other programs are read as well, without running what they contain.
"""

from __future__ import annotations

import io
import json
import os
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from typing import Any, Protocol, TypeVar

import safetensors
import safetensors.torch
import torch
from torch import Tensor
from torch.nn import init
from torch.overrides import TorchFunctionMode

from data_pipeline.errors import NotFound, UserError
from data_pipeline.storage.files import read_bytes, read_head
from data_pipeline.storage.large import write_whole
from data_pipeline.storage.urls import is_local, local_path
from trainer.config.run import ConfigError
from trainer.foreign_files import HEAD_BYTES, clean_names, kind_of, read_torch

TORCH_ENDINGS = (".ckpt", ".pt", ".pth", ".bin")
WEIGHT_ENDINGS = (".safetensors", *TORCH_ENDINGS)
MAX_LISTED = 40
"""Names that follow the sentence about tensors that do not fit, at most."""

T = TypeVar("T")
Shapes = Mapping[str, tuple[int, ...]]
Choice = Callable[[Sequence[str]], Iterable[str]]
"""Names in a file -> those that are wanted."""


class Reader(Protocol):
    """Who reads, when weights are to be read."""

    def __call__(self, read: Callable[[], T], /) -> T:
        """What `read` gives, or gave where it was called; raises as it does."""
        ...


def _here(read: Callable[[], T]) -> T:
    return read()


_READER: ContextVar[Reader] = ContextVar("reader", default=_here)


def read_once(read: Callable[[], T]) -> T:
    """What `read` gives: here, or, inside `read_through`, wherever its reader has it read.

    Everything that reads weights, or asks where they are, goes through this.

    Args:
        read: gives tensors in dictionaries and tuples, or a small value.
    """
    return _READER.get()(read)


@contextmanager
def read_through(reader: Reader) -> Iterator[None]:
    """Inside, `reader` reads weights."""
    before = _READER.set(reader)
    try:
        yield
    finally:
        _READER.reset(before)


def read_alone() -> AbstractContextManager[None]:
    """Inside, this process reads weights by itself, whatever is around."""
    return read_through(_here)


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
    """Tensors (on the CPU) and metadata of a safetensors file; prefixes of wrappers are left out.

    Raises:
        ConfigError: the file does not exist or is not a safetensors file.
    """

    def read() -> tuple[dict[str, Tensor], dict[str, str]]:
        data = _bytes_of(url)
        _require_safetensors(data[:HEAD_BYTES], url)
        return _parsed(data, url)

    return read_once(read)


def read_metadata(url: str) -> dict[str, str]:
    """Metadata alone: reads the header, not the tensors.

    Raises:
        ConfigError: as `read_weights`.
    """
    try:
        head = read_head(url, HEAD_BYTES)
        _require_safetensors(head, url)
        header = json.loads(read_head(url, 8 + int.from_bytes(head[:8], "little"))[8:])
    except NotFound as error:
        raise _absent(url) from error
    except UserError:  # which is a ValueError, too
        raise
    except (ValueError, RecursionError) as error:
        raise _damaged(url, error) from error
    return _texts(header)


def metadata_object(metadata: Mapping[str, str], key: str, url: str) -> dict[str, Any]:
    """An entry of a file's metadata that is a JSON object.

    Raises:
        ConfigError: there is no such entry, or it is something else.
    """
    if key not in metadata:
        raise ConfigError(
            f"{url} does not say its {key} (in the metadata); name a run folder, or a file that `ldm export` "
            "or `ldm import` wrote."
        )
    try:
        value = json.loads(metadata[key])
    except (ValueError, RecursionError) as error:
        raise ConfigError(
            f"{url} has {key} in its metadata that is no JSON ({error}); export it again."
        ) from error
    if not isinstance(value, dict):
        raise ConfigError(f"{url} has {key} in its metadata that is no JSON object; export it again.")
    return value


def read_tensors(url: str, choose: Choice | None = None) -> dict[str, Tensor]:
    """Tensors of a safetensors or torch file at any URL, on the CPU, without prefixes of wrappers.

    Which of the two a file is follows from its content. Torch files are read with weights_only: tensors and
    plain containers, no code.

    Args:
        choose: gets the names in the file and gives those that are wanted. From a file on this machine
            only these are read; they may share its pages, so copy them before the file can change.

    Raises:
        ConfigError: no such file, not such a file, or a torch file that wants to run code.
    """
    return read_once(lambda: _read_tensors(url, choose))


def write_weights(url: str, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    """Write contiguous CPU copies of the tensors with string metadata."""
    whole = {name: value.detach().to("cpu").contiguous() for name, value in tensors.items()}
    assert all(value.dtype != torch.float64 for value in whole.values())
    write_whole(url, safetensors.torch.save(whole, metadata))


def bits_of(tensor: Tensor) -> memoryview:
    """The bytes of a tensor's values, on the host."""
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data


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


def _read_tensors(url: str, choose: Choice | None) -> dict[str, Tensor]:
    if is_local(url):
        path = local_path(url)
        if not os.path.isfile(path):
            raise _absent(url)
        if kind_of(read_head(url, HEAD_BYTES), url) == "torch":
            # Those of old versions of torch cannot be mapped; of this name torch would not read any.
            named = not path.endswith(".safetensors")
            mapped = named and choose is not None and zipfile.is_zipfile(path)
            tensors = read_torch(path if named else io.BytesIO(_bytes_of(url)), url, mapped=mapped)
        elif choose is not None:
            return _chosen_from_file(url, choose)
        else:
            return read_weights(url)[0]
    else:
        data = _bytes_of(url)
        if kind_of(data[:HEAD_BYTES], url) == "torch":
            tensors = read_torch(io.BytesIO(data), url, mapped=False)
        else:
            tensors = _parsed(data, url)[0]
    tensors = {name: tensors[theirs] for name, theirs in clean_names(tensors).items()}
    return tensors if choose is None else {name: tensors[name] for name in choose(list(tensors))}


def _absent(url: str) -> ConfigError:
    return ConfigError(f"there is no weights file at {url}; check the path or URL.")


def _bytes_of(url: str) -> bytes:
    try:
        return read_bytes(url)
    except NotFound as error:
        raise _absent(url) from error


def _texts(header: object) -> dict[str, str]:
    metadata = header.get("__metadata__") if isinstance(header, dict) else None
    return {str(k): str(v) for k, v in metadata.items()} if isinstance(metadata, dict) else {}


def _damaged(url: str, error: Exception) -> ConfigError:
    return ConfigError(f"{url} is not a safetensors file, or cut short ({error}); copy or download it again.")


def _require_safetensors(head: bytes, url: str) -> None:
    if kind_of(head, url) != "safetensors":
        raise ConfigError(f"{url} is a torch file; convert it with `ldm import`.")


def _parsed(data: bytes, url: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        tensors = safetensors.torch.load(data)
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    except (safetensors.SafetensorError, ValueError, KeyError) as error:  # KeyError: a type that torch lacks
        raise _damaged(url, error) from error
    # The library's order is another each time, and what is written from it would be another file.
    return {name: tensors[theirs] for name, theirs in sorted(clean_names(tensors).items())}, _texts(header)


def _chosen_from_file(url: str, choose: Choice) -> dict[str, Tensor]:
    try:
        with safetensors.safe_open(local_path(url), framework="pt") as file:
            names = clean_names(file.keys())
            return {name: file.get_tensor(names[name]) for name in choose(list(names))}
    except (safetensors.SafetensorError, ValueError) as error:
        raise _damaged(url, error) from error
