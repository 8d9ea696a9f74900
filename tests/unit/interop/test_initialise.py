"""Starting a network from other weights."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from trainer.config.models import UNetConfig
from trainer.config.run import ConfigError
from trainer.interop.initialise import initialise
from trainer.interop.links import TransferReport
from trainer.models.unet import UNet

TINY = UNetConfig(
    model_channels=8,
    channel_multipliers=(1, 2),
    attention_factors=(2,),
    num_res_blocks=1,
    head_dim=4,
    num_groups=4,
)


class Network(nn.Module):
    """Like the trained network: the UNet beside trained conditions."""

    def __init__(self, unet: UNet, conditions: nn.Module) -> None:
        super().__init__()
        self.unet = unet
        self.conditions = conditions


def tiny(seed: int, config: UNetConfig = TINY, **sizes: int) -> UNet:
    torch.manual_seed(seed)
    unet = UNet(config, **{"in_channels": 4, "out_channels": 4, "context_dim": 6, **sizes})  # type: ignore[arg-type]
    for parameter in unet.parameters():
        nn.init.normal_(parameter, std=0.1)
    return unet


def prediction(unet: UNet, x: torch.Tensor, **conditions: torch.Tensor) -> torch.Tensor:
    context = torch.randn(2, 3, 6, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        return unet(x, torch.tensor([1, 500]), context, **conditions)


def test_the_same_structure_is_copied_whole() -> None:
    source, target = tiny(0), tiny(1)
    report = initialise(target, source.state_dict())
    assert set(report.taken) == set(source.state_dict())
    assert (report.new, report.left, report.widened) == ((), (), ())
    x = torch.randn(2, 4, 8, 8)
    assert torch.equal(prediction(source, x), prediction(target, x))


def test_added_input_channels_start_at_zero() -> None:
    source, target = tiny(0), tiny(1, in_channels=9)
    report = initialise(target, source.state_dict())
    assert report.widened == ("conv_in.weight",)
    x, mask = torch.randn(2, 4, 8, 8), torch.randn(2, 5, 8, 8)
    torch.testing.assert_close(prediction(target, torch.cat([x, mask], 1)), prediction(source, x))
    assert torch.equal(target.conv_in.weight[:, :4], source.conv_in.weight)
    assert not target.conv_in.weight[:, 4:].any()


def test_added_class_and_vector_conditions_change_nothing_at_first() -> None:
    source, target = tiny(0), tiny(1, num_classes=3, vector_dim=5)
    report = initialise(target, source.state_dict())
    assert {name.split(".")[0] for name in report.new} == {"class_embedding", "vector_embedding"}
    x = torch.randn(2, 4, 8, 8)
    got = prediction(target, x, class_labels=torch.tensor([0, 2]), vector=torch.randn(2, 5))
    torch.testing.assert_close(got, prediction(source, x))


def test_conditions_come_and_go() -> None:
    source = Network(tiny(0), nn.Linear(2, 2)).state_dict()
    target = Network(tiny(1), nn.Linear(3, 3, bias=False))
    before = target.conditions.weight.clone()  # type: ignore[union-attr, operator]
    with pytest.raises(ConfigError, match=r"conditions\.weight is \(2, 2\) and should be \(3, 3\)"):
        initialise(target, source)
    del source["conditions.weight"]
    report = initialise(target, source)
    assert report.new == ("conditions.weight",)
    assert report.left == ("conditions.bias",)
    assert torch.equal(target.conditions.weight, before)  # type: ignore[arg-type]


def test_a_bare_unet_fits_a_network_and_the_other_way_round() -> None:
    source = tiny(0)
    target = Network(tiny(1), nn.Identity())
    initialise(target, source.state_dict())
    assert torch.equal(target.unet.conv_in.weight, source.conv_in.weight)
    initialise(third := tiny(2), target.state_dict())
    assert torch.equal(third.conv_in.weight, source.conv_in.weight)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (tiny(0, replace(TINY, num_res_blocks=2)), r"unexpected down_blocks\.0\.resnets\.1"),
        (tiny(0, replace(TINY, attention_factors=())), r"missing down_blocks\.1\.attentions\.0"),
        (tiny(0, context_dim=5), r"to_kv\.weight is \(\d+, 5\) and should be"),
        (tiny(0, in_channels=9), r"conv_in\.weight is \(8, 9, 3, 3\) and should be \(8, 4, 3, 3\)"),
    ],
)
def test_another_structure_is_refused_and_nothing_is_copied(source: UNet, message: str) -> None:
    target = tiny(1)
    before = {name: tensor.clone() for name, tensor in target.state_dict().items()}
    with pytest.raises(ConfigError, match=message):
        initialise(target, source.state_dict(), "weights.safetensors")
    assert all(torch.equal(before[name], tensor) for name, tensor in target.state_dict().items())


def test_the_report_reads_well() -> None:
    report = TransferReport(
        taken=("a", "b"),
        widened=("conv_in.weight",),
        new=("class_embedding.weight",),
        left=tuple(f"model_ema.name{i}" for i in range(3)) + tuple(f"loss.x.{i}" for i in range(20)),
        files=("out/unet.safetensors",),
    )
    text = report.describe()
    assert text.splitlines()[0] == "taken: 2 tensors"
    assert "widened: 1 tensors: conv_in.weight" in text
    assert "loss.x.* (20)" in text
    assert text.splitlines()[-1] == "wrote out/unet.safetensors"
