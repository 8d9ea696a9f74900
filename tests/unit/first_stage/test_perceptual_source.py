"""Which network the perceptual distance uses, and that it says so."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import safetensors.torch
import torch

from trainer.config.run import ConfigError
from trainer.config.training import AutoencoderLossConfig
from trainer.first_stage import perceptual
from trainer.first_stage.perceptual import LAYERS, build_perceptual, load_perceptual


@pytest.fixture
def torch_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    return tmp_path


def torchvision_tensors() -> dict[str, torch.Tensor]:
    """The convolutions of a VGG16 under torchvision's names, and a classifier that is not needed."""
    numbers = [0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28]
    widths = [3, *(width for stage in LAYERS for width in stage)]
    tensors = {"classifier.6.bias": torch.zeros(10)}
    for i, number in enumerate(numbers):
        shape = (widths[i + 1], widths[i], 3, 3)
        tensors[f"features.{number}.weight"] = torch.full(shape, 0.01 + 0.001 * i)
        tensors[f"features.{number}.bias"] = torch.zeros(widths[i + 1])
    return tensors


def test_random_is_a_word_and_says_so(torch_home: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        distance = build_perceptual(AutoencoderLossConfig(perceptual_weights="random"))
    assert distance is not None
    assert not distance.is_lpips
    assert "random-features" in distance.name
    assert "not LPIPS" in distance.name
    assert distance.name in caplog.text
    again = load_perceptual("random")
    pairs = zip(distance.network.parameters(), again.network.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert not any(p.requires_grad for p in distance.parameters())


def test_without_weights_it_is_refused_with_where_to_put_them(torch_home: Path) -> None:
    with pytest.raises(ConfigError, match=r"autoencoder_loss\.perceptual_weights=random") as error:
        build_perceptual(AutoencoderLossConfig())
    assert str(torch_home / "hub/checkpoints/vgg16-397923af.pth") in str(error.value)
    with pytest.raises(ConfigError, match=r"VGG16.* by --perceptual-weights, or put it"):
        load_perceptual(None, "--perceptual-weights")


def test_weight_zero_builds_nothing() -> None:
    assert build_perceptual(AutoencoderLossConfig(perceptual_weight=0.0)) is None


@pytest.mark.parametrize("name", ["vgg16.pth", "vgg16.safetensors", None])
def test_vgg16_from_a_file_or_torchvisions_cache(torch_home: Path, name: str | None) -> None:
    tensors = torchvision_tensors()
    if name is None:
        path = torch_home / "hub" / "checkpoints" / perceptual.CACHE_NAME
        path.parent.mkdir(parents=True)
    else:
        path = torch_home / name
    if path.suffix == ".safetensors":
        safetensors.torch.save_file(tensors, path)
    else:
        torch.save(tensors, path)
    distance = load_perceptual(None if name is None else str(path))
    assert distance.name == "lpips-vgg16"
    assert distance.is_lpips
    first, last = distance.network.stages[0][0], distance.network.stages[4][2]  # type: ignore[index]
    assert torch.equal(first.weight, tensors["features.0.weight"])
    assert torch.equal(last.weight, tensors["features.28.weight"])
    assert [w.shape[1] for w in (distance.weights_0, distance.weights_4)] == [64, 512]
    assert not any(p.requires_grad for p in distance.parameters())


def test_files_that_are_not_vgg16_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="perceptual_weights: there is no weights file"):
        load_perceptual(str(tmp_path / "missing.pth"))
    broken = tmp_path / "broken.pth"
    broken.write_bytes(b"not a checkpoint")
    with pytest.raises(ConfigError, match=r"is no weights file"):
        load_perceptual(str(broken))
    other = tmp_path / "other.safetensors"
    safetensors.torch.save_file({"x": torch.zeros(1)}, other)
    with pytest.raises(ConfigError, match=r"missing features\.0\.weight"):
        load_perceptual(str(other))
