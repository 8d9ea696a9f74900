"""The index at the size of LAION: 200,000 shards of 10,000 samples, 2 billion in all.

    python benchmarks/index_scale.py --shards 200000 --samples 10000 --ranks 64 --workers 2

One real shard is made and indexed, from disk and from S3; the others are links to it with manifest rows of
their own. Then one rank of a run opens all of them, and the memory of its loader processes is read.

    python benchmarks/index_scale.py --at-once --shards 200000 --delay-ms 30 --ranks 64 --workers 2

The same set without an index, on a stand-in for S3 that gives the one shard under 200,000 names, each request
after a delay: time, requests and bytes to the first batch of a rank, and after some more.

    python benchmarks/index_scale.py --train --shards 200000 --delay-ms 30

`ldm train` on that set with 1, 2 and 4 ranks and a tiny network: where the time of rank 0 goes up to its
first batch, and what all ranks ask for.

    python benchmarks/index_scale.py --manifest --shards 200000

Rows that do not compress (names, checksums, histograms of their own): time and memory of writing and reading.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import psutil

from data_pipeline.config import DataConfig
from data_pipeline.loader import AnyLoader, Dataset, Part, build_loader
from data_pipeline.shards.build_index import build_index
from data_pipeline.shards.manifest import (
    MANIFEST,
    PARTS,
    ManifestRow,
    append_rows,
    index_name,
    read_manifest,
    write_manifest,
)
from data_pipeline.shards.opening import open_dataset
from data_pipeline.storage.listing import list_files
from data_pipeline.storage.local_s3 import LocalS3
from data_pipeline.tools.scenes.scene import SceneOptions
from data_pipeline.tools.scenes.write_shards import SynthesisOptions, synthesize
from trainer.metrics.timer import START_VARIABLE

ROOT = Path(__file__).resolve().parent.parent
MIB = 2**20
TINY = """
steps: 1
global_batch_size: 256
micro_batch_size: 64
data: {image_size: 32, workers: 1}
first_stage: {name: identity, latent_channels: 3}
unet: {model_channels: 32, channel_multipliers: [1], num_res_blocks: 1, head_dim: 16, attention_factors: []}
distributed: {engine: torch, precision: fp32}
logging: {wandb: disabled, progress_bar: false}
"""
"""Of `train`: what is left of a run when the network takes no time."""


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
    parser.add_argument("--at-once", action="store_true", help="no index; a stand-in for S3")
    parser.add_argument("--delay-ms", type=float, default=30.0, help="of each request of the stand-in")
    parser.add_argument("--train", action="store_true", help="the same by `ldm train`, at 1, 2 and 4 ranks")
    parser.add_argument("--manifest", action="store_true", help="write and read the manifest alone")
    args = parser.parse_args()
    if args.manifest:
        manifest(args.shards)
        return
    if args.at_once or args.train:
        with stand_in(args) as shards:
            (train if args.train else at_once)(args, shards)
        return
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
    with rank_0(config, dataset, args) as loader:
        next(loader)
        print(f"first batch          {time.monotonic() - started:.1f} s after the set is open")
        for _ in range(args.steps):
            next(loader)
        print_memory(args.steps)


def rank_0(config: DataConfig, dataset: Dataset, args: argparse.Namespace) -> AnyLoader:
    """Loader of the first rank of the run."""
    part = Part(ranks=args.ranks)
    return build_loader(config, seed=1, global_batch_size=args.global_batch_size, part=part, dataset=dataset)


def print_memory(steps: int) -> None:
    """Memory that each loader process has for itself."""
    found = [child.memory_full_info() for child in psutil.Process().children()]
    unique = ", ".join(f"{memory.uss / MIB:.0f}" for memory in found)
    print(f"memory per worker    {unique} MiB of their own (USS), after {steps} steps")


class StandIn(BaseHTTPRequestHandler):
    """S3 as far as shards are read: any `bucket/set/*.tar` is the one shard, and everything comes late."""

    protocol_version = "HTTP/1.1"
    body = b""
    delay_s = 0.0
    asked: ClassVar[Counter[str]] = Counter()

    def handle(self) -> None:
        """Until the client ends, which it may do in the middle."""
        with suppress(ConnectionError):
            super().handle()

    def do_HEAD(self) -> None:
        """Size and ETag."""
        self._answer(200, len(self.body), b"")

    def do_GET(self) -> None:
        """A range of the shard; nothing else is there."""
        if not self.path.partition("?")[0].endswith(".tar"):
            error = b"<Error><Code>NoSuchKey</Code></Error>"
            self._answer(404, len(error), error)
            return
        first, _, last = self.headers["Range"].removeprefix("bytes=").partition("-")
        part = self.body[int(first) : int(last) + 1]
        self.asked["bytes"] += len(part)
        self._answer(206, len(part), part, f"bytes {first}-{last}/{len(self.body)}")

    def _answer(self, status: int, size: int, body: bytes, place: str = "") -> None:
        self.asked[self.command] += 1
        time.sleep(self.delay_s)
        self.send_response(status)
        self.send_header("Content-Length", str(size))
        self.send_header("ETag", '"one"')
        self.send_header("Last-Modified", "Sat, 21 Nov 2026 00:00:00 GMT")
        if place:
            self.send_header("Content-Range", place)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *arguments: Any) -> None:
        """Nothing."""


@contextmanager
def stand_in(args: argparse.Namespace) -> Iterator[str]:
    """URL of a set that nobody has indexed; the environment points to where it is."""
    with tempfile.TemporaryDirectory() as temporary:
        options = SynthesisOptions(
            args.samples, samples_per_shard=args.samples, failed_share=0.0, scene=SceneOptions(1, 1, 40, 56)
        )
        list(synthesize(temporary, options))
        StandIn.body = (Path(temporary) / "00000.tar").read_bytes()
    StandIn.delay_s = args.delay_ms / 1000
    with ThreadingHTTPServer(("127.0.0.1", 0), StandIn) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        os.environ |= {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{server.server_address[1]}",
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_REGION": "us-east-1",
        }
        yield f"s3://bucket/set/{{000000..{args.shards - 1:06d}}}.tar"
        server.shutdown()


def at_once(args: argparse.Namespace, shards: str) -> None:
    """Start on shards without an index: rank 0 of the run."""
    config = DataConfig(shards=shards, image_size=32, workers=args.workers)
    started, computing = time.monotonic(), time.process_time()
    dataset = open_dataset(config, at_once=True)
    computing = time.process_time() - computing
    took = time.monotonic() - started
    print(f"open on rank 0       {took:.1f} s, {computing:.1f} s of a processor, {_asked()}")
    opened = time.monotonic()
    with rank_0(config, dataset, args) as loader:
        size = len(next(loader).keys)
        print(f"first batch          {time.monotonic() - opened:.1f} s later ({size} samples), {_asked()}")
        for _ in range(args.steps):
            position = next(loader).position
        print(f"{args.steps} steps later       {_asked()}")
        print(f"position             {len(json.dumps(position)) / (size or 1):.0f} bytes per sample")
        print_memory(args.steps)


def train(args: argparse.Namespace, shards: str) -> None:
    """A first start, doctor included, and one that goes without it, as restarts do."""
    for ranks, doctor in ((1, True), (1, False), (2, True), (2, False), (4, True), (4, False)):
        StandIn.asked.clear()
        parts = start(shards, ranks, doctor)
        before = dict(itertools.takewhile(lambda part: part[0] != "first step", parts.items()))
        told = ", ".join(f"{part} {seconds:.1f}" for part, seconds in before.items())
        how = f"{ranks} ranks, {'with' if doctor else 'no'} doctor"
        print(f"{how}   first batch after {sum(before.values()):.1f} s: {told}", flush=True)
        print(f"{'':{len(how)}}   in all {_asked()}", flush=True)


def start(shards: str, ranks: int, doctor: bool, *settings: str, tree: Path = ROOT) -> dict[str, float]:
    """Run one step of `ldm train` of a checkout: seconds of each part of its start, in their order."""
    with tempfile.TemporaryDirectory() as folder:
        config, report = Path(folder) / "config.yaml", Path(folder) / "start.json"
        config.write_text(TINY)
        given = [
            f"run_dir={folder}/run",
            f"data.shards={shards}",
            f"distributed.ranks={ranks}",
            f"distributed.doctor={str(doctor).lower()}",
            *settings,
        ]
        ended = subprocess.run(
            [sys.executable, "-m", "trainer", "train", str(config), *given],
            cwd=tree,
            env={**os.environ, "PYTHONPATH": str(tree), START_VARIABLE: str(report)},
            capture_output=True,
            text=True,
        )
        if ended.returncode:
            raise SystemExit(ended.stderr)
        parts: dict[str, float] = json.loads(report.read_text())["parts"]
        return parts


def _asked() -> str:
    asked = StandIn.asked
    return f"{asked['HEAD']} HEAD, {asked['GET']} GET, {asked['bytes'] / MIB:.1f} MiB so far"


def manifest(shards: int) -> None:
    """Time, size and memory of a manifest whose rows are all different."""
    draw = random.Random(0)
    shard = "s3://laion-aesthetic/data/{:06d}.tar".format
    rows = {
        shard(i): ManifestRow(
            shard=shard(i),
            size=draw.randrange(10**8, 10**9),
            version=f"{draw.getrandbits(128):032x}",
            samples=draw.randrange(9000, 10_000),
            bytes=draw.randrange(10**8, 10**9),
            index=index_name(shard(i)),
            checksum=f"{draw.getrandbits(256):064x}",
            aspects={str(k): draw.randrange(1, 2000) for k in range(-20, 21)},
            columns={"punsafe": "number", "width": "number", "status": "text"},
            members=("jpg", "json", "txt"),
        )
        for i in range(shards)
    }
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with tempfile.TemporaryDirectory() as folder:
        started = time.process_time()
        write_manifest(folder, rows)
        size = (Path(folder) / MANIFEST).stat().st_size
        added = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
        print(
            f"manifest             {size / MIB:.1f} MiB, {time.process_time() - started:.1f} s of a processor"
        )
        print(f"memory to write it   {added:.0f} MiB above {before / 1024:.0f} MiB of the rows themselves")
        started = time.process_time()
        append_rows(folder, list(rows.values())[:200])
        (part,) = (Path(folder) / PARTS).iterdir()
        print(
            f"a part of 200 rows   {part.stat().st_size / 1024:.0f} KiB, "
            f"{time.process_time() - started:.3f} s of a processor"
        )
        started = time.process_time()
        read_manifest(folder)
        print(f"reading all          {time.process_time() - started:.1f} s of a processor")


if __name__ == "__main__":
    main()
