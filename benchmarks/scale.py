"""What a run asks of the network and of storage as its ranks grow: counted, since two cores cannot time it.

    python benchmarks/scale.py                              # 2, 4, 8, 16, 32 ranks
    python benchmarks/scale.py --ranks 8,32,128 --delay-ms 20 --out scale.json
    python benchmarks/scale.py --ranks 2,4 distributed.reduce_precision=bf16 micro_batch_size=1

The real `trainer.train.run` with DeepSpeed, gloo and S3, on a tiny network, in ranks that are forked from
this process, which has imported what ranks import: each takes some 100 MB of its own, and 30 for its
writer, so that 128 want 17 GB. Each run trains, saves three times
and is resumed. Counted are calls of torch.distributed, from inside the ranks, and requests, by a proxy in
front of a real S3 server that waits `--delay-ms` before it answers. The last column is the exponent of N that
a row grows with, from its last two sizes: 0 constant, 1 proportional to the number of ranks.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib
import json
import math
import os
import resource
import socket
import sys
import tempfile
import time
import traceback
from collections import Counter
from multiprocessing.sharedctypes import Value
from pathlib import Path
from typing import Any

import psutil
import torch
from collective_calls import IDEAL_BYTES, count_calls, messages

from data_pipeline.storage.local_s3 import LocalS3
from data_pipeline.tools.scenes.scene import SceneOptions
from data_pipeline.tools.scenes.write_shards import SynthesisOptions, synthesize
from trainer import train
from trainer.checkpoint.manager import CheckpointManager
from trainer.config.io import load_config
from trainer.distributed.env import DistributedEnv
from trainer.first_stage.build import build_first_stage, first_stage_tensors
from trainer.metrics.sinks import Sinks
from trainer.model import build_model, count_parameters
from trainer.weights import write_weights

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests" / "integration" / "data"))

from fault_proxy import FaultProxy  # noqa: E402 - found through the line above

SAVE_EVERY, LOG_EVERY = 6, 4
STEPS = 12
SAVES = 3
"""At the first step, after half of them, at the end."""
PLAIN_STEP = 10
"""Neither logs nor saves; the one before settles what was saved long before."""
SAMPLES_PER_RANK = 2
PHASES = ("start", "saves", "resume")
CLOCKED = "by the clock"
"""Rank 0's looks at the lease and for files that ask something of a run: as many as it lasts long."""
NETWORKS = (
    "first_stage={name: kl, base_channels: 8, channel_multipliers: [1], num_res_blocks: 1, num_groups: 4}",
    "unet={model_channels: 8, channel_multipliers: [1, 2], num_res_blocks: 1, attention_factors: []}",
    "unet={num_groups: 4, head_dim: 8}",
    "first_stage.latent_scale=1",
)


class Storage(FaultProxy):
    """A real S3 server behind a delay, whose requests are counted by phase and kind."""

    def __init__(self, upstream: int, delay_s: float) -> None:
        super().__init__(upstream)
        self.delay_s = delay_s
        self.phase: Any = Value("i", PHASES.index("start"))
        """Of PHASES; ranks are forked and share it."""
        self.requests: Counter[str] = Counter()
        self.weights_bytes: Counter[str] = Counter()
        """Of the files that a run begins with, by phase."""
        self.written: set[str] = set()
        """Shards and manifests; what a client writes once more had no answer in time."""
        self.committed: dict[str, float] = {}
        """Seconds from the last shard of a checkpoint to its manifest, by key of the manifest."""
        self.last_shard_s = 0.0

    def passed_on(self, method: str, path: str, num_bytes: int) -> None:
        """One request, and the bytes of its answer."""
        kind, phase = _kind(method, path), PHASES[self.phase.value]
        with self.lock:
            if kind == "GET weights":
                self.weights_bytes[phase] += num_bytes
            again = " again" if method == "PUT" and path in self.written else ""
            self.requests[f"{phase}: {kind}{again}"] += 1
            if kind in ("PUT shard", "PUT manifest"):
                self.written.add(path)
            if kind == "PUT shard":
                self.last_shard_s = time.monotonic()
            if kind == "PUT manifest":
                self.committed[path] = time.monotonic() - self.last_shard_s


def _kind(command: str, path: str) -> str:
    key = path.partition("?")[0].rsplit("/", 1)[-1]
    listing = command == "GET" and ("list-type" in path or "prefix=" in path)
    asked = path if listing else key
    if any(name in asked for name in ("STOP", "PROFILE", "lease.json")):
        return CLOCKED
    kinds = {
        "manifest": "manifest.json",
        "shard": "rank_",
        "state": "state.",
        "journal": "healing",
    }
    if "/weights/" in path:
        return f"{command} weights"
    known = next((kind for kind, begin in kinds.items() if key.startswith(begin)), None)
    if known == "shard" and key.endswith(".receipt"):
        known = "receipt"
    return f"{'LIST' if listing else command} {known or ('' if listing else 'other')}".strip()


