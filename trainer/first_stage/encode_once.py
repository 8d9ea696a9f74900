"""Encodes what the cache of moments lacks, and has it kept: each picture goes through the encoder once.

What is kept is `FirstStage.moments`, rounded to `first_stage.cache_dtype`; what is encoded just now is
rounded alike, so a step computes the same whether its pictures were in the cache or not. Pictures are encoded
in groups of one size, the last one filled up with black ones: kernels depend on the number of pictures, and
another kernel may round differently.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from data_pipeline.batch import Batch
from data_pipeline.moments.entry import MomentsCache
from data_pipeline.moments.parts import STAGE, taken_bytes
from data_pipeline.moments.writer import MomentsWriter
from data_pipeline.storage.files import check_writable, write_bytes
from data_pipeline.storage.urls import join
from trainer.config.models import FirstStageConfig
from trainer.first_stage.base import LATENT_BUFFERS, FirstStage
from trainer.pixels import to_unit_range
from trainer.weights import bits_of

_ENCODING = ("name", "input_range", "tile_pixels", "channel_multipliers", "num_groups")
"""Settings that say what encoding does with the weights; the others of the network show in their shapes."""


class EncodeOnce:
    """The moments of batches, from the cache or from the encoder; close it to commit what is left."""

    def __init__(
        self, first_stage: FirstStage, cache: MomentsCache, writer: MomentsWriter, group: int
    ) -> None:
        """`group`: pictures that the encoder sees at once, as it does without a cache."""
        self.cache = cache
        self._first_stage, self._writer, self._group = first_stage, writer, group

    @torch.no_grad()
    def complete(self, batch: Batch) -> Batch:
        """The batch with the moments of all its rows. What was encoded for it is on its way to the cache."""
        cached = batch.cached
        assert cached is not None
        missing = torch.nonzero(~cached.found).flatten().tolist()
        if not missing:
            return batch
        values = cached.values
        everything = len(missing) == len(batch)
        for start in range(0, len(missing), self._group):
            rows = missing[start : start + self._group]
            at: slice | Tensor = slice(start, start + len(rows))
            if not everything:
                at = _index(rows, values.device)
            if everything and len(rows) == self._group:
                pixels = batch.pixels[at]
            else:
                pixels = _black(self._group, batch.pixels)
                pixels[: len(rows)] = batch.pixels[at]
            encoded = self._first_stage.moments(to_unit_range(pixels))
            values[at] = encoded[: len(rows)].to(values.dtype)
        labels = [label if self._writer.wants(label) else None for label in cached.labels]
        if any(labels):
            self._writer.put(labels, _on_its_way(values), values.numel() * values.element_size())
        found = torch.ones_like(cached.found)
        return dataclasses.replace(batch, cached=dataclasses.replace(cached, values=values, found=found))

    @property
    def counts(self) -> Counter[str]:
        """What was written by this rank: see `MomentsWriter.counts`."""
        return self._writer.counts

    def close(self) -> None:
        """Commit what was encoded last."""
        self._writer.close()


def moments_cache(config: FirstStageConfig, first_stage: FirstStage) -> MomentsCache:
    """Where the moments of a first stage lie, which is on its device and in the dtype that it computes in."""
    assert config.cache is not None
    stage = _digest(config, first_stage)
    return MomentsCache(
        folder=join(config.cache, stage[:20]),
        stage=stage,
        dtype=config.cache_dtype,
        channels=first_stage.moments_channels,
        downsampling=config.downsampling,
    )


def open_cache(config: FirstStageConfig, cache: MomentsCache) -> int | None:
    """Try to write to the cache; bytes that may still be added, None without a bound.

    Raises:
        UserError, RetryableFault: it cannot be written or listed.
    """
    assert config.cache is not None
    check_writable(config.cache)
    about = {"first_stage": dataclasses.asdict(config), "digest": cache.stage}
    write_bytes(join(cache.folder, STAGE), json.dumps(about, indent=1).encode())
    if not config.cache_bytes:
        return None
    return max(0, config.cache_bytes - taken_bytes(config.cache))


def _digest(config: FirstStageConfig, first_stage: FirstStage) -> str:
    """Hexadecimal; changes with any weight, what encoding does, and the dtypes of it and of the cache."""
    fields = dataclasses.asdict(config)
    told: dict[str, Any] = {name: fields[name] for name in _ENCODING}
    hasher = hashlib.sha256(json.dumps([told, config.cache_dtype]).encode())
    for name, tensor in sorted(first_stage.state_dict().items()):
        if name in (*LATENT_BUFFERS, "logvar"):  # applied after the cache, or never
            continue
        hasher.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        hasher.update(bits_of(tensor))
    return hasher.hexdigest()


def _black(size: int, like: Tensor) -> Tensor:
    """uint8 [size, 3, H, W], black, with the layout in memory of other pictures: kernels depend on it."""
    shape = (size, *like.shape[1:])
    return torch.empty_strided(shape, like.stride(), dtype=like.dtype, device=like.device).zero_()


def _index(rows: list[int], device: torch.device) -> Tensor:
    """Pinned where there is a GPU, so that nothing waits for it."""
    on_gpu = device.type == "cuda"
    return torch.tensor(rows, pin_memory=on_gpu).to(device, non_blocking=True)


def _on_its_way(values: Tensor) -> Callable[[], NDArray[Any]]:
    """Begin the copy of values to the host; what waits for it and gives their bits."""
    if values.device.type != "cuda":
        bits = _bits(values.clone())
        return lambda: bits
    host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    host.copy_(values, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record()

    def wait() -> NDArray[Any]:
        copied.synchronize()
        return _bits(host)

    return wait


def _bits(values: Tensor) -> NDArray[Any]:
    carried = values.view(torch.int16) if values.dtype == torch.bfloat16 else values
    array: NDArray[Any] = carried.numpy()
    return array
