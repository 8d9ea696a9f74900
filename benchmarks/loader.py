"""Loader benchmark: ours against webdataset, MosaicML streaming and Megatron Energon; same tars, same cores.

    python benchmarks/loader.py                        # twenty minutes
    python benchmarks/loader.py --samples 64 --seconds 3 --rounds 1

Every arm runs in its own process, the arms take turns, medians are reported. Images per second of wall time
need a quiet machine; images per second of CPU time (all processes of the arm, not the S3 server and the proxy
that adds latency and faults, which run on the same cores) hardly do. An arm "N asked" consumes N images per
second, as a training step would, and shows how many it got. In the arms "a core apart" the last core is left
to the server and the proxy, and the loader has the others: S3 against local disk on equal terms. "Moments
cached": samples that come from a full `first_stage.cache` instead of the shards (`benchmarks/cache.py` has
the steps of training with it). The peers that are no dependencies are found in --peers, a folder filled with

    pip install --no-deps --target DIR mosaicml-streaming megatron-energon multi-storage-client rapidyaml \\
        xattr lark wcmatch bracex deprecation filetype boto3 botocore s3transfer jmespath zstd \\
        brotli python-snappy cramjam catalogue
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from loader_arms import ARMS
from pictures import make_shards

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "integration" / "data")]

from fault_proxy import FaultProxy  # noqa: E402 - found through the line above

from data_pipeline.storage.local_s3 import LocalS3  # noqa: E402

WARM_S = 0.5
WARM_APART_S = 12.0
"""Seconds before counting begins; the second is long enough to fill the read-ahead."""


@dataclass(frozen=True)
class Case:
    """One row of the table."""

    title: str
    arm: str
    url: str
    environment: dict[str, str] = field(default_factory=dict)
    skip: int = 0
    pace: float = 0.0
    """Images per second that are asked for; 0: as many as possible."""
    apart: bool = False
    """The last core is left to S3 server and proxy, the loader gets the others; the read-ahead is full."""


def run_arm(name: str, url: str, seconds: float, skip: int, pace: float, warm: float) -> dict[str, float]:
    """In this process: time from after the imports to the first batch, then images for `seconds`."""
    batches = ARMS[name](url, skip)
    next(batches)  # imports, conversion and the position to resume at are not measured
    began = time.monotonic()
    next(batches)
    first = time.monotonic() - began
    while time.monotonic() - began < first + warm:
        next(batches)
    images, start = 0, time.monotonic()
    cpu = _cpu()
    while time.monotonic() - start < seconds:
        images += next(batches)
        if pace:
            time.sleep(max(0.0, start + images / pace - time.monotonic()))
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


def _cpu() -> float:
    """Processor seconds of the process tree so far."""
    return sum(sum(process.cpu_times()[:2]) for process in _tree())


def _tree_rss() -> float:
    """Proportional memory of the process tree, MB (shared pages counted once)."""
    total = 0.0
    for process in _tree():
        with suppress(psutil.NoSuchProcess):
            total += process.memory_full_info().pss / 1e6
    return total


def _tree() -> list[psutil.Process]:
    this = psutil.Process()
    return [this, *this.children(recursive=True)]


@contextmanager
def cores_apart(servers: list[int]) -> Iterator[None]:
    """Within: new processes have all cores but the last, `servers` and this process's threads that one."""
    cores = sorted(os.sched_getaffinity(0))
    threads = [t.id for pid in (os.getpid(), *servers) for t in psutil.Process(pid).threads()]
    for thread in threads:
        os.sched_setaffinity(thread, cores[-1:])
    os.sched_setaffinity(0, cores[:-1])  # only this thread's, from which processes inherit
    try:
        yield
    finally:
        for thread in threads:
            with suppress(ProcessLookupError):
                os.sched_setaffinity(thread, cores)


def measure(case: Case, seconds: float, peers: str) -> dict[str, float] | None:
    """One case in a fresh process; None if it does not run here."""
    command = [sys.executable, __file__, "--arm", case.arm, "--url", case.url, "--seconds", str(seconds)]
    command += ["--skip", str(case.skip), "--pace", str(case.pace)]
    command += ["--warm", str(WARM_APART_S if case.apart else WARM_S)]
    path = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    if case.arm in ("streaming", "energon"):
        path.insert(0, peers)
    environment = {**os.environ, **case.environment, "PYTHONPATH": os.pathsep.join(filter(None, path))}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    if done.returncode:
        print(f"{case.title}: not run ({done.stderr.strip().splitlines()[-1:]})")
        return None
    return json.loads(done.stdout.strip().splitlines()[-1])


