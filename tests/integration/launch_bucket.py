"""A real S3 server with shards and runs in it, for tests that send the same run through every launcher."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from data_pipeline.loader import build_loader, open_dataset
from data_pipeline.moments.parts import read_table
from data_pipeline.storage.local_s3 import LocalS3
from data_pipeline.tools.scenes.scene import SceneOptions
from data_pipeline.tools.scenes.write_shards import SynthesisOptions, synthesize
from trainer.checkpoint.catalogue import checkpoints_url, folder_name, open_checkpoint, steps_found
from trainer.checkpoint.reader import EngineReader
from trainer.config.io import config_from_dict, load_config
from trainer.first_stage.build import build_first_stage, first_stage_tensors
from trainer.weights import write_weights

REPOSITORY = Path(__file__).parents[2]
BUCKET = "ldm"


def tiny_config() -> dict[str, Any]:
    """The demo's shape in miniature: text-conditioned, ZeRO-1, fp32, S3 for everything."""
    return {
        "run_dir": f"s3://{BUCKET}/runs/unnamed",
        "steps": 40,
        "global_batch_size": 8,
        "micro_batch_size": 2,
        "data": {
            "shards": f"s3://{BUCKET}/shards/*.tar",
            "image_size": 16,
            "shuffle_window": 16,
            "workers": 1,
            "horizontal_flip": True,
        },
        "first_stage": {"name": "identity", "latent_channels": 3},
        "unet": {
            "model_channels": 16,
            "channel_multipliers": [1, 2],
            "num_res_blocks": 1,
            "attention_factors": [2],
            "head_dim": 16,
            "num_groups": 4,
        },
        "conditioning": {
            "openclip": {
                "model": "ViT-B-32",
                "pretrained": "random",
                "width": 32,
                "layers": 1,
                "heads": 2,
                "layer": "last",
            }
        },
        "optimizer": {"learning_rate": 1e-3, "warmup_steps": 4},
        "ema": {"decay": 0.9},
        "distributed": {
            "engine": "deepspeed",
            "ranks": 2,
            "doctor": False,
            "zero_stage": 1,
            "precision": "fp32",
            "watchdog_s": 60.0,
            "channels_last": False,
        },
        "checkpoint": {"every": 10},
        "logging": {"every": 1, "wandb": "disabled", "progress_bar": False},
    }


