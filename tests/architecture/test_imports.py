"""What processes import: hundreds of ranks that start together ask one file system for all of it.

A module costs several questions in each folder of the path until it is found. So the number of modules is
held, and what loaders, writers and launchers do without stays away from them. The bounds leave a sixth for
newer versions of libraries: whoever meets one looks at what has come in (`python -X importtime`) before
raising it.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from data_pipeline.storage.local_s3 import LocalS3
from tests.unit.one_rank import small_shards
from trainer.config.io import dump_yaml, load_config

HEAVY = (
    "torch",
    "deepspeed",
    "open_clip",
    "transformers",
    "diffusers",
    "timm",
    "ray",
    "wandb",
    "torchvision",
)

STEP = """
from torch import nn, ones
from trainer.config.run import Config
from trainer.config.training import DistributedConfig
from trainer.distributed.build import build_engine
from trainer.distributed.env import DistributedEnv, initialise

env = DistributedEnv.detect({})
initialise(env, 60.0)
for stage in (1, 3):
    config = Config(distributed=DistributedConfig(zero_stage=stage))
    engine = build_engine(nn.Linear(3, 2), config, env)
    engine.backward(engine(ones(1, 3, dtype=engine.compute_dtype)).float().sum())
    engine.step(1e-3)
"""
PROCESSES = {
    # Starts and watches ranks; one for each node, or in the batch script.
    "launcher": ("import trainer.launch.local", 230, HEAVY),
    # Reads and decodes pictures: data.workers of them beside each rank.
    "loader": ("import data_pipeline.feed.worker", 540, HEAVY),
    # Uploads checkpoints, one beside each rank.
    "writer": ("import trainer.checkpoint.writer_process", 310, HEAVY),
    # torch, and of its compiler the front that its optimizers want.
    "rank": (
        "import trainer.launch.rank, trainer.train, torch._dynamo",
        2800,
        ("transformers", "timm", "ray"),
    ),
    # And DeepSpeed, without the compiler's back, which writes code by templates.
    "engine": (f"import trainer.train\n{STEP}", 3400, ("transformers", "timm", "ray", "jinja2")),
}


@pytest.mark.parametrize("process", PROCESSES)
def test_a_process_imports_what_it_needs_and_no_more(process: str) -> None:
    statement, most, absent = PROCESSES[process]
    listed = f"{statement}\nimport sys; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", listed], capture_output=True, text=True, check=True)
    modules = done.stdout.splitlines()[-1].split()
    assert len(modules) <= most
    assert sorted({name.partition(".")[0] for name in modules}.intersection(absent)) == []


def test_a_start_with_its_doctor_imports_torch_and_the_client_of_s3_once(tmp_path: Path) -> None:
    """Rank, doctor, loader and writer together, as Python tells of each import on stderr."""
    small_shards(tmp_path / "shards")
    settings = [
        f"run_dir={tmp_path}/run",
        "data.shards=s3://shards/*.tar",
        *("data.image_size=16", "data.workers=1", "first_stage.name=identity", "steps=1"),
        "unet={model_channels: 16, channel_multipliers: [1, 2], num_res_blocks: 1, attention_factors: [2]}",
        *("unet.head_dim=16", "unet.num_groups=4", "global_batch_size=2", "micro_batch_size=2"),
        *("data.require_caption=false", "logging.wandb=disabled", "logging.progress_bar=false"),
        "distributed={engine: torch, zero_stage: 0, precision: fp32}",
    ]
    path = tmp_path / "config.yaml"
    path.write_text(dump_yaml(load_config(None, settings)))
    with LocalS3(tmp_path) as server:
        done = subprocess.run(
            [sys.executable, "-m", "trainer", "train", str(path)],
            capture_output=True,
            text=True,
            env={**os.environ, **server.env, "PYTHONPROFILEIMPORTTIME": "1", "CUDA_VISIBLE_DEVICES": ""},
        )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "checks passed" in done.stdout + done.stderr
    times = Counter(re.findall(r"\|\s+(torch|s3fs\.core)$", done.stderr, re.MULTILINE))
    assert times == {"torch": 1, "s3fs.core": 2}  # the loader process reads from S3, too
