"""`ldm train`'s own entry on one GPU: a tiny text-to-image run in bf16 under ZeRO-1, stopped and resumed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from data_pipeline.tools.scenes.scene import SceneOptions
from data_pipeline.tools.scenes.write_shards import SynthesisOptions, synthesize
from tests.unit.test_sample_series import exported
from trainer.__main__ import main
from trainer.config.io import load_config
from trainer.exit_codes import ExitCode
from trainer.first_stage.build import build_first_stage, first_stage_tensors
from trainer.model import load_model
from trainer.weights import write_weights

ROOT = Path(__file__).resolve().parents[2]
TINY = (
    "data.image_size=64",
    "data.workers=1",
    "unet.model_channels=32",
    "unet.channel_multipliers=[1,2]",
    "unet.attention_factors=[2]",
    "unet.head_dim=16",
    "unet.num_groups=16",
    "first_stage.base_channels=32",
    "first_stage.num_res_blocks=1",
    "conditioning.openclip.model=ViT-B-32",
    "conditioning.openclip.pretrained=random",
    "conditioning.openclip.width=64",
    "conditioning.openclip.layers=2",
    "conditioning.openclip.heads=2",
    "conditioning.openclip.context_length=16",
    "global_batch_size=8",
    "micro_batch_size=4",
    "optimizer.warmup_steps=0",
    "logging.every=1",
    "logging.wandb=disabled",
    "logging.progress_bar=false",
    "distributed.doctor=false",
    "distributed.max_restarts=0",
    "distributed.ranks=1",
)


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards and a first stage."""
    folder = tmp_path_factory.mktemp("material")
    scene = SceneOptions(min_edge=512, max_edge=520)
    list(synthesize(str(folder / "shards"), SynthesisOptions(64, samples_per_shard=32, scene=scene)))
    torch.manual_seed(0)
    config = load_config(str(ROOT / "configs/sd/sd2_base_512.yaml"), TINY)
    write_weights(
        str(folder / "first_stage.safetensors"), *first_stage_tensors(build_first_stage(config.first_stage))
    )
    return folder


def ldm(*words: str, **variables: str) -> str:
    """`ldm` in a process of its own, since DeepSpeed keeps a process's first group for ever; what it says."""
    return python("-m", "trainer", *words, **variables)


def python(*words: str, **variables: str) -> str:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, *words]
    done = subprocess.run(command, cwd=ROOT, env=environment | variables, capture_output=True, text=True)
    assert done.returncode == ExitCode.DONE, f"{done.stdout}\n{done.stderr[-3000:]}"
    return done.stdout + done.stderr


def settings(material: Path) -> list[str]:
    """The tiny recipe on what was made for it."""
    files = (
        f"data.shards={material}/shards/*.tar",
        f"first_stage.weights={material}/first_stage.safetensors",
    )
    return ["configs/sd/sd2_base_512.yaml", *TINY, *files]


def train(material: Path, run_dir: Path, steps: int, *changes: str) -> None:
    ldm("train", *settings(material), f"run_dir={run_dir}", f"steps={steps}", *changes)


