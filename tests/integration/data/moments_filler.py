"""Fills a cache of moments without end: SHARDS CACHE ORDER. Run and imported by test_moments_storage.py."""

from __future__ import annotations

import itertools
import sys
from collections import Counter

import torch
from torch import Tensor

from data_pipeline.config import DataConfig
from data_pipeline.loader import build_loader
from data_pipeline.moments.entry import Moments, MomentsCache
from data_pipeline.moments.writer import MomentsWriter

BATCH, STEPS = 16, 12


def config_for(url: str, **changes: object) -> DataConfig:
    base: dict[str, object] = {"shards": url, "image_size": 32, "workers": 0}
    return DataConfig(**{**base, **changes})  # type: ignore[arg-type]


def cache_at(url: str) -> MomentsCache:
    return MomentsCache(url, "stage", "fp32", channels=3, downsampling=8)


def train(
    config: DataConfig, cache: MomentsCache | None, steps: int = STEPS, part_bytes: int = 40_000
) -> tuple[list[tuple[tuple[str, ...], Tensor]], Counter[str]]:
    """Keys and moments of every step, and what was counted. The encoder is a mean over 8 x 8 pixels."""
    writer = MomentsWriter(cache, part_bytes=part_bytes) if cache is not None else None
    out = []
    moments = Moments(0, cache)
    with build_loader(config, seed=5, global_batch_size=BATCH, moments=moments) as loader:
        for batch in itertools.islice(loader, steps):
            values = torch.nn.functional.avg_pool2d(batch.pixels.float(), 8)
            if batch.cached is not None and writer is not None:
                values = torch.where(batch.cached.found[:, None, None, None], batch.cached.values, values)
                writer.put(batch.cached.labels, values.numpy, 1)
            out.append((batch.keys, values))
        counts = Counter(loader.counts)
    if writer is not None:
        writer.close()
        counts += writer.counts
    return out, counts


def same(a: list[tuple[tuple[str, ...], Tensor]], b: list[tuple[tuple[str, ...], Tensor]]) -> bool:
    return all(x[0] == y[0] and torch.equal(x[1], y[1]) for x, y in zip(a, b, strict=True))


if __name__ == "__main__":
    train(config_for(sys.argv[1], order=sys.argv[3]), cache_at(sys.argv[2]), steps=10**9, part_bytes=12_000)
