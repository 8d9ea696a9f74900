"""A run as an evaluator sees it: real checkpoints and snapshots of a tiny model, committed one by one."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from data_pipeline.storage.files import write_bytes
from data_pipeline.storage.urls import join
from trainer.__main__ import main
from trainer.checkpoint.manager import CheckpointManager
from trainer.config.identity import SETTINGS as FILE
from trainer.config.io import dump_yaml, load_config
from trainer.distributed.env import DistributedEnv
from trainer.distributed.torch_engine import TorchEngine
from trainer.ema import EMA
from trainer.model import build_model

SETTINGS = (
    "data.image_size=8",
    "first_stage.name=identity",
    "unet={model_channels: 16, channel_multipliers: [1], num_res_blocks: 1, attention_factors: [1], "
    "head_dim: 16, num_groups: 4}",
    "conditioning.class_label={num_classes: 3, width: 16}",
    "sampling={steps: 2, guidance_scale: 2.0}",
    "distributed={engine: torch, precision: fp32}",
    "ema={decay: 0.5, power_stds: [0.1]}",
    "checkpoint.asynchronous=false",
    "logging.wandb=disabled",
    "global_batch_size=4",
    "micro_batch_size=4",
)


class CommittedRun:
    """What a training run leaves in its folder, without the training."""

    def __init__(self, run_dir: str, *settings: str) -> None:
        self.config = replace(load_config(None, [*SETTINGS, *settings]), run_dir=run_dir)
        write_bytes(join(run_dir, FILE), dump_yaml(self.config).encode())
        torch.manual_seed(0)
        self.model = build_model(self.config)
        for parameter in self.model.network.parameters():
            nn.init.normal_(parameter, std=0.2)
        self.engine = TorchEngine(self.model.network, self.config, DistributedEnv.detect({}))
        self.ema = EMA(self.config.ema, self.engine.fragments())
        self.manager = CheckpointManager(self.config, DistributedEnv.detect({}))

    def commit(
        self, step: int, *, weights: int | None = None, snapshot: bool = False, scale: float = 0.2
    ) -> None:
        """Step `step`, with weights that follow from it, or from `weights`; with a snapshot, that alone.

        scale: deviation of the weights.
        """
        generator = torch.Generator().manual_seed(step if weights is None else weights)
        for fragment in self.engine.fragments():
            fragment.master.copy_(scale * torch.randn(fragment.master.shape, generator=generator))
        for profile in self.ema.profiles:
            for value, fragment in zip(self.ema.values(profile), self.engine.fragments(), strict=True):
                value.copy_(fragment.master)
        statistics = {
            "latent_shift": self.model.first_stage.latent_shift,
            "latent_scale": self.model.first_stage.latent_scale,
        }
        engines = {"unet": self.engine}
        if snapshot:
            self.manager.save_snapshot(step, engines, self.ema, tensors=statistics)
        else:
            train = {"step": step, "samples_seen": 4 * step, "position": None, "wandb_run_id": "abc123"}
            state = {"train": train, "healer": {}}
            self.manager.save(step, engines, self.ema, state=state, tensors=statistics, loss=None)
        self.manager.wait()

    def close(self) -> None:
        self.manager.close()


def reference(folder: Path, count: int = 24, seed: int = 0) -> str:
    """Pictures to measure against."""
    folder.mkdir()
    for number in range(count):
        pixels = np.random.default_rng(seed + number).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:03d}.png")
    return str(folder)


def watch(tmp_path: Path, *words: str) -> int:
    if not (tmp_path / "real").exists():
        reference(tmp_path / "real")
    measuring = ["--reference", str(tmp_path / "real"), "--features", "random", "--metrics", "fid,kid"]
    drawing = ["--sample", "--count 20 --batch-size 4"]
    return main(["evaluate", "watch", str(tmp_path / "run"), *measuring, *drawing, "--poll-s", "0.1", *words])


def lines(tmp_path: Path) -> list[dict[str, Any]]:
    text = (tmp_path / "run/evaluation/metrics.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


MakeRun = Callable[..., CommittedRun]