class Bucket:
    """The server's folder is also a plain folder, which is where the tests look at what runs left."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.server = LocalS3(root / "s3", buckets=(BUCKET,))
        self.config = root / "tiny.yaml"
        self.config.write_text(yaml.safe_dump(tiny_config()), encoding="utf-8")
        options = SynthesisOptions(
            samples=96, samples_per_shard=24, scene=SceneOptions(min_edge=24, max_edge=40)
        )
        list(synthesize(str(root / "s3" / BUCKET / "shards"), options))

    @property
    def environment(self) -> dict[str, str]:
        """What a run needs to reach the server, and nothing that would make it slow or chatty."""
        return {
            **self.server.env,
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "LDM_MIN_TMP_GIB": "1",
            "LDM_MIN_SHM_GIB": "0",
            "LDM_NODE_CHECK_TIMEOUT_S": "900",
            "LDM_PYTHON": sys.executable,
            "PYTHONPATH": str(REPOSITORY),
        }

    def run(self, name: str) -> StoredRun:
        """The run stored as `runs/NAME`."""
        return StoredRun(f"s3://{BUCKET}/runs/{name}", self.root / "s3" / BUCKET / "runs" / name)

    def train_here(
        self, name: str, *overrides: str, config: Path | None = None, timeout_s: float = 1500.0
    ) -> StoredRun:
        """`ldm train` on this machine, to its end; of the tiny configuration unless another is named."""
        run = self.run(name)
        chosen = str(config or self.config)
        done = subprocess.run(
            [sys.executable, "-m", "trainer", "train", chosen, f"run_dir={run.url}", *overrides],
            env={**os.environ, **self.environment},
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return run


@dataclass(frozen=True)
class StoredRun:
    """What a run left in storage."""

    url: str
    folder: Path

    def records(self) -> list[dict[str, Any]]:
        """All JSONL records, in the order of writing."""
        lines: list[str] = []
        for path in sorted((self.folder / "logs").glob("*.jsonl")):
            lines += path.read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines]

    def losses(self) -> dict[int, float]:
        """Loss by step; a step that was made twice counts as it was made last."""
        return {record["step"]: record["loss"] for record in self.records() if "loss" in record}

    def events(self, name: str) -> list[dict[str, Any]]:
        """JSONL events of one name."""
        return [record for record in self.records() if record.get("event") == name]

    def steps(self) -> list[int]:
        """Steps of committed checkpoints, newest first."""
        folder = Path(checkpoints_url(str(self.folder)))
        if not folder.exists():
            return []
        found = steps_found(str(folder))
        return [step for step in found if (folder / folder_name(step) / "manifest.json").exists()]

    def state(self) -> dict[str, Any]:
        """Training state of the newest checkpoint: step, samples seen, data position ..."""
        handle = open_checkpoint(f"{checkpoints_url(str(self.folder))}/{folder_name(self.steps()[0])}")
        state = json.loads((Path(handle.url) / handle.manifest.state.name).read_text(encoding="utf-8"))
        return dict(state["state"]["train"])

    def tensors(self) -> dict[str, torch.Tensor]:
        """Master weights, moments and averages of the newest checkpoint, whatever its layout."""
        handle = open_checkpoint(f"{checkpoints_url(str(self.folder))}/{folder_name(self.steps()[0])}")
        found = {}
        for engine, shapes in handle.manifest.shapes.items():
            reader = EngineReader(handle, engine)
            for kind in handle.manifest.plan(0).kinds[engine]:
                for name, tensor in reader.whole(kind, list(shapes)).items():
                    found[f"{engine}.{kind}.{name}"] = tensor
        return found

    def fingerprint(self) -> str:
        """One digest of all `tensors`."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.tensors().items()):
            digest.update(name.encode() + tensor.numpy().tobytes())
        return digest.hexdigest()


def encoding_config(bucket: Bucket, folder: Path) -> Path:
    """The bucket's configuration with a small KL first stage, whose moments are kept in FOLDER/cache."""
    structure = {"name": "kl", "base_channels": 8, "channel_multipliers": [1, 2], "num_groups": 4}
    first_stage = build_first_stage(config_from_dict({"first_stage": structure}).first_stage)
    first_stage.set_latent_statistics(torch.zeros(4), torch.ones(4))
    weights = str(folder / "first_stage.safetensors")
    write_weights(weights, *first_stage_tensors(first_stage))
    config = tiny_config()
    config["data"]["horizontal_flip"] = False
    config["first_stage"] = {**structure, "weights": weights, "cache": str(folder / "cache")}
    path = folder / "encode.yaml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    os.environ.update(bucket.server.env)
    return path


def served_samples(path: Path) -> set[str]:
    """Names of the samples of a run's first epoch."""
    config = load_config(str(path))
    size = config.global_batch_size
    dataset = open_dataset(config.data)
    with build_loader(config.data, seed=config.seed, global_batch_size=size, dataset=dataset) as loader:
        batches = itertools.islice(loader, -(-dataset.epoch_samples // size))
        return {key.rpartition("/")[2] for batch in batches for key in batch.keys}


def kept_samples(folder: Path) -> Counter[str]:
    """Samples in FOLDER/cache, as often as they are there."""
    found: Counter[str] = Counter()
    for table in (folder / "cache").glob("*/parts/*.json"):
        for rows in read_table(str(table)).rows.values():
            found.update(row.sample for row in rows)
    return found
