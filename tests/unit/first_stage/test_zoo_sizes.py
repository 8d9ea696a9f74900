"""Parameter counts of the published first stages, and where their attention sits."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

from trainer.config.models import FirstStageConfig
from trainer.config.network_plan import norm_groups
from trainer.config.run import ConfigError
from trainer.first_stage.base import FirstStage
from trainer.first_stage.build import build_first_stage
from trainer.first_stage.networks import SpatialAttention


def on_meta(config: FirstStageConfig) -> FirstStage:
    with torch.device("meta"):
        return build_first_stage(config)


def attention_places(module: nn.Module) -> list[str]:
    return [name for name, part in module.named_modules() if isinstance(part, SpatialAttention)]


def test_stable_diffusion_vae_has_its_published_size() -> None:
    module = on_meta(FirstStageConfig())
    assert sum(p.numel() for p in module.parameters()) == 83_653_863
    assert sum(p.numel() for p in module.encoder.parameters()) + sum(
        p.numel() for p in module.quant_conv.parameters()
    ) == pytest.approx(34.16e6, rel=1e-3)


@pytest.mark.parametrize(
    ("multipliers", "z", "factors", "latent"),
    [
        ((1, 2, 4), 3, (), (3, 64, 64)),
        ((1, 2, 4, 4), 4, (), (4, 32, 32)),
        ((1, 1, 2, 2, 4), 16, (16,), (16, 16, 16)),
        ((1, 1, 2, 2, 4, 4), 64, (16, 32), (64, 8, 8)),
    ],
)
def test_latent_grids_of_the_kl_zoo(
    multipliers: tuple[int, ...], z: int, factors: tuple[int, ...], latent: tuple[int, ...]
) -> None:
    config = FirstStageConfig(channel_multipliers=multipliers, latent_channels=z, attention_factors=factors)
    module = on_meta(config)
    with torch.device("meta"):
        latents = module.latents(torch.empty(1, 3, 256, 256), None)
        assert latents.shape[1:] == latent
        assert module.decode(latents).shape == (1, 3, 256, 256)


def test_attention_sits_at_its_downsampling_factor_in_both_halves() -> None:
    config = FirstStageConfig(
        name="vq", channel_multipliers=(1, 2, 2, 4), latent_channels=4, attention_factors=(8,)
    )
    assert attention_places(on_meta(config)) == [
        "encoder.down_blocks.3.attentions.0",
        "encoder.down_blocks.3.attentions.1",
        "encoder.mid_block.attentions.0",
        "decoder.mid_block.attentions.0",
        "decoder.up_blocks.0.attentions.0",
        "decoder.up_blocks.0.attentions.1",
        "decoder.up_blocks.0.attentions.2",
    ]


def test_no_attention_at_all() -> None:
    config = FirstStageConfig(name="vq", channel_multipliers=(1, 2, 4), middle_attention=False)
    assert attention_places(on_meta(config)) == []


@pytest.mark.parametrize(("channels", "groups"), [(128, 32), (256, 32), (64, 16), (16, 4), (4, 1)])
def test_small_networks_keep_four_channels_per_group(channels: int, groups: int) -> None:
    assert norm_groups(FirstStageConfig(base_channels=channels)) == groups


def test_groups_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"first_stage\.num_groups"):
        norm_groups(FirstStageConfig(base_channels=48, num_groups=32))


@torch.no_grad()
def test_a_flat_colour_survives_normalisation() -> None:
    """Two flat pictures that differ only in brightness must have different latents."""
    torch.manual_seed(0)
    config = FirstStageConfig(base_channels=16, channel_multipliers=(1, 2), num_res_blocks=1)
    module = build_first_stage(dataclasses.replace(config, middle_attention=False)).eval()
    dark, bright = (module.latents(torch.full((1, 3, 32, 32), v), None) for v in (-0.5, 0.5))
    assert float((dark - bright)[..., 4:-4, 4:-4].abs().mean()) > 1e-2
