"""The index at the size of LAION: 200,000 shards of 10,000 samples, 2 billion in all.

    python benchmarks/index_scale.py --shards 200000 --samples 10000 --ranks 64 --workers 2

One real shard is made and indexed, from disk and from S3; the others are links to it with manifest rows of
their own. Then one rank of a run opens all of them, and the memory of its loader processes is read.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import tempfile
import time
from pathlib import Path

import psutil

from data_pipeline.config import DataConfig
from data_pipeline.loader import build_loader
from data_pipeline.scenes.scene import SceneOptions
from data_pipeline.scenes.write_shards import SynthesisOptions, synthesize
from data_pipeline.shards.build_index import build_index
from data_pipeline.shards.dataset import open_dataset
from data_pipeline.shards.manifest import MANIFEST, ManifestRow, write_manifest
from data_pipeline.storage.listing import list_files
from data_pipeline.storage.local_s3 import LocalS3

MIB = 2**20


def main() -> None:
    """Print one line per figure."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shards", type=int, default=200_000)
    parser.add_argument("--samples", type=int, default=10_000, help="per shard")
    parser.add_argument("--global-batch-size", type=int, default=2048)
    parser.add_argument("--ranks", type=int, default=64)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--steps", type=int, default=20)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        row = index_one(root, args.samples, args.shards)
        config = fake_set(root, row, args.shards)
        load(config, args)


def index_one(root: Path, samples: int, shards: int) -> ManifestRow:
    """Make and index one shard, from disk and from S3."""
    options = SynthesisOptions(
        samples, samples_per_shard=samples, failed_share=0.0, scene=SceneOptions(1, 1, 40, 56)
    )
    list(synthesize(str(root / "bucket" / "one"), options))
    found = list_files(str(root / "bucket" / "one" / "*.tar"))
    started = time.monotonic()
    report = build_index(found, str(root / "index"))
    local_s = time.monotonic() - started
    (row,) = report.rows.values()
    size = (root / "index" / row.index).stat().st_size
    print(
        f"index of one shard   {size / 1e3:.0f} KB ({size / samples:.1f} bytes per sample), {local_s:.1f} s"
    )
    print(f"index of all         {size * shards / 1e9:.1f} GB")
    with LocalS3(root) as server:
        os.environ.update(server.env)
        started = time.monotonic()
        build_index(list_files("s3://bucket/one/*.tar"), str(root / "index-s3"))
        s3_s = time.monotonic() - started
    hours = s3_s * shards / 32 / 3600
    print(f"build from S3        {s3_s:.1f} s for {row.size / MIB:.0f} MiB; all, 32 workers: {hours:.1f} h")
    return row


def fake_set(root: Path, row: ManifestRow, shards: int) -> DataConfig:
    """Links to the one shard, and a manifest that has a row for each."""
    folder = root / "many"
    folder.mkdir()
    rows = {}
    for i in range(shards):
        path = folder / f"{i:06d}.tar"
        path.symlink_to(root / "bucket" / "one" / "00000.tar")
        rows[str(path)] = dataclasses.replace(row, shard=str(path))
    write_manifest(str(root / "index"), rows)
    size = (root / "index" / MANIFEST).stat().st_size
    print(f"manifest of all      {size / MIB:.1f} MiB")
    braces = f"{folder}/{{000000..{shards - 1:06d}}}.tar"
    return DataConfig(shards=braces, index=str(root / "index"), image_size=32, crop="random")


def load(config: DataConfig, args: argparse.Namespace) -> None:
    """Rank 0 of the run: time to open and to the first batch, memory of its processes."""
    config = dataclasses.replace(config, workers=args.workers)
    started = time.monotonic()
    dataset = open_dataset(config)
    print(f"open on rank 0       {time.monotonic() - started:.1f} s, {dataset.counts.sum():,} samples")
    started = time.monotonic()
    with build_loader(
        config,
        seed=1,
        global_batch_size=args.global_batch_size,
        world_size=args.ranks,
        dataset=dataset,
    ) as loader:
        next(loader)
        print(f"first batch          {time.monotonic() - started:.1f} s after the set is open")
        for _ in range(args.steps):
            next(loader)
        found = [child.memory_full_info() for child in psutil.Process().children()]
        unique = ", ".join(f"{memory.uss / MIB:.0f}" for memory in found)
        print(f"memory per worker    {unique} MiB of their own (USS), after {args.steps} steps")


if __name__ == "__main__":
    main()
