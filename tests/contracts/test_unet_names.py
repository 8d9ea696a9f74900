"""What the name tables of interop keep: a word for every parameter, and a refusal where there is none."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from trainer.config.io import load_config
from trainer.config.models import UNetConfig
from trainer.config.network_plan import UNetLevel
from trainer.config.run import ConfigError
from trainer.interop.export import export_weights
from trainer.interop.unet_names import Dialect, UNetSizes, unet_links
from trainer.models.unet import ATTENTIONS, UNet

SMALL = UNetConfig(
    model_channels=32,
    channel_multipliers=(1, 2),
    num_res_blocks=1,
    attention_factors=(2, 1),
    head_dim=16,
    num_groups=8,
)
SIZES = UNetSizes(in_channels=4, out_channels=4, context_dim=8, vector_dim=6, num_classes=3)
every_dialect = pytest.mark.parametrize("dialect", ["diffusers", "compvis"])


class Gate(nn.Module):
    """A block that no other program has: one number per channel."""

    def __init__(self, config: UNetConfig, level: UNetLevel, context_dim: int | None) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.ones(level.channels))

    def forward(self, x: Tensor, context: Tensor | None) -> Tensor:
        return x * self.gate.view(1, -1, 1, 1)


@every_dialect
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"projection": "conv", "cross_attention_only": (True, False)},
        {"attention": "plain", "scale_shift_norm": True},
        {"resblock_updown": True},
    ],
)
def test_every_parameter_has_a_name_of_its_own(dialect: Dialect, changes: dict[str, object]) -> None:
    config = replace(SMALL, **changes)  # type: ignore[arg-type]
    sizes = SIZES if config.attention == "transformer" else UNetSizes(4, 4)
    names = [name for name, _ in sizes.build(config).named_parameters()]
    links = unet_links(config, names, dialect)
    assert [link.ours for link in links] == names
    theirs = [name for link in links for name in link.theirs]
    assert len(theirs) == len(set(theirs)) >= len(names)


@every_dialect
def test_a_block_without_a_name_is_refused(dialect: Dialect, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ATTENTIONS, "gate", Gate)
    config = replace(SMALL, attention="gate")  # type: ignore[arg-type]
    names = [name for name, _ in SIZES.build(config).named_parameters()]
    with pytest.raises(ConfigError, match=rf"{dialect} name for down_blocks\.0\.attentions\.0\.gate"):
        unet_links(config, names, dialect)


@every_dialect
@pytest.mark.parametrize(
    "name", ["down_blocks.0.resnets.0.conv3.weight", "mid_block.gate.weight", "style.weight"]
)
def test_so_is_any_other_layer(name: str, dialect: Dialect) -> None:
    with pytest.raises(ConfigError, match=name.replace(".", r"\.")):
        unet_links(SMALL, [name], dialect)


@every_dialect
def test_nothing_is_written_then(dialect: Dialect, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(ATTENTIONS, "gate", Gate)
    gated = replace(SMALL, attention="gate")  # type: ignore[arg-type]
    config = replace(load_config(None, ["first_stage.name=identity"]), unet=gated)
    unet = UNet(config.unet, in_channels=3, out_channels=3)
    tensors = {f"unet.{name}": value for name, value in unet.state_dict().items()}
    destination = tmp_path / ("out.safetensors" if dialect == "compvis" else "out")
    with pytest.raises(ConfigError, match="gate"):
        export_weights(tensors, str(destination), config, dialect)
    assert not destination.exists()
