"""What a run asks of the network and of storage as its ranks grow: counted, since two cores cannot time it.

    python benchmarks/scale.py                              # 2, 4, 8, 16, 32 ranks
    python benchmarks/scale.py --ranks 8,32,128 --delay-ms 20 --out scale.json
    python benchmarks/scale.py --ranks 2,4 distributed.reduce_precision=bf16 micro_batch_size=1

The real `trainer.train.run` with DeepSpeed, gloo and S3, on a tiny network, in ranks that are forked from
this process (it has imported everything, so 128 of them fit into memory). Each run trains, saves three times
and is resumed. Counted are calls of torch.distributed, from inside the ranks, and requests, by a proxy in
front of a real S3 server that waits `--delay-ms` before it answers. The last column is the exponent of N that
a row grows with, from its last two sizes: 0 constant, 1 proportional to the number of ranks.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import inspect
import json
import math
import os
import resource
import socket
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import urlopen

import psutil
import torch
import torch.distributed as dist

from data_pipeline.scenes.scene import SceneOptions
from data_pipeline.scenes.write_shards import SynthesisOptions, synthesize
from data_pipeline.storage.local_s3 import LocalS3
from trainer import train
from trainer.checkpoint.manager import CheckpointManager
from trainer.config.io import load_config
from trainer.distributed import deepspeed_engine  # noqa: F401 - so that the ranks need not import it
from trainer.distributed.env import DistributedEnv
from trainer.first_stage.build import build_first_stage, first_stage_tensors
from trainer.metrics.sinks import Sinks
from trainer.model import build_model, count_parameters
from trainer.weights import write_weights

ROOT = Path(__file__).resolve().parent.parent
SAVE_EVERY, LOG_EVERY = 6, 4
STEPS = 12
SAVES = 3
"""At the first step, after half of them, at the end."""
PLAIN_STEP = 10
"""Neither logs nor saves; the one before settles what was saved long before."""
SAMPLES_PER_RANK = 2
IDEAL_BYTES = 2 + 2
"""Of each parameter in a step: its gradient in bf16 to the rank that updates it, and the weight back."""
NETWORKS = (
    "first_stage={name: kl, base_channels: 8, channel_multipliers: [1], num_res_blocks: 1, num_groups: 4}",
    "unet={model_channels: 8, channel_multipliers: [1, 2], num_res_blocks: 1, attention_factors: []}",
    "unet={num_groups: 4, head_dim: 8}",
    "first_stage.latent_scale=1",
)
CALLS = (
    *("all_reduce", "reduce", "broadcast", "all_gather", "all_gather_into_tensor", "reduce_scatter_tensor"),
    *("all_gather_single", "reduce_scatter_single"),  # what torch 2.14 calls these two
    *("all_gather_object", "gather_object", "broadcast_object_list", "barrier", "isend", "recv", "send"),
)


class Storage(ThreadingHTTPServer):
    """Forwards to a real S3 server after a delay and counts requests by phase and kind."""

    daemon_threads = True
    request_queue_size = 1024

    def __init__(self, upstream: int, delay_s: float) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.upstream, self.delay_s = upstream, delay_s
        self.phase = "start"
        self.counts: Counter[str] = Counter()
        self.weights_bytes: Counter[str] = Counter()
        """Of the files that a run begins with, by phase."""
        self.committed: dict[str, float] = {}
        """Seconds from the last shard of a checkpoint to its manifest, by key of the manifest."""
        self.last_shard_s = 0.0
        self.lock = threading.Lock()
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def note(self, command: str, path: str, num_bytes: int) -> None:
        """One request, and the bytes of its answer."""
        kind = _kind(command, path)
        with self.lock:
            if kind == "GET weights":
                self.weights_bytes[self.phase] += num_bytes
            self.counts[f"{self.phase}: {kind}"] += 1
            if kind == "PUT shard":
                self.last_shard_s = time.monotonic()
            if kind == "PUT manifest":
                self.committed[path] = time.monotonic() - self.last_shard_s


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Storage

    def handle(self) -> None:
        with contextlib.suppress(ConnectionError):
            super().handle()

    def log_message(self, *args: object) -> None:
        pass

    def _forward(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.path.startswith("/phase/"):
            self.server.phase = self.path.removeprefix("/phase/")
            self._answer(200, [], b"")
            return
        time.sleep(self.server.delay_s)
        upstream = http.client.HTTPConnection("127.0.0.1", self.server.upstream, timeout=60)
        upstream.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
        for name, value in self.headers.items():
            upstream.putheader(name, value)
        upstream.endheaders(body or None)
        answer = upstream.getresponse()
        data = answer.read()
        upstream.close()
        self.server.note(self.command, self.path, len(data))
        size = answer.getheader("Content-Length", "0") if self.command == "HEAD" else str(len(data))
        self._answer(answer.status, answer.getheaders(), data, size)

    def _answer(self, code: int, headers: list[tuple[str, str]], data: bytes, size: str = "0") -> None:
        self.send_response(code)
        for name, value in headers:
            if name.lower() not in ("content-length", "connection", "transfer-encoding", "date", "server"):
                self.send_header(name, value)
        self.send_header("Content-Length", size)
        self.end_headers()
        self.wfile.write(data)

    do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = _forward


def _kind(command: str, path: str) -> str:
    key = path.partition("?")[0].rsplit("/", 1)[-1]
    kinds = {
        "manifest": "manifest.json",
        "shard": "rank_",
        "state": "state.",
        "journal": "healing",
        "STOP": "STOP",
    }
    if "/weights/" in path:
        return f"{command} weights"
    known = next((kind for kind, begin in kinds.items() if key.startswith(begin)), None)
    if known == "shard" and key.endswith(".receipt"):
        known = "receipt"
    listing = command == "GET" and ("list-type" in path or "prefix=" in path)
    return f"{'LIST' if listing else command} {known or ('' if listing else 'other')}".strip()


def rank_main(rank: int, ranks: int, port: int, overrides: list[str], out: Path, mark: str) -> None:
    """One rank: train, and leave the calls of each step in `out`."""
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(ranks),
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="1",
    )  # fmt: skip
    torch.set_num_threads(1)
    calls: Counter[str] = Counter()
    steps: dict[int, dict[str, int]] = {}
    for name in CALLS:
        setattr(dist, name, counted(getattr(dist, name), name, calls))
    advance, save = Sinks.advance, CheckpointManager.save

    def tell(phase: str) -> None:
        if rank == 0:
            urlopen(f"{mark}/phase/{phase}").read()

    def counted_advance(self: Sinks, step: int) -> None:
        steps[step] = dict(calls)
        advance(self, step)

    def told_save(self: CheckpointManager, *args: Any, **kwargs: Any) -> None:
        tell("saves")
        save(self, *args, **kwargs)

    Sinks.advance = counted_advance  # type: ignore[method-assign]
    CheckpointManager.save = told_save  # type: ignore[method-assign]
    config = load_config(None, overrides)
    env = DistributedEnv.detect()
    code = train.run(config, env)
    # Without those to storage: how many are open at this moment is the client's pool's choice.
    me, storage = psutil.Process(), urlsplit(mark).port
    files = me.num_fds() - sum(c.raddr.port == storage for c in me.net_connections("tcp") if c.raddr)
    maximum = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    result = {"code": int(code), "steps": steps, "descriptors": files, "peak_mib": maximum}
    (out / f"{rank}.json").write_text(json.dumps(result))


def counted(function: Callable[..., Any], name: str, calls: Counter[str]) -> Callable[..., Any]:
    """The function, whose calls and bytes are added to `calls`."""
    signature = inspect.signature(function)

    def call(*args: Any, **kwargs: Any) -> Any:
        calls[name] += 1
        calls["bytes"] += sent(name, signature.bind(*args, **kwargs).arguments)
        return function(*args, **kwargs)

    return call


def sent(name: str, arguments: dict[str, Any]) -> int:
    """Bytes that each rank of a ring sends for a collective of tensors; 0 for what ranks tell each other."""
    whole = {
        **dict.fromkeys(("all_reduce", "reduce", "broadcast"), "tensor"),
        **dict.fromkeys(("all_gather_into_tensor", "all_gather_single"), "output_tensor"),
        **dict.fromkeys(("reduce_scatter_tensor", "reduce_scatter_single"), "input"),
        "all_gather": "tensor_list",
    }
    if name not in whole:
        return 0
    ranks = dist.get_world_size(arguments.get("group"))
    tensors = arguments[whole[name]]
    tensors = [tensors] if isinstance(tensors, torch.Tensor) else tensors
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    return (2 if name == "all_reduce" else 1) * size * (ranks - 1) // ranks


def launch(ranks: int, overrides: list[str], folder: Path, mark: str) -> list[dict[str, Any]]:
    """All ranks of one run; what each of them counted."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    folder.mkdir(parents=True)
    children = []
    for rank in range(ranks):
        child = os.fork()
        if child == 0:
            status = 1
            try:
                with (folder / f"{rank}.log").open("w") as log:
                    os.dup2(log.fileno(), 1)
                    os.dup2(log.fileno(), 2)
                    rank_main(rank, ranks, port, overrides, folder, mark)
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


