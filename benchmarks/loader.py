"""Loader benchmark: ours against webdataset's stock pipeline and MosaicML streaming, same tars, same cores.

python benchmarks/loader.py --samples 400 --seconds 20 --rounds 3

Every arm runs in its own process, the arms take turns (ABAB), medians are reported. Images per second of
wall time need a quiet machine; images per second of CPU time (all processes of the arm) hardly do.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import random
import statistics
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

EDGE = 256
BATCH = 16
WORKERS = 2


def make_shards(folder: Path, samples: int, edge: int, grain: float, per_shard: int = 100) -> None:
    """Tars of JPEGs of quality 92: smooth structure plus grain, which decides about the bytes per pixel."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    for shard in range(-(-samples // per_shard)):
        with tarfile.open(folder / f"{shard:05d}.tar", "w") as tar:
            for i in range(min(per_shard, samples - shard * per_shard)):
                height, width = rng.integers(edge * 3 // 4, edge * 5 // 4, 2)
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


def ours(url: str, skip: int = 0) -> Iterator[int]:
    """This project's loader."""
    from data_pipeline.config import DataConfig
    from data_pipeline.loader import build_loader

    config = DataConfig(shards=url, image_size=EDGE, crop="random", horizontal_flip=True, workers=WORKERS)
    position = None
    if skip:
        with build_loader(config, seed=1, global_batch_size=BATCH) as loader:
            whole = next(loader).position
        position = {**whole, "states": [[0, skip // whole["lanes"]]] * whole["lanes"]}
    yield 0
    with build_loader(config, seed=1, global_batch_size=BATCH, position=position) as loader:
        for batch in loader:
            yield len(batch)


def torchvision_transform() -> Any:
    """What tutorials use on Pillow images."""
    import torchvision.transforms.v2 as T

    return T.Compose(
        [T.Resize(EDGE, antialias=True), T.RandomCrop(EDGE), T.RandomHorizontalFlip(), T.PILToTensor()]
    )


def webdataset(url: str, skip: int = 0) -> Iterator[int]:
    """Stock: resampled shards, decode "pil", torchvision resize and crop, WebLoader."""
    import torch
    import webdataset as wds

    del skip
    transform = torchvision_transform()
    urls = sorted(str(p) for p in Path(url).parent.glob("*.tar"))
    dataset = (
        wds.WebDataset(urls, resampled=True, nodesplitter=wds.split_by_node)
        .shuffle(1000)
        .decode("pil")
        .to_tuple("jpg", "txt")
        .map_tuple(transform, lambda text: text)
        .batched(BATCH)
    )
    yield 0
    loader = wds.WebLoader(dataset, batch_size=None, num_workers=WORKERS)
    for pixels, _ in loader:
        yield len(pixels) if isinstance(pixels, (list, torch.Tensor)) else 0


def streaming(url: str, skip: int = 0) -> Iterator[int]:
    """MosaicML streaming on a converted copy (MDS, no compression), Pillow decode, torchvision transforms."""
    from streaming import StreamingDataLoader, StreamingDataset

    del skip
    transform = torchvision_transform()

    class Pictures(StreamingDataset):
        def __getitem__(self, at: int) -> Any:
            sample = super().__getitem__(at)
            return transform(sample["jpg"].convert("RGB")), sample["txt"]

    convert(Path(url).parent)
    yield 0
    while True:
        dataset = Pictures(local=convert(Path(url).parent), shuffle=True, batch_size=BATCH)
        for pixels, _ in StreamingDataLoader(dataset, batch_size=BATCH, num_workers=WORKERS, drop_last=True):
            yield len(pixels)


def convert(folder: Path) -> str:
    """MDS copy of the tars beside them, made once."""
    from streaming import MDSWriter

    out = folder.parent / "mds"
    if not out.exists():
        with MDSWriter(out=str(out), columns={"jpg": "jpeg", "txt": "str"}) as writer:
            for path in sorted(folder.glob("*.tar")):
                with tarfile.open(path) as tar:
                    for member in tar.getmembers():
                        if member.name.endswith(".jpg"):
                            data = tar.extractfile(member)
                            assert data is not None
                            writer.write(
                                {"jpg": Image.open(io.BytesIO(data.read())), "txt": "a benchmark picture"}
                            )
    return str(out)


ARMS = {"ours": ours, "webdataset": webdataset, "streaming": streaming}


def run_arm(name: str, url: str, seconds: float, skip: int) -> dict[str, float]:
    """In this process: time from after the imports to the first batch, then images for `seconds`."""
    batches = ARMS[name](url, skip)
    next(batches)  # imports, conversion and the position to resume at are not measured
    began = time.monotonic()
    next(batches)
    first = time.monotonic() - began
    for _ in range(3):
        next(batches)
    images, start = 0, time.monotonic()
    cpu = _cpu()
    while time.monotonic() - start < seconds:
        images += next(batches)
    wall = time.monotonic() - start
    used = _cpu() - cpu
    rss = _tree_rss()
    batches.close()  # type: ignore[attr-defined]
    return {
        "first_s": first,
        "images_s": images / wall,
        "images_cpu_s": images / max(used, 1e-3),
        "rss_mb": rss,
    }


def _tree() -> list[int]:
    found, todo = [], [os.getpid()]
    while todo:
        pid = todo.pop()
        found.append(pid)
        for task in Path(f"/proc/{pid}/task").glob("*/children"):
            todo += [int(child) for child in task.read_text().split()]
    return found


def _cpu() -> float:
    total = 0.0
    for pid in _tree():
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        total += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return total


def _tree_rss() -> float:
    """Proportional memory of the process tree, MB (shared pages counted once)."""
    total = 0
    for pid in _tree():
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                total += int(line.split()[1])
    return total / 1000


def decode_arms(folder: Path) -> None:
    """One thread, bytes in memory: decode, resize, crop. Ours, stock and bare Pillow; SSIM against Pillow."""
    from data_pipeline.transforms import crop_pixels, decode, plan_crop

    with tarfile.open(next(iter(sorted(folder.glob("*.tar"))))) as tar:
        pictures = [tar.extractfile(m).read() for m in tar.getmembers() if m.name.endswith(".jpg")][:60]  # type: ignore[union-attr]

    def quick(data: bytes) -> np.ndarray:
        pixels, height, width = decode(data, target=(EDGE, EDGE), max_pixels=10**8)
        crop = plan_crop(height, width, (EDGE, EDGE), random_crop=False, may_flip=False, seed=0, ordinal=0)
        out = np.empty((EDGE, EDGE, 3), np.uint8)
        crop_pixels(pixels, crop, out)
        return out

    def pillow(data: bytes) -> np.ndarray:
        image = Image.open(io.BytesIO(data)).convert("RGB")
        edge = min(image.size)
        left, top = (image.width - edge) / 2, (image.height - edge) / 2
        box = (left, top, left + edge, top + edge)
        return np.asarray(image.resize((EDGE, EDGE), Image.Resampling.BICUBIC, box=box))

    transform = torchvision_transform()

    def stock(data: bytes) -> Any:
        return transform(Image.open(io.BytesIO(data)).convert("RGB"))

    arms = {"ours": quick, "stock": stock, "pillow": pillow}
    rates: dict[str, list[float]] = {name: [] for name in arms}
    for _ in range(3):
        for name, function in arms.items():
            start = time.process_time()
            for data in pictures:
                function(data)
            rates[name].append(len(pictures) / (time.process_time() - start))
    quality = statistics.mean(ssim(quick(d), pillow(d)) for d in pictures[:20])
    median = {name: statistics.median(found) for name, found in rates.items()}
    mean_kb = statistics.mean(len(d) for d in pictures) / 1000
    print(
        f"decode+resize+crop of {mean_kb:.0f} KB JPEGs, images per CPU second of one thread: "
        + ", ".join(f"{name} {rate:.0f}" for name, rate in median.items())
        + f"; ours / stock {median['ours'] / median['stock']:.2f}, ours / Pillow "
        f"{median['ours'] / median['pillow']:.2f}, SSIM {quality:.4f}"
    )


def ssim(a: np.ndarray, b: np.ndarray) -> float:
    """Mean SSIM of luma over 8x8 windows (Wang et al. 2004, uniform window)."""
    weights = np.array([0.299, 0.587, 0.114])
    x, y = (v.astype(np.float64) @ weights for v in (a, b))
    x, y = (np.lib.stride_tricks.sliding_window_view(v, (8, 8))[::4, ::4].reshape(-1, 64) for v in (x, y))
    mx, my = x.mean(1), y.mean(1)
    cov = ((x - mx[:, None]) * (y - my[:, None])).mean(1)
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    return float(
        ((2 * mx * my + c1) * (2 * cov + c2) / ((mx**2 + my**2 + c1) * (x.var(1) + y.var(1) + c2))).mean()
    )


class BadProxy(ThreadingHTTPServer):
    """Adds a first-byte latency, and refuses or cuts short a share of the reads, in front of an S3 server."""

    daemon_threads = True

    def __init__(self, upstream: int, *, first_byte_s: float = 0.0, fault_share: float = 0.0) -> None:
        super().__init__(("127.0.0.1", 0), _Forward)
        self.upstream, self.first_byte_s, self.fault_share = upstream, first_byte_s, fault_share
        self.rng = random.Random(7)
        threading.Thread(target=self.serve_forever, daemon=True).start()


class _Forward(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: BadProxy

    def log_message(self, *args: object) -> None:
        pass

    def _forward(self) -> None:
        import http.client

        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        upstream = http.client.HTTPConnection("127.0.0.1", self.server.upstream, timeout=60)
        upstream.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
        for name, value in self.headers.items():
            upstream.putheader(name, value)
        upstream.endheaders(body or None)
        answer = upstream.getresponse()
        data = answer.read()
        upstream.close()
        time.sleep(self.server.first_byte_s)
        spoilt = self.command == "GET" and ".tar" in self.path and self.server.rng.random()
        refused = spoilt and spoilt < self.server.fault_share / 2
        short = spoilt and not refused and spoilt < self.server.fault_share
        if refused:
            data = b"<Error><Code>SlowDown</Code></Error>"
        self.send_response(503 if refused else answer.status)
        for name, value in answer.getheaders():
            if name.lower() not in ("connection", "transfer-encoding", "content-length"):
                self.send_header(name, value)
        length = answer.getheader("Content-Length", "0") if self.command == "HEAD" else str(len(data))
        self.send_header("Content-Length", length)
        self.end_headers()
        self.wfile.write(data[: len(data) // 2] if short else data)
        self.close_connection = bool(short)

    do_GET = do_PUT = do_HEAD = do_POST = _forward


def behind(s3: Any, proxy: BadProxy) -> dict[str, str]:
    """Environment that reaches the server through the proxy."""
    return {**s3.env, "AWS_ENDPOINT_URL": f"http://127.0.0.1:{proxy.server_address[1]}"}


def measure(
    name: str, url: str, args: argparse.Namespace, env: dict[str, str], skip: int = 0
) -> dict[str, float] | None:
    """One arm in a fresh process."""
    command = [
        sys.executable,
        __file__,
        "--arm",
        name,
        "--url",
        url,
        "--seconds",
        str(args.seconds),
        "--skip",
        str(skip),
    ]
    done = subprocess.run(command, env={**os.environ, **env}, capture_output=True, text=True, timeout=900)
    if done.returncode:
        print(f"{name}: not run ({done.stderr.strip().splitlines()[-1:]})")
        return None
    return json.loads(done.stdout.strip().splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--samples", type=int, default=400)
    parser.add_argument("--edge", type=int, default=1024, help="source pictures, pixels")
    parser.add_argument(
        "--grain", type=float, default=3.0, help="noise of the source pictures: 3 makes JPEGs of about 250 KB"
    )
    parser.add_argument("--seconds", type=float, default=15)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", help="where shards are made or found")
    parser.add_argument("--arm")
    parser.add_argument("--url")
    parser.add_argument("--skip", type=int, default=0)
    args = parser.parse_args()
    if args.arm:
        print(json.dumps(run_arm(args.arm, args.url, args.seconds, args.skip)))
        return
    from data_pipeline.local_s3 import LocalS3

    with tempfile.TemporaryDirectory() as temporary:
        root = Path(args.folder or temporary)
        if not (root / "bench").exists():
            make_shards(root / "bench", args.samples, args.edge, args.grain)
        local = str(root / "bench" / "*.tar")
        decode_arms(root / "bench")
        results: dict[str, list[dict[str, float]]] = {}
        with LocalS3(root) as s3:
            slow = behind(s3, BadProxy(s3.port, first_byte_s=0.15))
            faulty = behind(s3, BadProxy(s3.port, fault_share=0.1))
            cases: list[tuple[str, str, str, dict[str, str], int]] = [
                ("ours, local", "ours", local, {}, 0),
                ("webdataset, local", "webdataset", local, {}, 0),
                ("streaming (MDS copy), local", "streaming", local, {}, 0),
                ("ours, S3", "ours", "s3://bench/*.tar", s3.env, 0),
                ("ours, S3 150 ms first byte", "ours", "s3://bench/*.tar", slow, 0),
                ("ours, S3 5 % 503, 5 % short", "ours", "s3://bench/*.tar", faulty, 0),
                ("ours, resume mid-epoch, local", "ours", local, {}, args.samples // 2),
            ]
            for _ in range(args.rounds):
                for title, name, url, env, skip in cases:
                    found = measure(name, url, args, env, skip)
                    if found:
                        results.setdefault(title, []).append(found)
        report(results)


def report(results: dict[str, list[dict[str, float]]]) -> None:
    """Medians of all rounds."""
    print(f"{os.cpu_count()} cores, load average {os.getloadavg()[0]:.1f}")
    print(f"{'':<32}{'img/s':>9}{'img/CPU-s':>11}{'first s':>9}{'MB':>7}  spread of img/s")
    for title, rounds in results.items():
        median = {k: statistics.median(r[k] for r in rounds) for k in rounds[0]}
        rates = [r["images_s"] for r in rounds]
        print(
            f"{title:<32}{median['images_s']:>9.1f}{median['images_cpu_s']:>11.1f}{median['first_s']:>9.2f}"
            f"{median['rss_mb']:>7.0f}  {min(rates):.1f}..{max(rates):.1f}"
        )


if __name__ == "__main__":
    main()
