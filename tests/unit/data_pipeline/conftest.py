"""Small shards made by plain tarfile, independent of the code under test."""

from __future__ import annotations

import io
import json
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from data_pipeline.config import DataConfig
from data_pipeline.loader import Part, build_loader, merge_positions


def tiny_picture(value: int, *, size: tuple[int, int] = (20, 16), kind: str = "JPEG") -> bytes:
    """Picture of width x height whose colour depends on `value`."""
    pixels = np.full((size[1], size[0], 3), (value * 37 % 256, value * 91 % 256, value * 53 % 256), np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, kind)
    return out.getvalue()


def write_tar(path: Path, members: list[tuple[str, bytes]], *, format: int = tarfile.USTAR_FORMAT) -> None:
    """Write members with the standard library."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=format) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def write_shards(
    folder: Path, counts: list[int], *, corrupt: frozenset[str] = frozenset(), first: int = 0
) -> list[str]:
    """Shards with `counts` samples; returns their keys `shard/key`. Pictures of `corrupt` keys are noise."""
    keys = []
    for shard, count in enumerate(counts, first):
        members = []
        for i in range(count):
            key = f"{shard:05d}{i:04d}"
            name = f"{shard:05d}/{key}"
            keys.append(name)
            picture = b"not a picture" if name in corrupt else tiny_picture(shard * 101 + i)
            record = {"score": (i * 7 % 10) / 10, "width": 20, "height": 16, "url": f"http://x.invalid/{key}"}
            members += [
                (f"{key}.jpg", picture),
                (f"{key}.json", json.dumps(record).encode()),
                (f"{key}.txt", f"caption {key}".encode()),
            ]
        write_tar(folder / f"{shard:05d}.tar", members)
    return keys


def run(
    config: DataConfig, steps: int, *, ranks: int = 1, position: Any = None, seed: int = 3, batch: int = 12
) -> tuple[list[tuple[list[str], list[int], list[Any]]], dict[str, Any], Counter[str]]:
    """Global batches (keys, ordinals, pixels), the position after the last, and what was rejected."""
    loaders = [
        build_loader(config, seed=seed, global_batch_size=batch, part=Part(r, ranks), position=position)
        for r in range(ranks)
    ]
    out = []
    for _ in range(steps):
        parts = [next(loader) for loader in loaders]
        keys = [key for part in parts for key in part.keys]
        pixels = [row.tolist() for part in parts for row in part.pixels]
        out.append((keys, torch.cat([part.ordinals for part in parts]).tolist(), pixels))
        position = merge_positions([json.loads(json.dumps(part.position)) for part in parts])
    rejected = sum((loader.rejected for loader in loaders), Counter[str]())
    for loader in loaders:
        loader.close()
    return out, position, rejected


@pytest.fixture(scope="session", name="run")
def run_fixture():
    """The function of this file."""
    return run


@pytest.fixture(scope="session", name="write_shards")
def write_shards_fixture():
    """The function of this file (test modules cannot import each other)."""
    return write_shards


@pytest.fixture(scope="session", name="write_tar")
def write_tar_fixture():
    """The function of this file."""
    return write_tar


@pytest.fixture(scope="session", name="tiny_picture")
def tiny_picture_fixture():
    """The function of this file."""
    return tiny_picture


@pytest.fixture
def make_shards(tmp_path: Path):
    """Function (counts, **options) -> (URL, keys)."""

    def make(counts: list[int], **options: object) -> tuple[str, list[str]]:
        keys = write_shards(tmp_path / "shards", counts, **options)  # type: ignore[arg-type]
        return str(tmp_path / "shards" / "*.tar"), keys

    return make
