"""The second stage on ranks that do not divide the global batch: samples, losses and weights of one rank."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.integration.ranks import run_ranks
from trainer.config.io import load_config
from trainer.first_stage.build import build_first_stage, first_stage_tensors
from trainer.weights import write_weights

RANKS = "tests/unit/stages/diffusion_ranks.py:train_cases"
FIRST_STAGE = "name: kl, base_channels: 8, channel_multipliers: [1, 2], num_res_blocks: 1, num_groups: 4"
BATCH, STEPS = 7, 3
ENGINES = [("torch", 0), ("deepspeed", 0), ("deepspeed", 1), ("deepspeed", 2), ("deepspeed", 3)]
TORCH, MANY = (
    ["distributed.engine=torch"],
    ["diffusion.learned_uncertainty=true", "diffusion.timesteps=stratified"],
)
BUCKETS = ["data.buckets=true", "data.bucket_step=8", "data.bucket_max_aspect=4.0", "data.lanes=7"]


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """120 pictures of three aspects, and a first stage."""
    folder = tmp_path_factory.mktemp("shards")
    noise = np.random.default_rng(0)
    with tarfile.open(folder / "00000.tar", "w") as tar:
        for number in range(120):
            height, width = [(16, 64), (24, 24), (64, 16)][number % 3]
            file = io.BytesIO()
            coarse = noise.integers(0, 256, (height // 8, width // 8, 3), np.uint8)
            Image.fromarray(coarse.repeat(8, 0).repeat(8, 1)).save(file, "PNG")
            member = tarfile.TarInfo(f"{number:05d}.png")
            member.size = len(file.getvalue())
            tar.addfile(member, io.BytesIO(file.getvalue()))
    torch.manual_seed(0)
    stage = build_first_stage(load_config(None, [f"first_stage={{{FIRST_STAGE}}}"]).first_stage)
    stage.set_latent_statistics(torch.zeros(4), torch.ones(4))
    weights = str(folder / "first_stage.safetensors")
    write_weights(weights, *first_stage_tensors(stage))
    return [
        *(
            f"data.shards={folder}/*.tar",
            "data.image_size=16",
            "data.workers=0",
            "data.require_caption=false",
        ),
        f"first_stage={{{FIRST_STAGE}, weights: {weights}}}",
        "unet={model_channels: 8, channel_multipliers: [1], num_res_blocks: 1, attention_factors: [], "
        "head_dim: 8, num_groups: 4, attention: plain}",
        # A large eps keeps Adam from turning the sign of a rounding error into a whole step.
        *(f"global_batch_size={BATCH}", "optimizer.warmup_steps=0", "optimizer.eps=1e-3"),
        "distributed={precision: fp32, channels_last: false}",
    ]


def assert_same(made: dict[str, Any], wanted: dict[str, Any], *, dtype_error: float = 1e-5) -> None:
    assert made["keys"] == wanted["keys"]
    for name in ("loss", "error", "grad_norm"):
        assert made[name] == pytest.approx(wanted[name], rel=dtype_error), name
    for name, values in wanted["weights"].items():
        torch.testing.assert_close(
            torch.tensor(made["weights"][name]), torch.tensor(values), rtol=1e-3, atol=1e-6
        )


def test_three_ranks_are_one(settings: list[str], tmp_path: Path) -> None:
    """Of 7 samples they have 3, 2 and 2, in two passes of two rows: of six passes one is padding alone."""
    engines = [[f"distributed.engine={name}", f"distributed.zero_stage={zero}"] for name, zero in ENGINES]
    cases = [*engines, [*TORCH, *MANY, *BUCKETS]]
    whole = [[*settings, "micro_batch_size=7", *case] for case in (TORCH, cases[-1])]
    (one,) = run_ranks(RANKS, 1, {"cases": whole})
    assert one[0]["keys"] != one[1]["keys"]
    cached = [*settings, "micro_batch_size=2", *TORCH, f"first_stage.cache={tmp_path}"]
    cached.append("first_stage.cache_dtype=fp32")
    three = [[*settings, "micro_batch_size=2", *case] for case in cases]
    by_rank = run_ranks(RANKS, 3, {"cases": [*three, cached, cached]})
    for made, wanted in zip(by_rank[0][: len(three)], [*[one[0]] * len(engines), one[1]], strict=True):
        assert made["rows"] == [[3, 2, 2]] * STEPS
        assert_same(made, wanted)
    filling, full = by_rank[0][len(three) :]
    assert_same(filling, one[0])
    assert filling["written"] == len(set(one[0]["keys"])) == BATCH * STEPS  # no row of padding among them
    assert_same(full, one[0])
    assert full["written"] == 0
    assert [case["loss"] for case in by_rank[2]] == [case["loss"] for case in by_rank[0]]


def test_more_ranks_than_lanes_take_part(settings: list[str]) -> None:
    """Two lanes have four samples each in a step, and are not cut: of three ranks the last has none."""
    few = [*settings, "global_batch_size=8", "micro_batch_size=4", "data.lanes=2", *TORCH]
    (one,) = run_ranks(RANKS, 1, {"cases": [few]})
    by_rank = run_ranks(RANKS, 3, {"cases": [few]})
    assert by_rank[0][0]["rows"] == [[4, 4, 0]] * STEPS
    assert_same(by_rank[0][0], one[0])
