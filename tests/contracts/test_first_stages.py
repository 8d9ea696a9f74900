"""What every entry of FIRST_STAGES promises the rest of the trainer."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from trainer.config.models import FirstStageConfig
from trainer.config.run import ConfigError
from trainer.first_stage.base import FirstStage
from trainer.first_stage.build import (
    FIRST_STAGES,
    build_first_stage,
    first_stage_tensors,
    load_first_stage,
)
from trainer.first_stage.statistics import measure_latent_statistics
from trainer.weights import read_weights, write_weights

TINY = FirstStageConfig(
    base_channels=8,
    channel_multipliers=(1, 2, 2),
    num_res_blocks=1,
    latent_channels=3,
    codebook_size=32,
    attention_factors=(2,),
)

pytestmark = pytest.mark.parametrize("name", sorted(FIRST_STAGES))


def tiny(name: str, **changes: object) -> FirstStageConfig:
    return dataclasses.replace(TINY, name=name, **changes)  # type: ignore[arg-type]


def build(name: str, **changes: object) -> FirstStage:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build_first_stage(tiny(name, **changes)).eval()


def pixels(batch: int = 2, height: int = 32, width: int = 48) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(batch, 3, height, width, generator=generator) * 2 - 1


def exported(name: str, folder: Path, **changes: object) -> FirstStageConfig:
    """A configuration whose weights file exists, with statistics that are not the identity."""
    module = build(name, **changes)
    module.set_latent_statistics(torch.tensor([0.1, 0.2, 0.3]), torch.tensor([2.0, 3.0, 4.0]))
    path = str(folder / "first_stage.safetensors")
    write_weights(path, *first_stage_tensors(module))
    return tiny(name, weights=path, **changes)


@torch.no_grad()
def test_shapes(name: str) -> None:
    module = build(name)
    config = module.config
    latents = module.latents(pixels(), None)
    f = config.downsampling
    assert latents.shape == (2, config.channels, 32 // f, 48 // f)
    assert latents.dtype == torch.float32
    assert module.decode(latents).shape == (2, 3, 32, 48)
    assert module.latent_shift.shape == module.latent_scale.shape == (config.channels,)


def test_it_can_be_built_without_memory(name: str) -> None:
    with torch.device("meta"):
        module = build_first_stage(dataclasses.replace(FirstStageConfig(), name=name))
    assert all(parameter.is_meta for parameter in module.parameters())


@torch.no_grad()
def test_noise_none_is_the_mode_and_repeatable(name: str) -> None:
    module = build(name)
    latents = module.latents(pixels(), None)
    assert torch.equal(latents, module.latents(pixels(), None))
    assert torch.equal(latents, module.latents(pixels(), torch.zeros_like(latents)))


@torch.no_grad()
def test_statistics_shift_and_scale_latents_and_decode_undoes_them(name: str) -> None:
    module = build(name)
    plain = module.latents(pixels(), None)
    picture = module.decode(plain)
    shift, scale = torch.tensor([0.5, -1.0, 2.0]), torch.tensor([2.0, 0.5, 4.0])
    module.set_latent_statistics(shift, scale)
    latents = module.latents(pixels(), None)
    expected = (plain - shift.view(1, 3, 1, 1)) * scale.view(1, 3, 1, 1)
    torch.testing.assert_close(latents, expected)
    torch.testing.assert_close(module.decode(latents), picture, rtol=1e-4, atol=1e-5)


def test_statistics_stay_float32_when_the_weights_are_cast(name: str) -> None:
    module = build(name)
    scale = torch.tensor([0.18215, 0.13025, 0.08333])
    module.set_latent_statistics(torch.zeros(3), scale)
    module.to(torch.bfloat16)
    assert torch.equal(module.latent_scale, scale)
    assert all(p.dtype == torch.bfloat16 for p in module.parameters())
    with torch.no_grad():
        latents = module.latents(pixels(), None)
        assert latents.dtype == torch.float32
        assert module.decode(latents).dtype == torch.float32


@torch.no_grad()
def test_measured_statistics_give_unit_variance(name: str) -> None:
    module = build(name)
    batches = [pixels(3), pixels(1).flip(-1)]
    whole = torch.cat([module.latents(b, None) for b in batches])
    shift, scale = measure_latent_statistics(module, batches, lambda x: x, per_channel=True)
    torch.testing.assert_close(shift, whole.mean(dim=(0, 2, 3)), rtol=1e-3, atol=1e-5)
    shift, scale = measure_latent_statistics(module, batches, lambda x: x, per_channel=False)
    assert torch.equal(shift, torch.zeros(3))
    assert torch.equal(scale, scale[:1].expand(3))
    # Ranks with different numbers of pictures agree on what one rank measures on all of them.
    sums: list[torch.Tensor] = []

    def record(x: torch.Tensor) -> torch.Tensor:
        sums.append(x)
        return x

    for batch in batches:
        measure_latent_statistics(module, [batch], record, per_channel=False)
    both = measure_latent_statistics(module, batches[:1], lambda _: sums[0] + sums[1], per_channel=False)
    torch.testing.assert_close(both[1], scale)


def test_saved_and_loaded_it_is_frozen_and_the_same(name: str, tmp_path: Path) -> None:
    if name == "identity":
        loaded = load_first_stage(tiny(name))
        assert not loaded.training
        return
    config = exported(name, tmp_path)
    for weights in (config.weights, str(tmp_path)):  # the file, or the folder it lies in
        loaded = load_first_stage(dataclasses.replace(config, weights=weights))
        assert not loaded.training
        assert not any(parameter.requires_grad for parameter in loaded.parameters())
        original = build(name)
        original.set_latent_statistics(torch.tensor([0.1, 0.2, 0.3]), torch.tensor([2.0, 3.0, 4.0]))
        with torch.no_grad():
            assert torch.equal(loaded.latents(pixels(), None), original.latents(pixels(), None))


def test_latent_scale_of_the_configuration_wins(name: str, tmp_path: Path) -> None:
    config = tiny(name) if name == "identity" else exported(name, tmp_path)
    loaded = load_first_stage(dataclasses.replace(config, latent_scale=0.18215))
    torch.testing.assert_close(loaded.latent_scale, torch.full((3,), 0.18215))
    assert torch.equal(loaded.latent_shift, torch.zeros(3))


def test_weights_that_do_not_fit_are_refused_by_name(name: str, tmp_path: Path) -> None:
    if name == "identity":
        pytest.skip("has no weights")
    config = exported(name, tmp_path)
    with pytest.raises(ConfigError, match=r"first_stage\.weights is not set"):
        load_first_stage(dataclasses.replace(config, weights=None))
    with pytest.raises(ConfigError, match=r"base_channels=8.*says 16"):
        load_first_stage(dataclasses.replace(config, base_channels=16))
    assert config.weights is not None
    tensors, _ = read_weights(config.weights)
    bare = {n: v for n, v in tensors.items() if not n.startswith("latent_")}
    write_weights(config.weights, bare, {})
    with pytest.raises(ConfigError, match=r"first_stage.latent_scale"):
        load_first_stage(config)
    assert load_first_stage(dataclasses.replace(config, latent_scale=1.0)) is not None
    del bare["encoder.conv_in.weight"]
    write_weights(config.weights, bare | {"surplus": torch.zeros(1)}, {})
    with pytest.raises(ConfigError, match=r"1 tensors missing, 1 unexpected"):
        load_first_stage(dataclasses.replace(config, latent_scale=1.0))


@torch.no_grad()
def test_chunks_change_nothing(name: str) -> None:
    whole, chunked = build(name), build(name, encode_chunk=2)
    x = pixels(5)
    latents = whole.latents(x, None)
    torch.testing.assert_close(chunked.latents(x, None), latents, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(chunked.decode(latents), whole.decode(latents), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_picture_of_one_tile_is_taken_whole(name: str) -> None:
    whole, tiled = build(name), build(name, tile_pixels=48)
    latents = whole.latents(pixels(), None)
    assert torch.equal(tiled.latents(pixels(), None), latents)
    assert torch.equal(tiled.decode(latents), whole.decode(latents))


@torch.no_grad()
def test_tiles_give_the_right_shape_for_odd_ratios(name: str) -> None:
    tiled = build(name, tile_pixels=16)
    latents = tiled.latents(pixels(1, 40, 56), None)
    f = tiled.config.downsampling
    assert latents.shape == (1, 3, 40 // f, 56 // f)
    assert tiled.decode(latents).shape == (1, 3, 40, 56)
    assert torch.isfinite(tiled.decode(latents)).all()


def test_training_forward_reaches_every_parameter(name: str) -> None:
    if name == "identity":
        pytest.skip("has no weights")
    module = build(name).train()
    noise = torch.randn(2, 3, 8, 12, generator=torch.Generator().manual_seed(0))
    outputs = module(pixels(), noise)
    loss = outputs["reconstruction"].square().sum() + sum(
        value.sum() for key, value in outputs.items() if key in ("kl", "codebook", "commitment")
    )
    loss.backward()
    assert [n for n, p in module.named_parameters() if p.grad is None] == []
    last = module.decoder.conv_out.weight
    assert last.shape == (3, 8, 3, 3)
    assert any(last is p for p in module.parameters())
    assert outputs["features"].shape == (2, 8, 32, 48)