def cases(
    root: Path, samples: int, s3: LocalS3, slow: FaultProxy, faulty: FaultProxy, pace: float
) -> list[Case]:
    """What is compared."""
    local, remote = str(root / "bench" / "*.tar"), "s3://bench/*.tar"
    latency, faults = slow.environment(s3.env), faulty.environment(s3.env)
    return [
        Case("ours, local", "ours", local),
        Case("webdataset, local", "webdataset", local),
        Case("MosaicML streaming (MDS copy), local", "streaming", local),
        Case("Energon, local", "energon", local),
        Case("ours, S3", "ours", remote, s3.env),
        Case("webdataset, S3 (curl, signed URLs)", "webdataset", remote, s3.env),
        Case("ours, S3 150 ms first byte", "ours", remote, latency),
        Case("ours, S3 5 % 503, 5 % short", "ours", remote, faults),
        Case(f"ours, local, {pace:.0f} asked", "ours", local, pace=pace),
        Case(f"ours, S3 150 ms, {pace:.0f} asked", "ours", remote, latency, pace=pace),
        Case(f"ours, S3 faults, {pace:.0f} asked", "ours", remote, faults, pace=pace),
        Case("ours, local, a core apart", "ours", local, apart=True),
        Case("ours, S3, a core apart", "ours", remote, s3.env, apart=True),
        Case("ours, S3 150 ms, a core apart", "ours", remote, latency, apart=True),
        Case("ours, moments cached, local", "cached", local),
        Case("ours, moments cached, S3", "cached", remote, s3.env),
        Case("ours, resume mid-epoch, local", "ours", local, skip=samples // 2),
        Case("ours, resume mid-epoch, S3", "ours", remote, s3.env, skip=samples // 2),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--samples", type=int, default=400)
    parser.add_argument("--edge", type=int, default=1024, help="source pictures, pixels")
    parser.add_argument(
        "--grain", type=float, default=3.0, help="noise of the source pictures: 3 makes JPEGs of about 250 KB"
    )
    parser.add_argument("--seconds", type=float, default=12)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--asked", type=float, default=200.0, help="images per second of the paced cases")
    parser.add_argument("--only", default="", help="cases whose title contains this")
    parser.add_argument("--folder", help="where shards are made or found")
    parser.add_argument("--peers", default="", help="folder of packages, see above")
    parser.add_argument("--arm", help=argparse.SUPPRESS)
    parser.add_argument("--url", help=argparse.SUPPRESS)
    parser.add_argument("--skip", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--pace", type=float, default=0.0, help=argparse.SUPPRESS)
    parser.add_argument("--warm", type=float, default=0.0, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.arm:
        print(json.dumps(run_arm(args.arm, args.url, args.seconds, args.skip, args.pace, args.warm)))
        return
    results: dict[str, list[dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(args.folder or temporary)
        if not (root / "bench").exists():
            make_shards(root / "bench", args.samples, args.edge, args.grain)
        with LocalS3(root) as s3, FaultProxy(s3.port) as slow, FaultProxy(s3.port) as faulty:
            slow.first_byte_s = 0.15
            faulty.faults = {"storm": 0.05, "short": 0.05}
            table = cases(root, args.samples, s3, slow, faulty, args.asked)
            table = [case for case in table if args.only in case.title]
            for _ in range(args.rounds):
                for case in table:
                    with cores_apart([s3.pid]) if case.apart and s3.pid else nullcontext():
                        found = measure(case, args.seconds, args.peers)
                    if found:
                        results.setdefault(case.title, []).append(found)
    report(results)


def report(results: dict[str, list[dict[str, float]]]) -> None:
    """Medians of all rounds."""
    print(f"{os.cpu_count()} cores, load average {os.getloadavg()[0]:.1f}")
    print(f"{'':<38}{'img/s':>9}{'img/CPU-s':>11}{'first s':>9}{'MB':>7}  spread of img/s")
    for title, rounds in results.items():
        median = {k: statistics.median(r[k] for r in rounds) for k in rounds[0]}
        rates = [r["images_s"] for r in rounds]
        print(
            f"{title:<38}{median['images_s']:>9.1f}{median['images_cpu_s']:>11.1f}{median['first_s']:>9.2f}"
            f"{median['rss_mb']:>7.0f}  {min(rates):.1f}..{max(rates):.1f}"
        )


if __name__ == "__main__":
    main()
