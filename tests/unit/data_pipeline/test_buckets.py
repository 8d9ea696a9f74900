"""Aspect-ratio buckets: shapes, exactly once, one shape per step, exact resume at another layout."""

from __future__ import annotations

import io
import json
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.config import DataConfig
from data_pipeline.errors import DataError
from data_pipeline.loader import build_loader, merge_positions
from data_pipeline.order.buckets import Buckets, aspect_histogram, bucket_shapes, make_buckets

SIZES = [(32, 32), (64, 32), (32, 64), (48, 32), (60, 30), (40, 38)]


@pytest.fixture
def shards(tmp_path: Path, tiny_picture) -> tuple[str, dict[str, tuple[int, int]]]:
    """Three shards of pictures with six aspects; sizes (width, height) by key."""
    sizes = {}
    for shard in range(3):
        with tarfile.open(tmp_path / f"{shard:05d}.tar", "w") as tar:
            for i in range(40):
                size = SIZES[(i * 5 + shard) % len(SIZES)]
                key = f"{shard:05d}{i:04d}"
                sizes[f"{shard:05d}/{key}"] = size
                for name, body in [("jpg", tiny_picture(i, size=size)), ("txt", b"x")]:
                    info = tarfile.TarInfo(f"{key}.{name}")
                    info.size = len(body)
                    tar.addfile(info, io.BytesIO(body))
    return str(tmp_path / "*.tar"), sizes


def run(url: str, steps: int, *, ranks: int = 1, position=None):
    config = DataConfig(
        shards=url, image_size=32, bucket_step=8, buckets=True, workers=0, shuffle_window=7, lanes=6
    )
    loaders = [
        build_loader(config, seed=2, global_batch_size=6, rank=r, world_size=ranks, position=position)
        for r in range(ranks)
    ]
    out = []
    for _ in range(steps):
        parts = [next(loader) for loader in loaders]
        assert len({p.pixels.shape[2:] for p in parts}) == 1  # one shape for the whole global batch
        ordinals = torch.cat([p.ordinals for p in parts]).tolist()
        out.append(([k for p in parts for k in p.keys], ordinals, tuple(parts[0].pixels.shape[2:])))
        position = merge_positions([json.loads(json.dumps(p.position)) for p in parts])
    for loader in loaders:
        loader.close()
    return out, position


def test_every_sample_once_per_epoch_and_in_its_bucket(shards) -> None:
    url, sizes = shards
    out, position = run(url, 60)
    assert min(s[0] for s in position["states"]) >= 1
    counts = Counter(k for keys, ordinals, _ in out for k, o in zip(keys, ordinals, strict=True) if o < 120)
    assert counts == Counter(dict.fromkeys(sizes, 1))
    for keys, _, (height, width) in out:
        for key in keys:
            w, h = sizes[key]
            assert (w > h) == (width > height) or abs(np.log2(w / h)) < 0.4


def test_resume_at_another_layout_goes_on_exactly(shards) -> None:
    whole, _ = run(shards[0], 14)
    first, position = run(shards[0], 5, ranks=2)
    rest, _ = run(shards[0], 9, ranks=3, position=position)
    assert first + rest == whole
    assert len({shape for _, _, shape in whole}) >= 2


@settings(max_examples=100, deadline=None)
@given(size=st.sampled_from([64, 256, 512, 1024]), step=st.sampled_from([8, 32, 64]), aspect=st.floats(1, 4))
def test_shapes_hold_their_promises(size, step, aspect) -> None:
    shapes = bucket_shapes(size, step, aspect)
    assert (size, size) in shapes
    assert {(w, h) for h, w in shapes} == set(shapes)
    for height, width in shapes:
        assert height % step == width % step == 0
        assert height * width <= size * size
        assert max(height / width, width / height) <= aspect


def test_frequencies_follow_the_data_within_few_steps() -> None:
    buckets = Buckets(((32, 64), (32, 32), (64, 32)), (0.2, 0.7, 0.1))
    chosen = [buckets.of_step(5, k) for k in range(2000)]
    for n in (100, 500, 2000):
        for b, weight in enumerate(buckets.weights):
            assert abs(chosen[:n].count(b) - weight * n) < 6


def test_rare_shapes_are_merged_and_missing_sizes_refused() -> None:
    shapes = bucket_shapes(64, 16, 2.0)
    sizes = np.asarray([64.0] * 500 + [20.0]), np.asarray([64.0] * 500 + [40.0])
    histogram = aspect_histogram(*sizes)
    assert make_buckets(shapes, histogram, 8).shapes == ((64, 64),)
    with pytest.raises(DataError, match="ldm data index"):
        make_buckets(shapes, {}, 8)
    with pytest.raises(DataError, match="bucket_step=48"):
        bucket_shapes(64, 48, 2.0)
