"""Weights out of a checkpoint: streamed into one safetensors file, or whole in memory."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from data_pipeline.storage.files import read_bytes
from data_pipeline.storage.large import write_stream
from data_pipeline.storage.urls import join
from trainer.checkpoint.catalogue import CheckpointHandle
from trainer.checkpoint.commands import find_checkpoint
from trainer.checkpoint.layout import MASTER
from trainer.checkpoint.reader import NetworkReader
from trainer.config.run import ConfigError
from trainer.first_stage.base import LATENT_BUFFERS
from trainer.first_stage.statistics import MARK, exported_statistics, never_measured
from trainer.weights import TORCH_ENDINGS, bits_of, read_metadata, read_weights

WEIGHTS = "weights"
"""Name under which the trained weights themselves, not an average, are exported."""

CONTENTS = "contents"
"""Key of {setting: checksum} in a checkpoint's state, and in the metadata of what is exported from it: what
files held that were read and never trained (`trainer/frozen_files.py`)."""

AUTOENCODER = "autoencoder"
"""Name of the engine, and so of the exported network, that is a first stage."""

_GROUP_BYTES = 192 << 20
DTYPES = {"fp32": (torch.float32, "F32"), "bf16": (torch.bfloat16, "BF16"), "fp16": (torch.float16, "F16")}
"""Of tensors in files: torch's and safetensors' by ours."""


@dataclass(frozen=True)
class Exported:
    """What was written."""

    destination: str
    source: str
    """Folder of the checkpoint, or where tensors in memory came from."""
    step: int
    profile: str
    num_parameters: int
    num_bytes: int
    statistics: str | None = None
    """Of a first stage: whether its latent statistics were measured."""


def export(
    source: str, destination: str, *, profile: str | None = None, step: int | None = None, dtype: str = "fp32"
) -> Exported:
    """Write the averaged network of a checkpoint as one file, with the configuration in its metadata.

    Streamed: memory does not grow with the model.

    Args:
        source: run folder, or the folder of one checkpoint.
        destination: URL of a .safetensors file; a folder gets weights.safetensors.
        profile: an average ("decay", "power_0.05", ...) or "weights"; unset: "decay" where there is
            one, else "weights".
        step: which checkpoint of a run folder; unset: the newest.
        dtype: fp32, bf16 or fp16.

    Raises:
        ConfigError: no such checkpoint, average or dtype, or a file that cannot be written.
    """
    if dtype not in DTYPES:
        raise ConfigError(f"dtype is {dtype!r}; choose one of {', '.join(DTYPES)}.")
    handle = _checkpoint_of(source, step)
    state = read_state(handle)
    profile, kind = choose_kind(handle, str(state["averaged"]), profile)
    reader = NetworkReader(handle, state)
    destination = weights_file(destination)
    shapes = reader.shapes
    small, metadata = beside_weights(handle, state, profile)
    num_bytes = write_parameters(
        destination, shapes, lambda names: reader.whole(kind, names), small, metadata, dtype
    )
    count = sum(map(_numel, shapes.values()))
    return Exported(destination, handle.url, handle.step, profile, count, num_bytes, metadata.get(MARK))


def export_tensors(
    tensors: dict[str, Tensor], metadata: dict[str, str], source: str, destination: str, dtype: str
) -> Exported:
    """Write what `open_weights` gave, in memory and perhaps changed, as `export` writes a checkpoint.

    Raises:
        ConfigError: no such dtype, or a file that cannot be written.
    """
    if dtype not in DTYPES:
        raise ConfigError(f"dtype is {dtype!r}; choose one of {', '.join(DTYPES)}.")
    destination = weights_file(destination)
    small = {name: value for name, value in tensors.items() if name in LATENT_BUFFERS}
    shapes = {name: tuple(value.shape) for name, value in tensors.items() if name not in small}
    num_bytes = write_parameters(
        destination,
        shapes,
        lambda names: {name: tensors[name] for name in names},
        small,
        metadata,
        dtype,
    )
    step, profile = int(metadata.get("step", 0)), metadata.get("profile", WEIGHTS)
    count = sum(map(_numel, shapes.values()))
    return Exported(destination, source, step, profile, count, num_bytes, metadata.get(MARK))


def open_weights(
    source: str, *, profile: str | None = None, step: int | None = None
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The averaged network's tensors (CPU, fp32) and metadata, as `ldm export` would write them.

    Args:
        source: run folder, checkpoint folder or .safetensors file; any URL.
        profile: average to take, or "weights"; unset: the average where there is one.
        step: which checkpoint of a run folder; unset: the newest.

    Raises:
        ConfigError: there is nothing there, or a file that holds another profile or step.
    """
    if source.endswith(".safetensors"):
        tensors, metadata = read_weights(source)
        _require_choice(source, metadata, profile, step)
        if metadata.get("network") == AUTOENCODER and never_measured(tensors, metadata):
            tensors, mark = exported_statistics(tensors)
            metadata |= mark
        return tensors, metadata
    handle = _checkpoint_of(source, step)
    state = read_state(handle)
    profile, kind = choose_kind(handle, str(state["averaged"]), profile)
    reader = NetworkReader(handle, state)
    tensors = reader.whole(kind, list(reader.shapes))
    small, metadata = beside_weights(handle, state, profile)
    return {**tensors, **small}, metadata


