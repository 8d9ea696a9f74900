"""What encoding once saves: bytes, requests and operations per sample, and seconds per step, pass by pass.

    python benchmarks/cache.py --repeats 3

A reduced model (KL encoder at f = 8, a small UNet) trains on synthetic JPEGs from a local S3 server, three
ways, one after the other in every repeat: encoding live, filling a new cache, and reading the full one. All
see the same samples in the same order, and their losses must be equal, bit for bit (fp32 is stored). With
`--order streamed` nobody has indexed them: the passes before the last leave what is known of them then.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections import Counter
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from data_pipeline.loader import build_loader
from data_pipeline.moments.entry import Moments
from data_pipeline.moments.writer import MomentsWriter
from data_pipeline.storage.local_s3 import LocalS3
from data_pipeline.tools.scenes.scene import SceneOptions
from data_pipeline.tools.scenes.write_shards import SynthesisOptions, synthesize
from trainer.config.io import load_config
from trainer.config.run import Config
from trainer.distributed.env import DistributedEnv
from trainer.distributed.torch_engine import TorchEngine
from trainer.first_stage.build import build_first_stage, first_stage_tensors
from trainer.first_stage.encode_once import EncodeOnce, moments_cache, open_cache
from trainer.metrics.timer import StepTimer
from trainer.model import build_model
from trainer.stages.diffusion import DiffusionStage
from trainer.weights import write_weights

FIRST_STAGE = (
    "name: kl, base_channels: {width}, channel_multipliers: [1, 2, 4, 4], num_res_blocks: 2, num_groups: 8"
)
BATCH = 16


@dataclass(frozen=True)
class Pass:
    """One pass over the samples."""

    losses: list[float]
    step_s: list[float]
    counts: Counter[str]
    cpu_s: float
    """Of the training process, its writer and the loader's process; a busy machine hardly changes it."""
    close_s: float
    """Until the last part was committed."""


def configuration(args: argparse.Namespace, weights: str, *settings: str) -> Config:
    return load_config(
        None,
        [
            *("data.shards=s3://shards/*.tar", f"data.image_size={args.edge}", "data.workers=1"),
            f"data.order={args.order}",
            *(
                "data.lanes=1",
                "data.shuffle_window=16",
            ),  # reads ahead reach beyond the pass by 64 samples of each lane
            f"first_stage={{{FIRST_STAGE.format(width=args.width)}, weights: {weights}}}",
            f"unet={{model_channels: {args.width}, channel_multipliers: [1, 2, 4], num_res_blocks: 2, "
            "attention_factors: [4, 2], head_dim: 16, num_groups: 8, attention: plain}",
            *(f"global_batch_size={BATCH}", "micro_batch_size=8"),
            "distributed={engine: torch, precision: fp32, channels_last: false}",
            *settings,
        ],
    )


def make_stage(config: Config) -> tuple[DiffusionStage, EncodeOnce | None]:
    torch.manual_seed(0)
    model = build_model(config)
    once = None
    if config.first_stage.cache is not None:
        cache = moments_cache(config.first_stage, model.first_stage)
        open_cache(config.first_stage, cache)
        once = EncodeOnce(model.first_stage, cache, MomentsWriter(cache), config.micro_batch_size)
    cpu = torch.device("cpu")
    engine = TorchEngine(model.network, config, DistributedEnv(0, 0, 1, 1, "127.0.0.1", 29500, "single", cpu))
    timer = StepTimer(cpu)
    stage = DiffusionStage(config, {"unet": engine}, model.conditioner, model.first_stage, timer, once)
    return stage, once


def one_pass(config: Config, steps: int) -> Pass:
    stage, once = make_stage(config)
    moments = Moments(0, once.cache) if once is not None else None
    losses, seconds = [], []
    cpu = cpu_seconds()
    with closing(build_loader(config.data, seed=0, global_batch_size=BATCH, moments=moments)) as batches:
        batch = next(batches)
        for step in range(steps):
            began = time.perf_counter()
            losses.append(stage.train_step(batch, step, 1e-4)["loss"].item())
            if step + 1 < steps:
                batch = next(batches)
            seconds.append(time.perf_counter() - began)
        counts = Counter(batches.counts)
    began = time.perf_counter()
    if once is not None:
        once.close()
        counts += Counter({f"written_{name}": count for name, count in once.counts.items()})
    return Pass(losses, seconds, counts, cpu_seconds() - cpu, time.perf_counter() - began)


