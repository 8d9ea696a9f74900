"""Shards of photograph-like pictures for the benchmarks of the data pipeline."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image


def make_shards(
    folder: Path, samples: int, edge: int, grain: float, per_shard: int = 100, spread: float = 0.25
) -> None:
    """Tars of JPEGs of quality 92: smooth structure plus grain, which decides about the bytes per pixel."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    for shard in range(-(-samples // per_shard)):
        with tarfile.open(folder / f"{shard:05d}.tar", "w") as tar:
            for i in range(min(per_shard, samples - shard * per_shard)):
                height, width = rng.integers(int(edge * (1 - spread)), int(edge * (1 + spread)) + 1, 2)
                coarse = Image.fromarray(rng.integers(0, 256, (24, 24, 3), dtype=np.uint8))
                smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), np.float32)
                noise = rng.normal(0, grain, (height, width, 1)).astype(np.float32)
                out = io.BytesIO()
                Image.fromarray(np.clip(smooth + noise, 0, 255).astype(np.uint8)).save(
                    out, "JPEG", quality=92
                )
                key = f"{shard:05d}{i:04d}"
                for name, body in ((f"{key}.jpg", out.getvalue()), (f"{key}.txt", b"a benchmark picture")):
                    info = tarfile.TarInfo(name)
                    info.size = len(body)
                    tar.addfile(info, io.BytesIO(body))