def open_adapters(
    source: str, *, profile: str | None = None, step: int | None = None
) -> tuple[dict[str, tuple[Tensor, Tensor]], dict[str, str]]:
    """What a run with `lora` trained, as `NetworkReader.adapters` gives it, and its metadata.

    Raises:
        ConfigError: as `open_weights`, or there are no adapters.
    """
    if source.endswith(".safetensors"):
        raise ConfigError(f"{source} holds whole weights; name the run that trained the adapters.")
    handle = _checkpoint_of(source, step)
    state = read_state(handle)
    profile, kind = choose_kind(handle, str(state["averaged"]), profile)
    found = NetworkReader(handle, state).adapters(kind)
    if not found:
        raise ConfigError(f"{source} trained no adapters; name a run with `lora`, or choose another layout.")
    return found, _metadata(handle, state, profile)


def read_about(source: str, *, profile: str | None = None, step: int | None = None) -> dict[str, str]:
    """The metadata that `open_weights` would give, before any tensor is read: small files and headers alone.

    Raises:
        ConfigError: as `open_weights`.
    """
    if source.endswith(".safetensors"):
        metadata = read_metadata(source)
        _require_choice(source, metadata, profile, step)
        return metadata
    handle = _checkpoint_of(source, step)
    state = read_state(handle)
    profile, _ = choose_kind(handle, str(state["averaged"]), profile)
    return _metadata(handle, state, profile)


def weights_file(destination: str) -> str:
    """The file that a destination stands for: itself, or weights.safetensors in a folder.

    Raises:
        ConfigError: it is empty, or has the ending of another format.
    """
    if not destination.strip():
        raise ConfigError("the destination is empty (a variable that is not set?); name a file or folder.")
    if destination.endswith(TORCH_ENDINGS):
        raise ConfigError(
            f"{destination} would hold safetensors; let it end in .safetensors, or name a folder."
        )
    return destination if destination.endswith(".safetensors") else join(destination, "weights.safetensors")


def _require_choice(source: str, metadata: dict[str, str], profile: str | None, step: int | None) -> None:
    """Raise ConfigError where a file, which holds one set of weights, is asked for another."""
    held = metadata.get("profile", WEIGHTS)
    if profile not in (None, held):
        raise ConfigError(
            f"{source} holds {held} alone, not {profile!r}; leave out --weights, or name the run."
        )
    if step is not None and str(step) != metadata.get("step"):
        known = f"step {metadata['step']} alone" if "step" in metadata else "weights of no known step"
        raise ConfigError(
            f"{source} holds {known}, not step {step}; leave out --checkpoint, or name the run."
        )


def _checkpoint_of(source: str, step: int | None) -> CheckpointHandle:
    if source.endswith(TORCH_ENDINGS):
        raise ConfigError(f"{source} is a file of another program; convert it with `ldm import`.")
    if source.endswith(".safetensors"):
        raise ConfigError(
            f"{source} is a file, not a run; name the run or checkpoint folder that it came from."
        )
    return find_checkpoint(source, step)