def cpu_seconds() -> float:
    """Of this process and of those that it started and saw end."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def operations(config: Config) -> dict[str, float]:
    """GFLOP per sample of the encoder, and of the UNet's step (three times its forward)."""
    model = build_model(config)
    edge = config.data.image_size
    with torch.no_grad(), FlopCounterMode(display=False) as encoder:
        model.first_stage.moments(torch.zeros(1, 3, edge, edge))
    latents = torch.zeros(1, 4, edge // 8, edge // 8)
    drop = model.conditioner.drop_masks(0, torch.zeros(1, dtype=torch.int64))
    with torch.no_grad(), FlopCounterMode(display=False) as unet:
        model.network(latents, torch.zeros(1), {}, drop)
    return {
        "encoder_gflop": encoder.get_total_flops() / 1e9,
        "unet_step_gflop": 3 * unet.get_total_flops() / 1e9,
    }


def per_sample(found: Pass, samples: int) -> dict[str, float]:
    """Counts divided by the samples of a pass."""
    names = (
        *("requests", "bytes", "cache_requests", "cache_bytes", "cache_found", "cache_missed"),
        *("written_written", "written_bytes"),
    )
    return {name: round(found.counts[name] / samples, 3) for name in names}


def main() -> None:
    """Print one JSON object."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--samples", type=int, default=384, help="pictures of one epoch")
    parser.add_argument("--edge", type=int, default=128, help="pixels")
    parser.add_argument("--width", type=int, default=16, help="channels of encoder and UNet")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--order", choices=["indexed", "streamed"], default="indexed")
    args = parser.parse_args()
    torch.set_num_threads(1)
    steps = args.samples // BATCH
    with (
        tempfile.TemporaryDirectory() as folder,
        LocalS3(Path(folder), buckets=("shards", "cache")) as server,
    ):
        os.environ.update(server.env)
        scene = SceneOptions(min_objects=2, max_objects=3, min_edge=256, max_edge=384)
        options = SynthesisOptions(samples=args.samples, failed_share=0.0, scene=scene, jpeg_quality=95)
        list(synthesize("s3://shards", options))
        weights = str(Path(folder) / "first_stage.safetensors")
        first_stage = f"first_stage={{{FIRST_STAGE.format(width=args.width)}}}"
        module = build_first_stage(load_config(None, [first_stage]).first_stage)
        module.set_latent_statistics(torch.zeros(4), torch.ones(4))
        write_weights(weights, *first_stage_tensors(module))
        passes: dict[str, list[Pass]] = {"live": [], "filling": [], "full": []}
        for repeat in range(args.repeats):
            cache = (f"first_stage.cache=s3://cache/{repeat}", "first_stage.cache_dtype=fp32")
            turns = ("live", "filling", "full") if repeat % 2 == 0 else ("filling", "full", "live")
            for name in turns:
                made = passes[name]
                config = configuration(args, weights, *(() if name == "live" else cache))
                made.append(one_pass(config, steps))
                sys.stderr.write(f"{name} {repeat}: {statistics.median(made[-1].step_s):.3f} s a step\n")
            if not passes["live"][-1].losses == passes["filling"][-1].losses == passes["full"][-1].losses:
                raise SystemExit("the losses differ")
        result = {
            "settings": vars(args),
            **operations(configuration(args, weights)),
            "per_sample": {name: per_sample(made[-1], args.samples) for name, made in passes.items()},
            "cpu_seconds": {name: [round(p.cpu_s, 2) for p in made] for name, made in passes.items()},
            "seconds": {name: [round(sum(p.step_s), 2) for p in made] for name, made in passes.items()},
            "cpu_times_live": {
                name: round(
                    statistics.median(p.cpu_s for p in made)
                    / statistics.median(p.cpu_s for p in passes["live"]),
                    3,
                )
                for name, made in passes.items()
            },
            "close_s": [round(p.close_s, 2) for p in passes["filling"]],
        }
    sys.stdout.write(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
