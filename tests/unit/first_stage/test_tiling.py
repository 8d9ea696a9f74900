"""Tiles: where they lie, how they blend, and that they agree with the whole picture."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from trainer.config.models import FirstStageConfig
from trainer.first_stage.autoencoders import AutoencoderKL
from trainer.first_stage.base import OVERLAP, apply_in_chunks, apply_in_tiles, tile_starts


@given(length=st.integers(1, 200), tile=st.integers(1, 40))
@settings(max_examples=200, deadline=None)
def test_tiles_cover_everything_and_overlap(length: int, tile: int) -> None:
    starts = tile_starts(length, tile)
    if length <= tile:
        assert starts == [0]
        return
    assert starts[0] == 0
    assert starts[-1] + tile == length
    strides = [b - a for a, b in itertools.pairwise(starts)]
    assert all(0 < stride <= max(1, int(tile * (1 - OVERLAP))) for stride in strides)


@pytest.mark.parametrize("divide", [True, False])
@pytest.mark.parametrize("size", [(16, 16), (40, 24), (7, 33)])
def test_a_pointwise_function_is_not_changed_by_tiles(size: tuple[int, int], divide: bool) -> None:
    """Averaging or repeating cells knows no neighbours, so tiles must reproduce it everywhere."""
    edges = [edge * 4 for edge in size] if divide else list(size)
    x = torch.randn(2, 3, *edges, generator=torch.Generator().manual_seed(0))

    def function(part: torch.Tensor) -> torch.Tensor:
        if divide:
            return F.avg_pool2d(part, 4)
        return F.interpolate(part, scale_factor=4.0, mode="nearest")

    tiled = apply_in_tiles(function, x, tile=8, scale=4, divide=divide)
    torch.testing.assert_close(tiled, function(x), rtol=1e-5, atol=1e-6)


def test_neighbouring_tiles_fade_into_each_other() -> None:
    """A function that returns another constant per tile must come out as a ramp, without a jump."""
    calls = iter([0.0, 1.0])
    x = torch.zeros(1, 1, 8, 14)
    tiled = apply_in_tiles(lambda p: torch.full_like(p, next(calls)), x, tile=8, scale=1, divide=False)
    row = tiled[0, 0, 4]
    assert torch.equal(row[:6], torch.zeros(6))
    assert torch.equal(row[8:], torch.ones(6))
    assert row[6] == pytest.approx(0.25)
    assert row[7] == pytest.approx(0.75)


class OnlyActivation(nn.Module):
    """In place of a group norm."""

    def forward(
        self, x: torch.Tensor, shift: torch.Tensor | None = None, *, silu: bool = False, fork: bool = False
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        assert shift is None
        y = nn.functional.silu(x) if silu else x
        return (x, y) if fork else y


def local_autoencoder(tile_pixels: int) -> AutoencoderKL:
    """Without normalisation and attention a pixel depends on its neighbourhood only."""
    torch.manual_seed(0)
    config = FirstStageConfig(
        base_channels=8,
        channel_multipliers=(1, 2),
        num_res_blocks=1,
        latent_channels=3,
        middle_attention=False,
        tile_pixels=tile_pixels,
    )
    module = AutoencoderKL(config).eval()
    for part in list(module.modules()):
        for name, child in list(part.named_children()):
            if isinstance(child, nn.GroupNorm):
                setattr(part, name, OnlyActivation())
    return module


@torch.no_grad()
def test_tiles_equal_the_whole_away_from_seams() -> None:
    whole, tiled = local_autoencoder(0), local_autoencoder(96)
    x = torch.rand(1, 3, 96, 168, generator=torch.Generator().manual_seed(1)) * 2 - 1
    latents = whole.latents(x, None)
    # Two tiles in latent columns 0..47 and 36..83: beyond their overlap each column comes from one tile,
    # but within a receptive field of its cut edge that tile saw padding instead of the picture.
    assert tile_starts(84, 48) == [0, 36]
    encoded = tiled.latents(x, None)
    difference = (encoded - latents).abs().amax(dim=(0, 1, 2))
    assert difference[:36].max() < 1e-5
    assert difference[48:].max() < 1e-5
    assert difference[36:48].max() > 1e-5  # so the comparison would see a difference
    assert difference.max() < 0.5 * latents.std()
    picture, in_tiles = whole.decode(latents), tiled.decode(latents)
    seam = (in_tiles - picture).abs().amax(dim=(0, 1, 2))
    assert seam[:72].max() < 1e-5
    assert seam[96:].max() < 1e-5


@torch.no_grad()
def test_normalised_networks_come_close() -> None:
    torch.manual_seed(0)
    config = FirstStageConfig(base_channels=8, channel_multipliers=(1, 2), num_res_blocks=1)
    whole = AutoencoderKL(config).eval()
    tiled = AutoencoderKL(dataclasses.replace(config, tile_pixels=64)).eval()
    tiled.load_state_dict(whole.state_dict())
    x = torch.rand(1, 3, 96, 96, generator=torch.Generator().manual_seed(1)) * 2 - 1
    expected, made = whole.latents(x, None), tiled.latents(x, None)
    assert (made - expected).square().mean() < 0.05 * expected.var()


def test_chunks_are_as_small_as_asked() -> None:
    sizes: list[int] = []

    def function(part: torch.Tensor) -> torch.Tensor:
        sizes.append(len(part))
        return part + 1

    x = torch.arange(5.0)
    assert torch.equal(apply_in_chunks(function, x, 2), x + 1)
    assert sizes == [2, 2, 1]
    apply_in_chunks(function, x, 0)
    assert sizes[-1] == 5