def records(run_dir: Path) -> list[dict[str, Any]]:
    lines = (run_dir / "logs/metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_training_resumes_where_it_stopped(material: Path, tmp_path: Path) -> None:
    train(material, tmp_path, 3)
    train(material, tmp_path, 6)
    found = records(tmp_path)
    assert [r["event"] for r in found if "event" in r] == ["settings changed", "resume"]
    losses = {r["step"]: r["loss"] for r in found if "loss" in r}
    assert sorted(losses) == [1, 2, 3, 4, 5, 6]
    assert max(losses.values()) < 2  # of noise with variance 1, predicted by zero or better
    assert found[-1]["samples_seen"] == 48
    assert found[-1]["memory_gib"] > 0


@pytest.mark.parametrize(
    "changes",
    [
        ["optimizer.name=muon"],
        ["optimizer.name=adafactor", "optimizer.learning_rate=1e-2"],
        ["distributed.cuda_graphs=true"],
        ["distributed.compile=true"],
        ["distributed.engine=fsdp"],
        ["unet.activation_checkpointing=true"],
    ],
    ids=lambda changes: changes[0],
)
def test_training_learns_in_every_way(material: Path, tmp_path: Path, changes: list[str]) -> None:
    """All weights and averages are finite at the end, and the loss has fallen."""
    train(material, tmp_path, 12, "optimizer.learning_rate=1e-3", *changes)
    losses = [r["loss"] for r in records(tmp_path) if "loss" in r]
    assert len(losses) == 12
    assert sum(losses[-3:]) < sum(losses[:3])
    for profile in ("weights", "decay"):
        network = load_model(str(tmp_path), profile=profile, device=torch.device("cpu")).model.network
        assert all(torch.isfinite(value).all() for value in network.parameters())


def test_kernels_are_compiled_before_they_are_launched(material: Path, tmp_path: Path) -> None:
    """By the file that Triton names after each kernel: training adds none but the first stage's softmax."""
    words = [*settings(material), f"run_dir={tmp_path / 'run'}", "steps=2"]
    ahead = (
        "import sys; from trainer.config.io import load_config; from trainer.launch.rank import *;"
        "sys.exit(compile_for_this_node(load_config(sys.argv[1], sys.argv[2:])))"
    )
    cache = tmp_path / "cache"
    python("-c", ahead, *words, TRITON_CACHE_DIR=str(cache))
    before = set(cache.glob("*/*.cubin"))
    ldm("train", *words, TRITON_CACHE_DIR=str(cache))
    added = {path.stem for path in set(cache.glob("*/*.cubin")) - before}
    assert len(before) > 30
    assert added <= {"_softmax"}


def test_adapters_train_and_nothing_else(material: Path, tmp_path: Path) -> None:
    """Of a run's averages, which they begin with, the attentions move and the rest stays to the bit."""
    pytest.importorskip("peft")
    base, adapted = tmp_path / "base", tmp_path / "adapted"
    train(material, base, 3, "optimizer.learning_rate=1e-3")
    train(material, adapted, 6, f"init_from={base}", "lora={rank: 4}", "optimizer.learning_rate=1e-2")
    before, after = (
        load_model(str(run), profile=profile, device=torch.device("cpu")).model.network.state_dict()
        for run, profile in ((base, "decay"), (adapted, "weights"))
    )
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved
    assert all(".attn" in name for name in moved)


def test_a_first_stage_trains_against_its_discriminator(material: Path, tmp_path: Path) -> None:
    """The second half of the steps with the adversary, in bf16."""
    ldm(
        *("train", "configs/demo_first_stage.yaml", f"run_dir={tmp_path}", "steps=12"),
        *(
            f"data.shards={material}/shards/*.tar",
            "data.image_size=64",
            "autoencoder_loss.discriminator_start=6",
        ),
        *("distributed.ranks=1", "distributed.precision=bf16", "distributed.channels_last=true"),
        *("logging={every: 1, wandb: disabled, progress_bar: false}", "optimizer.warmup_steps=0"),
    )
    found = [r for r in records(tmp_path) if "loss" in r]
    assert len(found) == 12
    assert found[5]["loss"] < found[0]["loss"]
    assert any("discriminator" in name for name in found[-1])


def test_the_doctor_finds_the_largest_micro_batch(material: Path, tmp_path: Path) -> None:
    """With less than a tenth of the card, so that a size is refused."""
    said = ldm(
        *("doctor", *settings(material), f"run_dir={tmp_path}", "--fit", "--memory", "6"),
        *("data.image_size=512", "global_batch_size=512"),
    )
    assert "does not fit" in said
    assert "largest micro-batch that fits" in said


def test_graphs_and_compiled_blocks_draw_the_same_pictures(tmp_path: Path) -> None:
    """Three batches, so that replays follow the capture."""
    source = exported(tmp_path, "conditioning.class_label={num_classes: 3, width: 16}")
    drawn = {}
    for name, words in {
        "plain": [],
        "graphs": ["--cuda-graphs"],
        "both": ["--cuda-graphs", "--compile"],
    }.items():
        out = tmp_path / name
        options = [
            "--count",
            "10",
            "--batch-size",
            "4",
            "--steps",
            "3",
            "--ranks",
            "1",
            "--precision",
            "fp32",
        ]
        assert main(["sample", source, *options, *words, "--out", str(out)]) == 0
        pictures = sorted((out / "pictures").glob("*.png"))
        drawn[name] = np.stack([np.asarray(Image.open(path)).astype(int) for path in pictures])
    assert drawn["plain"].shape[0] == 10
    assert (drawn["graphs"] == drawn["plain"]).all()
    assert abs(drawn["both"] - drawn["plain"]).max() <= 1


def test_a_text_transformer_is_built_where_it_draws(tmp_path: Path) -> None:
    """Its tokens are the host's, also those of the empty caption."""
    size = "{width: 16, layers: 1, heads: 1, head_dim: 8, max_tokens: 8}"
    source = exported(tmp_path, f"conditioning={{text_transformer: {size}, image_size: {{width: 16}}}}")
    drawn = []
    for prompt in ("a red circle", "a blue square"):
        out = tmp_path / prompt
        assert main(["sample", source, "--prompt", prompt, "--steps", "2", "--out", str(out)]) == 0
        drawn.append(np.asarray(Image.open(out / "pictures/00000.png")))
    assert (drawn[0] != drawn[1]).any()