def measure(ranks: int, delay_s: float, shards: str, work: Path, overrides: list[str]) -> dict[str, float]:
    """Every row of the table at one number of ranks."""
    folder = work / f"{ranks}"
    with LocalS3(folder / "s3", buckets=("runs", "weights")) as server:
        write_networks(folder / "s3/weights")
        storage = Storage(server.port, delay_s)
        mark = f"http://127.0.0.1:{storage.server_address[1]}"
        os.environ.update({**server.env, "AWS_ENDPOINT_URL": mark})
        begun = time.monotonic()
        told = launch(ranks, settings(ranks, shards, STEPS, overrides), folder / "first", mark)
        seconds = time.monotonic() - begun
        requests, committed = Counter(storage.counts), [*storage.committed.values()]
        storage.phase = "resume"
        launch(ranks, settings(ranks, shards, STEPS + 1, overrides), folder / "second", mark)
        storage.shutdown()
    resumed = {name: n for name, n in storage.counts.items() if name.startswith("resume")}
    requests = {
        name: n / (SAVES if name.startswith("saves") else 1) for name, n in requests.items()
    } | resumed
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
        **{f"requests {name}": count for name, count in sorted(requests.items())},
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


def messages(calls: dict[str, int], ranks: int) -> int:
    """Messages one after another that these calls take: a ring of N ranks passes 2 (N - 1) or N - 1 times."""
    tree = max(1, math.ceil(math.log2(ranks)))
    hops = {
        **dict.fromkeys(("all_reduce",), 2 * (ranks - 1)),
        **dict.fromkeys(("all_gather", "all_gather_into_tensor", "all_gather_single"), ranks - 1),
        **dict.fromkeys(("reduce_scatter_tensor", "reduce_scatter_single"), ranks - 1),
        # Each of its two collectives, of the sizes and of the objects.
        **{
            "all_gather_object": 2 * (ranks - 1),
            "gather_object": 2 * (ranks - 1),
            "broadcast_object_list": 2 * tree,
        },
        **{"broadcast": tree, "reduce": tree, "barrier": 2 * tree, "isend": 1, "send": 1, "recv": 0},
    }
    return sum(hops[name] * count for name, count in calls.items() if name != "bytes")


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
        *(
            "data.workers=0",
            "data.shuffle_window=1",
        ),
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
