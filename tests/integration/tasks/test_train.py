"""Every task trains on synthesized shards: its loss falls, and the true condition beats a shuffled one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from data_pipeline.batch import Batch
from data_pipeline.loader import build_loader
from data_pipeline.tools.scenes.scene import NUM_CLASSES, SceneOptions
from data_pipeline.tools.scenes.write_shards import SynthesisOptions, synthesize
from trainer.config.io import load_config
from trainer.config.run import Config
from trainer.diffusion.objective import add_noise, loss_per_sample
from trainer.diffusion.schedule import make_schedule
from trainer.distributed.build import build_engine
from trainer.distributed.env import DistributedEnv
from trainer.first_stage.build import (
    build_first_stage,
    first_stage_tensors,
)
from trainer.first_stage.statistics import measure_latent_statistics
from trainer.metrics.timer import StepTimer
from trainer.model import build_model
from trainer.pixels import to_unit_range
from trainer.rng import Purpose, normal
from trainer.stages.diffusion import DiffusionStage
from trainer.weights import write_weights

STEPS = 200
FIRST_STAGE_STEPS = 150
TEXT = (
    "conditioning.openclip={model: ViT-B-32, pretrained: random, width: 64, layers: 1, heads: 2, "
    "layer: last, context_length: 16}"
)
TAU = "conditioning.text_transformer={width: 64, layers: 1, heads: 2, head_dim: 32, max_tokens: 16}"
CLASS = f"num_classes: {NUM_CLASSES}, width: 64"
LAYOUT = (
    f"conditioning.layout={{num_labels: {NUM_CLASSES}, max_boxes: 2, grid: 16, width: 64, layers: 1, "
    "heads: 2}"
)
SEMANTIC = f"conditioning.semantic_map={{num_labels: {NUM_CLASSES + 1}}}"
F2 = (
    "first_stage={name: kl, base_channels: 16, channel_multipliers: [1, 2], num_res_blocks: 1, "
    "middle_attention: false}"
)


@dataclass(frozen=True)
class Task:
    """Settings of one task, and which of its inputs are the condition."""

    settings: tuple[str, ...]
    conditional: bool = True
    autoencoder: bool = False
    """Latents of a small KL-f2 autoencoder instead of pixels."""


TASKS = {
    "unconditional": Task(("diffusion.prediction=eps",), conditional=False),
    "text": Task((TEXT,)),
    "text_trained_jointly": Task((TAU,)),
    "class_as_context": Task((f"conditioning.class_label={{{CLASS}}}",)),
    "class_as_timestep": Task((f"conditioning.class_label={{{CLASS}, inject: timestep}}",)),
    "layout": Task((LAYOUT,)),
    "semantic_map": Task((SEMANTIC,)),
    "depth": Task(("conditioning.depth={}",)),
    "super_resolution": Task(("conditioning.low_resolution={factor: 2}",), autoencoder=True),
    "upscaler_with_noise": Task(
        ("conditioning.low_resolution={factor: 2, max_noise_level: 350}", TEXT), autoencoder=True
    ),
    "inpainting": Task(("conditioning.masked_image={full_mask_probability: 0.0}",), autoencoder=True),
    "text_and_layout_and_sizes": Task((TEXT, LAYOUT, "conditioning.image_size={width: 8}")),
}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    """One large object per picture, so that 200 steps are enough to learn what a condition says of it."""
    folder = tmp_path_factory.mktemp("shards")
    scene = SceneOptions(
        min_objects=1, max_objects=1, min_edge=32, max_edge=32, min_radius=0.34, max_radius=0.45, jitter=0
    )
    list(synthesize(str(folder), SynthesisOptions(samples=512, failed_share=0.0, maps=True, scene=scene)))
    return f"{folder}/*.tar"


@pytest.fixture(scope="module")
def group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A process group of one."""
    store = tmp_path_factory.mktemp("store") / "store"
    dist.init_process_group("gloo", store=dist.FileStore(str(store), 1), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def first_stage(shards: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Weights of the autoencoder, trained until its latents say what a picture shows."""
    path = tmp_path_factory.mktemp("first_stage") / "first_stage.safetensors"
    config = configuration(shards, str(path), path.parent, Task((), autoencoder=True))
    torch.manual_seed(0)
    stage = build_first_stage(config.first_stage)
    optimizer = torch.optim.Adam(stage.parameters(), lr=2e-3)
    with build_loader(config.data, seed=1, global_batch_size=16) as batches:
        for _ in range(FIRST_STAGE_STEPS):
            batch = next(batches)
            pixels = to_unit_range(batch.pixels)
            noise = normal(2, batch.ordinals, Purpose.POSTERIOR, (4, 16, 16))
            outputs = stage(pixels, noise)
            error = (outputs["reconstruction"] - pixels).square().mean()
            optimizer.zero_grad()
            (error + 1e-6 * outputs["kl"].mean()).backward()
            optimizer.step()
    assert float(error) < 0.05
    stage.set_latent_statistics(
        *measure_latent_statistics(stage.eval(), [pixels], lambda sums: sums, per_channel=True)
    )
    write_weights(str(path), *first_stage_tensors(stage))
    return str(path)


def configuration(shards: str, first_stage: str, folder: Path, task: Task) -> Config:
    settings = [
        f"run_dir={folder}/run",
        f"data.shards={shards}",
        f"data.image_size={32 if task.autoencoder else 16}",
        "data.workers=0",
        "data.require_caption=false",
        "global_batch_size=16",
        "micro_batch_size=16",
        f"steps={STEPS}",
        "unet={model_channels: 32, channel_multipliers: [1, 2], num_res_blocks: 1, attention_factors: [2], "
        "head_dim: 32, num_groups: 8}",
        "diffusion.prediction=v",
        "optimizer={learning_rate: 2e-3, warmup_steps: 10}",
        "distributed={engine: torch, precision: fp32, channels_last: false}",
        "sampling={steps: 3, guidance_scale: 2.0, num_previews: 2}",
        *((F2, f"first_stage.weights={first_stage}") if task.autoencoder else ("first_stage.name=identity",)),
        *task.settings,
    ]
    return load_config(None, settings)


def build_stage(config: Config) -> DiffusionStage:
    torch.manual_seed(config.seed)
    env = DistributedEnv.detect({})
    model = build_model(config)
    engines = {"unet": build_engine(model.network, config, env)}
    return DiffusionStage(config, engines, model.conditioner, model.first_stage, StepTimer(env.device))


@torch.no_grad()
def condition_gain(config: Config, stage: DiffusionStage, batch: Batch) -> float:
    """Loss under the neighbour's condition less loss under one's own, at equal noise and timesteps."""
    latents, inputs = stage._encode(batch, config.seed)
    shuffled = {name: value.roll(1, dims=0) for name, value in inputs.items()}
    keep = stage._conditioner.keep_masks(len(batch))
    schedule = make_schedule(config.diffusion)
    gain = 0.0
    for timestep in (500, 700, 900):
        timesteps = torch.full((len(batch),), timestep)
        noise = normal(1, batch.ordinals + timestep, Purpose.NOISE, tuple(latents.shape[1:]))
        noisy = add_noise(schedule, latents, noise, timesteps)
        own, other = (
            loss_per_sample(
                config.diffusion,
                schedule,
                stage.engines["unet"](noisy, timesteps, given, keep),
                latents,
                noise,
                timesteps,
            ).mean()
            for given in (inputs, shuffled)
        )
        gain += float(other - own) / float(own)
    return gain / 3


@pytest.mark.slow
@pytest.mark.parametrize("name", list(TASKS))
def test_task_learns(
    name: str, shards: str, group: None, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    task = TASKS[name]
    first_stage = request.getfixturevalue("first_stage") if task.autoencoder else ""
    config = configuration(shards, first_stage, tmp_path, task)
    with build_loader(config.data, seed=config.seed, global_batch_size=config.global_batch_size) as loader:
        batches = iter(loader)
        batch = next(batches)
        stage = build_stage(config)
        losses = []
        for step in range(STEPS):
            losses.append(float(stage.train_step(batch, step, config.optimizer.learning_rate)["loss"]))
            batch = next(batches)
        unseen = [next(batches) for _ in range(4)]
    first, last = sum(losses[:10]) / 10, sum(losses[-40:]) / 40
    assert last < 0.75 * first, (first, last)
    if task.conditional:
        gains = [condition_gain(config, stage, batch) for batch in unseen]
        assert sum(gains) / len(gains) > 0.01, gains
    preview = stage.preview(unseen[0])
    assert preview.pixels.shape == (2, 3, config.data.image_size, config.data.image_size)
    assert preview.pixels.dtype == torch.uint8