def read_state(handle: CheckpointHandle) -> dict[str, Any]:
    """Progress, configuration and versions of a checkpoint."""
    state: dict[str, Any] = json.loads(read_bytes(join(handle.url, handle.manifest.state.name)))
    return state


def beside_weights(
    handle: CheckpointHandle, state: dict[str, Any], profile: str
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """What an exported file holds beside the trained weights.

    Small tensors: the latent statistics, which a first stage has only where they were measured. Metadata:
    where the file comes from, the resolved configuration, and of a first stage whether they were measured.
    """
    small = read_weights(join(handle.url, handle.manifest.tensors.name))[0]
    metadata = _metadata(handle, state, profile)
    if metadata["network"] == AUTOENCODER:
        small, mark = exported_statistics(small)
        metadata |= mark
    return small, metadata


def _metadata(handle: CheckpointHandle, state: dict[str, Any], profile: str) -> dict[str, str]:
    contents = state["state"].get(CONTENTS)  # of the run alone: a snapshot of averages has none
    return {
        "config": json.dumps(state["config"]),
        "step": str(handle.step),
        "profile": profile,
        "network": str(state["averaged"]),
        **({CONTENTS: json.dumps(contents)} if contents else {}),
    }


def write_parameters(
    destination: str,
    shapes: dict[str, tuple[int, ...]],
    read: Callable[[list[str]], dict[str, Tensor]],
    small: dict[str, Tensor],
    metadata: dict[str, str],
    dtype: str,
) -> int:
    """Stream parameters and small tensors (fp32 at any dtype) into one file; its size in bytes.

    Args:
        read: gives the named parameters whole, in fp32; called with groups of a few of them.
    """
    torch_dtype, name_of_dtype = DTYPES[dtype]
    parameters = {name: shape for name, shape in shapes.items() if name not in small}
    header = _header(parameters, name_of_dtype, torch_dtype.itemsize, small, metadata)

    def parts() -> Iterator[memoryview]:
        yield memoryview(header)
        for group in _groups(parameters):
            tensors = read(group)
            for name in group:
                yield bits_of(tensors[name].to(torch_dtype))
        for tensor in small.values():
            yield bits_of(tensor.float())

    size, _ = write_stream(destination, parts)
    return size


def choose_kind(handle: CheckpointHandle, engine: str, profile: str | None) -> tuple[str, str]:
    stored = handle.manifest.kinds[engine]
    averages = [kind.removeprefix("ema.") for kind in stored if kind.startswith("ema.")]
    if profile is None:
        profile = averages[0] if averages else WEIGHTS
    if profile == WEIGHTS and MASTER in stored:
        return profile, MASTER
    if profile in averages:
        return profile, f"ema.{profile}"
    choices = ", ".join([*averages, *([WEIGHTS] if MASTER in stored else [])])
    raise ConfigError(f"{handle.url} has no average {profile!r}; choose one of {choices}.")


def _header(
    shapes: dict[str, tuple[int, ...]],
    dtype: str,
    itemsize: int,
    small: dict[str, Tensor],
    metadata: dict[str, str],
) -> bytes:
    entries: dict[str, object] = {"__metadata__": metadata}
    offset = 0
    sized: list[tuple[str, tuple[int, ...], str, int]] = [(n, s, dtype, itemsize) for n, s in shapes.items()]
    sized += [(name, tuple(tensor.shape), "F32", 4) for name, tensor in small.items()]
    for name, shape, kind, width in sized:
        stop = offset + _numel(shape) * width
        entries[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [offset, stop]}
        offset = stop
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _groups(shapes: dict[str, tuple[int, ...]]) -> Iterable[list[str]]:
    group: list[str] = []
    size = 0
    for name, shape in shapes.items():
        group.append(name)
        size += 4 * _numel(shape)
        if size >= _GROUP_BYTES:
            yield group
            group, size = [], 0
    if group:
        yield group


def _numel(shape: tuple[int, ...]) -> int:
    count = 1
    for dimension in shape:
        count *= dimension
    return count