def rank_main(rank: int, ranks: int, port: int, overrides: list[str], out: Path, storage: Storage) -> None:
    """One rank: train, and leave the calls of each step in `out`."""
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(ranks),
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="1",
    )  # fmt: skip
    torch.set_num_threads(1)
    calls: Counter[str] = Counter()
    steps: dict[int, dict[str, int]] = {}
    count_calls(calls)
    advance, save = Sinks.advance, CheckpointManager.save

    def counted_advance(self: Sinks, step: int) -> None:
        steps[step] = dict(calls)
        advance(self, step)

    def told_save(self: CheckpointManager, *args: Any, **kwargs: Any) -> None:
        if rank == 0:
            storage.phase.value = PHASES.index("saves")
        save(self, *args, **kwargs)

    Sinks.advance = counted_advance  # type: ignore[method-assign]
    CheckpointManager.save = told_save  # type: ignore[method-assign]
    config = load_config(None, overrides)
    env = DistributedEnv.detect()
    code = train.run(config, env)
    # Without those to storage: how many are open at this moment is the client's pool's choice.
    me, port = psutil.Process(), storage.server_address[1]
    files = me.num_fds() - sum(c.raddr.port == port for c in me.net_connections("tcp") if c.raddr)
    maximum = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    result = {
        "code": int(code),
        "steps": steps,
        "descriptors": files,
        "peak_mib": maximum,
        "modules": [*sys.modules],
    }
    (out / f"{rank}.json").write_text(json.dumps(result))


