"""No untrained network stands in for one that nobody named: what each command says, what `random` does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from data_pipeline.tools.scenes.scene import SceneOptions
from data_pipeline.tools.scenes.write_shards import SynthesisOptions, synthesize
from trainer.__main__ import main
from trainer.config.io import config_to_dict, load_config
from trainer.config.run import ConfigError
from trainer.distributed.env import DistributedEnv, initialise, shutdown
from trainer.doctor.inputs import check_networks
from trainer.first_stage.build import build_first_stage, first_stage_tensors
from trainer.launch.slurm import submit
from trainer.launch.slurm_job import prepare
from trainer.model import build_model
from trainer.weights import write_weights

SD2 = "configs/sd/sd2_base_256.yaml"
WEIGHTS, TAG = "first_stage.weights=kl.safetensors", "conditioning.openclip.pretrained=laion2b_s32b_b79k"
TINY = [
    "data.image_size=16",
    "first_stage.name=identity",
    "unet={model_channels: 16, channel_multipliers: [1, 2], num_res_blocks: 1, attention_factors: [2], "
    "head_dim: 16, num_groups: 4}",
    "conditioning.openclip={model: ViT-B-32, width: 16, layers: 1, heads: 2, context_length: 8, layer: last}",
    "sampling={steps: 2, guidance_scale: 3.0}",
]
MISSING = [
    ([WEIGHTS], "conditioning.openclip.pretrained is not set"),
    ([TAG], "first_stage.weights is not set"),
    ([WEIGHTS, TAG, "conditioning.openclip_second={}"], "conditioning.openclip_second.pretrained is not set"),
]


@pytest.mark.parametrize(("overrides", "sentence"), MISSING)
@pytest.mark.parametrize("verb", ["train", "doctor"])
def test_training_names_every_network(
    verb: str, overrides: list[str], sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "run"
    assert main([verb, SD2, f"run_dir={run_dir}", "data.shards=x/*.tar", *overrides]) == 2
    error = capsys.readouterr().err.strip()
    assert sentence in error
    assert "\n" not in error
    assert not run_dir.exists()


@pytest.mark.parametrize(("overrides", "sentence"), MISSING)
def test_launchers_refuse_before_anything_waits_in_a_queue(
    overrides: list[str], sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ConfigError, match=sentence):
        submit(SD2, overrides, [])
    with pytest.raises(ConfigError, match=sentence):
        prepare(tmp_path / "job", Path.cwd(), [SD2, *overrides])
    assert not (tmp_path / "job").exists()
    pytest.importorskip("ray")
    from trainer.launch import ray

    assert ray.main([SD2, "--workers", "1", *overrides]) == 2
    assert sentence in capsys.readouterr().err


def test_what_reads_no_weights_needs_none(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", SD2]) == 0
    assert (
        main(["params", SD2, "conditioning.openclip={model: ViT-B-32}", "conditioning.openclip_second={}"])
        == 0
    )


def network_file(folder: Path, pretrained: str | None, **metadata: str) -> str:
    """A second stage of seeded weights, whose configuration says this about its tower."""
    config = load_config(None, [*TINY, "conditioning.openclip.pretrained=random"])
    torch.manual_seed(0)
    network: nn.Module = build_model(config).network
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.05)
    stored: dict[str, Any] = config_to_dict(config)
    stored["conditioning"]["openclip"]["pretrained"] = pretrained
    url = str(folder / f"{pretrained}.safetensors")
    write_weights(url, network.state_dict(), {"config": json.dumps(stored), **metadata})
    return url


def test_a_checkpoint_from_before_the_word_samples_with_the_tower_it_was_trained_with(tmp_path: Path) -> None:
    pictures = []
    for pretrained in (None, "random"):
        source, out = network_file(tmp_path, pretrained, network="unet"), tmp_path / f"of-{pretrained}"
        assert main(["sample", source, "--prompt", "a red circle", "--out", str(out)]) == 0
        (file,) = out.rglob("00000.png")
        pictures.append(np.asarray(Image.open(file)))
    assert (pictures[0] == pictures[1]).all()


def test_an_imported_network_without_its_tower_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = network_file(tmp_path, None)  # `ldm import` of a UNet alone: it was trained with some tower
    assert main(["sample", source, "--prompt", "a red circle", "--out", str(tmp_path / "out")]) == 2
    assert "conditioning.openclip.pretrained is not set" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("shards")
    scene = SceneOptions(min_edge=32, max_edge=40)
    list(synthesize(str(folder), SynthesisOptions(samples=8, failed_share=0.0, scene=scene)))
    return f"{folder}/*.tar"


@pytest.fixture
def first_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """An exported first stage; torch's cache is empty."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    settings = ["first_stage={base_channels: 8, channel_multipliers: [1, 2], num_res_blocks: 1}"]
    module = build_first_stage(load_config(None, settings).first_stage)
    module.set_latent_statistics(torch.zeros(4), torch.ones(4))
    url = str(tmp_path / "first_stage.safetensors")
    write_weights(url, *first_stage_tensors(module))
    return url


def test_evaluation_refuses_what_would_be_no_lpips(
    first_stage: str, pictures: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "figures.json"
    command = ["evaluate", "reconstruction", first_stage, "--shards", pictures, "--samples", "4"]
    command += ["--image-size", "32", "--out", str(out)]
    assert main(command) == 2
    error = capsys.readouterr().err
    assert "--perceptual-weights=random takes random features, which are not LPIPS" in error
    assert not out.exists()
    assert main([*command, "--perceptual-weights", "random"]) == 0
    figures = json.loads(out.read_text())
    assert "psim" not in figures
    assert figures["random_features"] > 0
    assert "not LPIPS" in figures["perceptual_network"]
    assert (figures["weights"], figures["image_size"]) == (first_stage, 32)
    assert "perceptual network: random-features" in capsys.readouterr().out
    assert main([*command, "--perceptual-weights", "none"]) == 0
    figures = json.loads(out.read_text())
    assert figures["perceptual_network"] == "none"
    assert "random_features" not in figures


def test_the_doctor_says_which_networks_there_are(first_stage: str, tmp_path: Path) -> None:
    env = DistributedEnv.detect({})
    initialise(env, 60.0)
    try:
        wanted = [
            (["first_stage.weights=/nowhere.safetensors"], False, "first_stage.weights=/nowhere"),
            ([f"first_stage.weights={first_stage}", *TINY[3:4]], False, "openclip.pretrained is not set"),
            (
                [f"first_stage.weights={first_stage}", *TINY[3:4], "conditioning.openclip.pretrained=random"],
                True,
                "ViT-B-32 with random weights",
            ),
            (["stage=autoencoder"], False, "there are no weights for LPIPS"),
            (["stage=autoencoder", "autoencoder_loss.perceptual_weights=random"], True, "not LPIPS"),
        ]
        for settings, passed, detail in wanted:
            (check,) = check_networks(load_config(None, settings), env)
            assert (check.passed, detail in check.detail) == (passed, True), check
    finally:
        shutdown()
