"""Memory of loader processes against data.buffer_bytes, with pictures that are large for it.

    python benchmarks/read_ahead.py --order indexed --budget 16000000
    python benchmarks/read_ahead.py --order streamed --budget 256000000

64 shards, links to one of 130 pictures of 432 KB each; 64 lanes on two loader processes, a batch of 64.
Shown is the most of PSS (`/proc/PID/smaps_rollup`) of each process over 20 steps and two seconds after them,
when the read-ahead is full, with requests and bytes. The interpreter and its libraries are 60 MiB of it.
"""

from __future__ import annotations

import argparse
import io
import os
import sys
import tarfile
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data_pipeline.config import DataConfig
from data_pipeline.loader import Loader, build_loader

SHARDS, SAMPLES, EDGE = 64, 130, 720


def make_shards(folder: Path) -> None:
    """One tar of noise, which compresses badly, under many names."""
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (EDGE, EDGE, 3), np.uint8))
    out = io.BytesIO()
    picture.save(out, "JPEG", quality=88)
    with tarfile.open(folder / "00000.tar", "w") as tar:
        for i in range(SAMPLES):
            for extension, content in (("jpg", out.getvalue()), ("txt", b"a caption")):
                info = tarfile.TarInfo(f"{i:05d}.{extension}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    for shard in range(1, SHARDS):
        os.link(folder / "00000.tar", folder / f"{shard:05d}.tar")


def pss_mib(pid: int) -> float:
    """Memory of a process, with its share of what it shares."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("Pss:")).split()[1]) / 1024


def main() -> None:
    """Measure one order with one limit."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--order", default="indexed", choices=("indexed", "streamed"))
    parser.add_argument("--budget", type=int, default=256_000_000, help="data.buffer_bytes")
    parser.add_argument("--steps", type=int, default=20)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        make_shards(Path(folder))
        config = DataConfig(
            shards=folder, image_size=256, lanes=64, order=args.order, buffer_bytes=args.budget
        )
        loader = build_loader(config, seed=1, global_batch_size=64)
        assert isinstance(loader, Loader)
        with loader:
            most = dict.fromkeys((child.pid for child in psutil.Process().children()), 0.0)
            for step in range(args.steps + 20):
                if step < args.steps:
                    next(loader)
                else:
                    time.sleep(0.1)
                most = {pid: max(known, pss_mib(pid)) for pid, known in most.items()}
            told = ", ".join(f"{value:.0f}" for value in most.values())
            print(f"{args.order}, {args.budget / 1e6:.0f} MB: {told} MiB; {dict(loader.counts)}")


if __name__ == "__main__":
    main()
