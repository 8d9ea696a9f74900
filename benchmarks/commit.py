"""How long a checkpoint of hundreds of ranks takes to count, once the last rank's shard is there.

    python benchmarks/commit.py                                   # SD2 on 8, 64, 512 ranks, S3 20 ms away
    python benchmarks/commit.py --ranks 512 --zero 3 --delay-ms 50 --repeats 5

Rank 0's writer runs for real (`trainer.checkpoint.writer.write_commit`, as the process beside training calls
it), against a real S3 server behind a proxy that waits before it answers. Other ranks are simulated: of their
shards there are the names, all that a commit reads of them, and their tables are those of SD2's UNet, cut as
ZeRO-1 does it in bf16 (each bucket) or ZeRO-3 (each parameter). The last one comes while the writer waits.
"""

from __future__ import annotations

import argparse
import itertools
import math
import os
import statistics
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Sequence

import torch
from scale import Storage

from data_pipeline.storage.large import checksum_bytes, write_whole
from data_pipeline.storage.local_s3 import LocalS3
from data_pipeline.storage.urls import join
from trainer.checkpoint.catalogue import Retention
from trainer.checkpoint.layout import ShardPlan, Span, Table
from trainer.checkpoint.manifest import Manifest, StoredFile, tables_text
from trainer.checkpoint.retirement import Retirement
from trainer.checkpoint.writer import Commit, Job, shard_name, write_commit, write_shard
from trainer.config.io import load_config
from trainer.distributed.scatter import in_buckets
from trainer.model import build_trainable

CONFIG = "configs/sd/sd2_base_512.yaml"
KINDS: tuple[str, ...] = ("master", "exp_avg", "exp_avg_sq", "ema.decay")
LATE_S = 3.0
"""When the last shard comes: the writer looks most rarely by then."""


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", default="8,64,512")
    parser.add_argument("--zero", default="1,3", help="stages whose layout is used")
    parser.add_argument("--delay-ms", type=float, default=20.0, help="what storage waits before it answers")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    config = load_config(CONFIG)
    with torch.device("meta"):
        network, _ = build_trainable(config)
    trained = {name: p for name, p in network.named_parameters() if p.requires_grad}
    shapes = {name: tuple(p.shape) for name, p in trained.items()}
    names = {id(p): name for name, p in trained.items()}
    buckets = [
        [names[id(p)] for p in bucket]
        for bucket in in_buckets(trained.values(), config.distributed.reduce_bucket_elements)
    ]
    print("ZeRO  ranks  spans     manifest MB  last shard to manifest, s             requests of one commit")
    for zero, ranks in itertools.product(*([int(n) for n in t.split(",")] for t in (args.zero, args.ranks))):
        tables = cut(shapes, buckets, ranks, zero)
        with tempfile.TemporaryDirectory() as folder:
            seconds, size, requests = commits(
                tables, shapes, folder, delay_s=args.delay_ms / 1e3, repeats=args.repeats
            )
        values = f"{statistics.median(seconds):.2f} ({min(seconds):.2f} - {max(seconds):.2f})"
        counted = ", ".join(f"{kind} {count / args.repeats:g}" for kind, count in sorted(requests.items()))
        print(f"{zero:4} {ranks:6} {sum(map(len, tables)):6} {size / 1e6:15.2f}  {values:36} {counted}")


def cut(
    shapes: dict[str, tuple[int, ...]], buckets: Sequence[Sequence[str]], ranks: int, zero: int
) -> list[Table]:
    """The spans of each rank: stage 1 in bf16 cuts each bucket over all ranks, stage 3 each parameter."""
    tables: list[list[Span]] = [[] for _ in range(ranks)]
    for bucket in buckets if zero == 1 else [[name] for name in shapes]:
        sizes = [math.prod(shapes[name]) for name in bucket]
        part, begin = math.ceil(sum(sizes) / ranks), 0
        for name, size in zip(bucket, sizes, strict=True):
            for rank in range(begin // part, (begin + size - 1) // part + 1):
                first, last = max(begin, rank * part), min(begin + size, (rank + 1) * part)
                tables[rank].append(Span(name, first - begin, last - first))
            begin += size
    return [tuple(table) for table in tables]


def commits(
    tables: list[Table], shapes: dict[str, tuple[int, ...]], folder: str, *, delay_s: float, repeats: int
) -> tuple[list[float], int, Counter[str]]:
    """(seconds of each commit after its last shard, bytes of a manifest, requests of all commits)."""
    with LocalS3(folder, buckets=("runs",)) as server, Storage(server.port, delay_s) as storage:
        os.environ.update(storage.environment(server.env))
        retirement, retention = Retirement(), Retention(keep_last=2, keep_every=0, keep_best=0)
        kinds = {"unet": KINDS}
        own = ShardPlan({"unet": ()}, kinds)
        everywhere = b"[%s]" % b",".join(tables_text({"unet": table}) for table in tables)
        sizes = tuple(ShardPlan({"unet": table}, kinds).file_bytes for table in tables)
        seconds: list[float] = []
        requests: Counter[str] = Counter()
        for step in range(1, repeats + 1):
            unknown = StoredFile("", 0, "")
            manifest = Manifest(step, (), unknown, unknown, (), kinds, {"unet": shapes}, loss=None)
            commit = Commit(manifest, everywhere, sizes, b"{}", b"", retention, patience_s=600.0)
            job = Job("s3://runs/run/checkpoints", step, "00010001", 0, own, commit)
            mine = write_shard(job, memoryview(b""))
            names = [shard_name(rank, job.attempt, checksum_bytes(b"")) for rank in range(1, len(tables))]
            for name in names[:-1]:  # beside the proxy: they have been there for long
                (server.folder / "runs/run/checkpoints" / f"step_{step:09d}" / name).touch()
            before = Counter(storage.requests)
            last = threading.Timer(LATE_S, write_whole, (join(job.url, names[-1]), b""))
            last.start()
            write_commit(job, mine, retirement)
            last.join()
            retirement.close()
            requests += Counter(
                {kind.partition(": ")[2]: n for kind, n in (storage.requests - before).items()}
            )
            seconds.append(storage.committed[next(p for p in storage.committed if f"step_{step:09d}" in p)])
        size = (server.folder / "runs/run/checkpoints" / f"step_{repeats:09d}/manifest.json").stat().st_size
    return seconds, size, requests


if __name__ == "__main__":
    started = time.monotonic()
    main()
    print(f"{time.monotonic() - started:.0f} s; load {os.getloadavg()[0]:.1f}")
