"""The validation loss is the same number at any number of ranks, micro-batch and ZeRO stage."""

from __future__ import annotations

from pathlib import Path

import pytest

from data_pipeline.tools.scenes.scene import NUM_CLASSES, SceneOptions
from data_pipeline.tools.scenes.write_shards import SynthesisOptions, synthesize
from tests.integration.ranks import run_ranks

MEASURE = "tests/integration/validation_ranks.py:several"
UNET = (
    "unet={model_channels: 8, channel_multipliers: [1], num_res_blocks: 1, attention_factors: [1], "
    "head_dim: 8, num_groups: 4}"
)
DIFFUSION = [
    "first_stage.name=identity",
    UNET,
    f"conditioning.class_label={{num_classes: {NUM_CLASSES}, width: 16, drop_probability: 0.5}}",
    "diffusion.offset_noise=0.1",
    "diffusion.learned_uncertainty=true",
]
AUTOENCODER = [
    "stage=autoencoder",
    "first_stage={name: vq, base_channels: 8, channel_multipliers: [1, 2], num_res_blocks: 1, "
    "latent_channels: 3, codebook_size: 16}",
    "autoencoder_loss={perceptual_weight: 0.1, perceptual_weights: random, discriminator_weight: 0}",
    "validation.features=random",
]
TORCH = {"engine": "torch", "zero_stage": 0}


@pytest.fixture(scope="module", name="shards")
def shards_fixture(tmp_path_factory: pytest.TempPathFactory) -> str:
    """60 small pictures in 3 shards, each with a class."""
    folder = tmp_path_factory.mktemp("shards")
    options = SynthesisOptions(
        samples=60, samples_per_shard=20, scene=SceneOptions(max_objects=1, min_edge=20, max_edge=28)
    )
    list(synthesize(str(folder), options))
    return f"{folder}/*.tar"


def settings(shards: str, folder: Path, name: str, micro: int, stage: list[str], layout: dict) -> list[str]:
    given = ", ".join(f"{key}: {value}" for key, value in layout.items())
    return [
        f"run_dir={folder / name}",
        f"data={{shards: '{shards}', image_size: 16, workers: 0, validation: {{share: 0.4}}}}",
        "global_batch_size=12",
        f"micro_batch_size={micro}",
        "validation={every: 1, samples: 14, timesteps: 3}",
        f"distributed={{precision: fp32, channels_last: false, {given}}}",
        "checkpoint.asynchronous=false",
        "logging={wandb: disabled, progress_bar: false}",
        *stage,
    ]


@pytest.mark.parametrize(
    "stage", [DIFFUSION, pytest.param(AUTOENCODER, marks=pytest.mark.slow)], ids=["diffusion", "autoencoder"]
)
def test_the_figures_do_not_depend_on_ranks_or_micro_batch(
    shards: str, tmp_path: Path, stage: list[str]
) -> None:
    found = {}
    for ranks, micro_batches in ((1, (4, 3)), (2, (2, 3)), (3, (4, 2))):
        runs = {
            f"{ranks}-{micro}": settings(shards, tmp_path, f"{ranks}-{micro}", micro, stage, TORCH)
            for micro in micro_batches
        }
        of_ranks = run_ranks(MEASURE, ranks, {"runs": runs})
        assert all(other == of_ranks[0] for other in of_ranks), "all ranks have the same figures"
        found |= of_ranks[0]
    assert found["3-4"] == found["1-4"], "bit for bit: the batches are the same"
    assert found["2-3"] == found["1-3"]
    assert found["3-2"] == found["2-2"]
    for other in found.values():
        assert other == pytest.approx(found["1-4"], rel=2e-6)
    figures = found["1-4"]
    assert figures["validation/samples"] == 14
    assert ("validation/rfd_random" in figures) == (stage is AUTOENCODER)
    name = "loss" if stage is DIFFUSION else "reconstruction"
    assert figures[f"validation/raw_{name}"] != pytest.approx(figures[f"validation/{name}"], rel=1e-3)
    assert 0 < figures[f"validation/{name}_stderr"] < figures[f"validation/{name}"]


@pytest.mark.slow
@pytest.mark.parametrize("stage", [DIFFUSION, AUTOENCODER], ids=["diffusion", "autoencoder"])
def test_the_figures_do_not_depend_on_the_engine(shards: str, tmp_path: Path, stage: list[str]) -> None:
    layouts = {
        "torch": TORCH,
        **{f"zero-{zero}": {"engine": "deepspeed", "zero_stage": zero} for zero in range(4)},
        "fsdp": {"engine": "fsdp"},
    }
    runs = {name: settings(shards, tmp_path, name, 2, stage, layout) for name, layout in layouts.items()}
    found = run_ranks(MEASURE, 2, {"runs": runs})[0]
    assert found["torch"]["validation/samples"] == 14
    for name in runs:
        assert found[name] == pytest.approx(found["torch"], rel=1e-6), name