def launch(ranks: int, overrides: list[str], folder: Path, storage: Storage) -> list[dict[str, Any]]:
    """All ranks of one run; what each of them counted."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    folder.mkdir(parents=True)
    gc.collect()
    gc.freeze()  # a collection in a rank would write to the pages that all of them share
    children = []
    for rank in range(ranks):
        child = os.fork()
        if child == 0:
            status = 1
            try:
                with (folder / f"{rank}.log").open("w") as log:
                    os.dup2(log.fileno(), 1)
                    os.dup2(log.fileno(), 2)
                    rank_main(rank, ranks, port, overrides, folder, storage)
                status = 0
            except BaseException:  # noqa: BLE001 - a forked rank must not go on as this process
                traceback.print_exc()
            os._exit(status)
        children.append(child)
    ends = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    failed = [rank for rank, end in enumerate(ends) if end]
    if failed:
        raise SystemExit(
            f"rank {failed[0]} of {ranks} ({ends}):\n{(folder / f'{failed[0]}.log').read_text()[-3000:]}"
        )
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(ranks)]


def import_as_ranks_do(shards: str, work: Path, overrides: list[str]) -> None:
    """Import here what two ranks of a run import, so that later ranks share it instead of each its own."""
    with LocalS3(work / "s3", buckets=("runs", "weights")) as server, Storage(server.port, 0.0) as storage:
        write_networks(work / "s3/weights")
        os.environ.update(storage.environment(server.env))
        told = launch(2, settings(2, shards, 1, overrides), work / "first", storage)
    for name in told[1]["modules"]:
        with contextlib.suppress(Exception):  # what was made while it ran, and is no file
            importlib.import_module(name)


def measure(ranks: int, delay_s: float, shards: str, work: Path, overrides: list[str]) -> dict[str, float]:
    """Every row of the table at one number of ranks."""
    folder = work / f"{ranks}"
    with (
        LocalS3(folder / "s3", buckets=("runs", "weights")) as server,
        Storage(server.port, delay_s) as storage,
    ):
        write_networks(folder / "s3/weights")
        os.environ.update(storage.environment(server.env))
        begun = time.monotonic()
        told = launch(ranks, settings(ranks, shards, STEPS, overrides), folder / "first", storage)
        seconds = time.monotonic() - begun
        requests, committed = Counter(storage.requests), [*storage.committed.values()]
        storage.phase.value = PHASES.index("resume")
        launch(ranks, settings(ranks, shards, STEPS + 1, overrides), folder / "second", storage)
        all_seconds = time.monotonic() - begun
    for method, path, status in storage.failures:
        print(f"not counted: the server answered {method} {path} with {status}", file=sys.stderr)
    resumed = {name: n for name, n in storage.requests.items() if name.startswith("resume")}
    each = {name: n / (SAVES if name.startswith("saves") else 1) for name, n in requests.items()} | resumed
    clocked = sum(n for name, n in storage.requests.items() if name.endswith(CLOCKED))
    each = {name: n for name, n in each.items() if not name.endswith(CLOCKED)}
    plain = per_step(told, PLAIN_STEP)
    moved = plain.pop("bytes")
    parameters = count_parameters(load_config(None, settings(ranks, shards, STEPS, overrides)))
    ideal = IDEAL_BYTES * parameters["trained"]["total"] * (ranks - 1) / ranks
    manifest = (folder / f"s3/runs/run/checkpoints/step_{STEPS:09d}/manifest.json").stat().st_size
    return {
        **{f"calls a step: {name}": n for name, n in plain.items()},
        "bytes a step over the ideal": moved / ideal,
        "messages a step, most of a rank": messages(plain, ranks),
        "messages more where it logs": messages(per_step(told, 2 * LOG_EVERY + 1), ranks)
        - messages(plain, ranks),
        "file descriptors of a rank": max(t["descriptors"] for t in told[1:]),
        "file descriptors of rank 0, which keeps the store": told[0]["descriptors"],
        "peak memory of a rank, MiB": max(t["peak_mib"] for t in told),
        **{f"requests {name}": count for name, count in sorted(each.items())},
        f"requests {CLOCKED}, in ten seconds": 10 * clocked / all_seconds,
        "bytes of weights at the start": storage.weights_bytes["start"],
        "bytes of weights at the resume": storage.weights_bytes["resume"],
        "seconds from the last shard to the manifest": max(committed),
        "bytes of the manifest": manifest,
        "seconds of the first run": seconds,
    }


def per_step(told: list[dict[str, Any]], step: int) -> dict[str, int]:
    """Calls between the ends of two steps, the most of any rank."""
    names = {name for t in told for name in t["steps"][str(step)]}
    difference = {
        name: max(t["steps"][str(step)].get(name, 0) - t["steps"][str(step - 1)].get(name, 0) for t in told)
        for name in sorted(names)
    }
    return {name: count for name, count in difference.items() if count}


def write_networks(folder: Path) -> None:
    """What a run begins with: a first stage, and a network to start from."""
    torch.set_num_threads(1)  # a pool of threads would not survive the fork
    torch.manual_seed(0)
    stage = f"first_stage.weights={folder}/stage.safetensors"
    config = load_config(None, [*NETWORKS, stage])
    write_weights(f"{folder}/stage.safetensors", *first_stage_tensors(build_first_stage(config.first_stage)))
    write_weights(f"{folder}/start.safetensors", build_model(config).network.state_dict(), {})


def settings(ranks: int, shards: str, steps: int, overrides: list[str]) -> list[str]:
    """Overrides of one run, those of the command line last."""
    return [
        *("run_dir=s3://runs/run", f"steps={steps}", f"global_batch_size={SAMPLES_PER_RANK * ranks}"),
        *(f"micro_batch_size={SAMPLES_PER_RANK}", f"data.shards={shards}", "data.image_size=16"),
        *("data.workers=0", "data.shuffle_window=1"),
        *NETWORKS,
        *("first_stage.weights=s3://weights/stage.safetensors", "init_from=s3://weights/start.safetensors"),
        *("distributed.doctor=false", "distributed.precision=bf16", "distributed.watchdog_s=0"),
        *(f"checkpoint.every={SAVE_EVERY}", f"logging.every={LOG_EVERY}", "sampling.every=0"),
        *("logging.wandb=disabled", "logging.progress_bar=false"),
        *overrides,
    ]


def growth(small: float, large: float, ratio: float) -> float:
    """Exponent of N, from the values at N and ratio x N; a logarithm shows as about a fifth."""
    return math.log(large / small) / math.log(ratio) if small > 0 and large > 0 else math.nan


def rows(sizes: list[int], delay_s: float, samples: int, overrides: list[str]) -> dict[str, dict[int, float]]:
    """{row: {ranks: value}}; 0 where a row has nothing at some size."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        options = SynthesisOptions(
            samples=samples, samples_per_shard=128, scene=SceneOptions(min_edge=24, max_edge=40)
        )
        list(synthesize(str(work / "shards"), options))
        shards = f"{work}/shards/*.tar"
        import_as_ranks_do(shards, work / "imports", overrides)
        measured: dict[int, dict[str, float]] = {}
        for size in sizes:
            measured[size] = measure(size, delay_s, shards, work, overrides)
            print(f"{size} ranks: {measured[size]['seconds of the first run']:.0f} s", file=sys.stderr)
    names = dict.fromkeys(name for values in measured.values() for name in values)
    return {name: {size: values.get(name, 0.0) for size, values in measured.items()} for name in names}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", default="2,4,8,16,32", help="sizes, smallest first")
    parser.add_argument("--delay-ms", type=float, default=20.0, help="what storage waits before it answers")
    parser.add_argument("--out", help="write the table as JSON, too")
    parser.add_argument("overrides", nargs="*", metavar="a.b=c", help="settings of the runs")
    args = parser.parse_args()
    sizes = [int(size) for size in args.ranks.split(",")]
    if min(sizes) < 2:
        parser.error("--ranks has to be at least 2: one rank talks to nobody.")
    table = rows(sizes, args.delay_ms / 1e3, max(512, 2 * SAMPLES_PER_RANK * max(sizes)), args.overrides)
    width = max(map(len, table))
    print(f"{'':{width}} " + "".join(f"{size:>10}" for size in sizes) + "   N^")
    for name, values in table.items():
        exponent = ""
        if len(sizes) > 1:
            small, large = sizes[-2:]
            exponent = f"{growth(values[small], values[large], large / small):.2f}"
        print(f"{name:{width}} " + "".join(f"{values[size]:10.6g}" for size in sizes) + f"   {exponent}")
    if args.out:
        Path(args.out).write_text(json.dumps(table, indent=1))


if __name__ == "__main__":
    main()
