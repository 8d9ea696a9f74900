"""The builder: where networks are built, and which random numbers are drawn."""

from __future__ import annotations

import torch
from torch import nn

from trainer.config.io import load_config
from trainer.config.run import Config
from trainer.model import build_autoencoder, build_model
from trainer.weights import Undrawn

CONFIG = [
    "data.image_size=16",
    "first_stage.name=identity",
    "unet={model_channels: 16, channel_multipliers: [1, 2], num_res_blocks: 1, attention_factors: [2], "
    "head_dim: 16, num_groups: 4}",
    "conditioning.class_label={num_classes: 4, width: 16}",
]


def config(*settings: str) -> Config:
    return load_config(None, [*CONFIG, *settings])


def test_weights_follow_the_seed_alone_and_naming_the_cpu_changes_nothing() -> None:
    torch.manual_seed(3)
    first = build_model(config()).network.state_dict()
    torch.manual_seed(3)
    second = build_model(config(), torch.device("cpu")).network.state_dict()
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_weights_about_to_be_loaded_are_not_drawn_and_zeros_stay() -> None:
    state = torch.get_rng_state()
    network = build_model(config(), fresh=False).network
    assert torch.equal(torch.get_rng_state(), state) is False  # conditions are
    torch.manual_seed(0)
    drawn = build_model(config()).network.state_dict()
    found = network.state_dict()
    assert {n: v.shape for n, v in found.items()} == {n: v.shape for n, v in drawn.items()}
    zeros = [name for name, value in drawn.items() if not value.any()]
    assert zeros
    assert not any(found[name].any() for name in zeros)


def test_undrawn_leaves_constants_alone() -> None:
    state = torch.get_rng_state()
    with Undrawn():
        made = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Embedding(5, 4))
        nn.init.trunc_normal_(made[0].weight)
        nn.init.xavier_uniform_(made[0].weight)
        nn.init.normal_(made[2].weight)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(made[1].weight, torch.ones(4))


def test_a_first_stage_in_training_is_built_on_the_default_device() -> None:
    with torch.device("meta"):
        networks = build_autoencoder(config("stage=autoencoder", "first_stage.name=kl", "data.image_size=64"))
    assert {p.device.type for network in networks.values() for p in network.parameters()} == {"meta"}
