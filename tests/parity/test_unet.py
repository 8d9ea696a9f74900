"""Our UNet against diffusers' with the same random weights, carried over by our own export, in fp32."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from trainer.config.models import UNetConfig
from trainer.interop.diffusers_unet import unet_from_diffusers, unet_to_diffusers
from trainer.interop.links import export_tensors
from trainer.interop.unet_names import UNetSizes, unet_links
from trainer.models.unet import UNet
from trainer.weights import check_fit, shapes_of

diffusers = pytest.importorskip("diffusers")

TOLERANCE = 1e-5
"""Largest error relative to the largest value of a tensor."""


@dataclass(frozen=True)
class Structure:
    """A published UNet as diffusers describes it, at reduced width, and the same in our words."""

    json: dict[str, Any]
    config: UNetConfig
    sizes: UNetSizes
    reduced: dict[str, Any] = field(default_factory=dict)
    """Changes to `json` that make it small."""

    @property
    def small(self) -> dict[str, Any]:
        return {**self.json, **self.reduced}


SD = {
    "_class_name": "UNet2DConditionModel",
    "sample_size": 64,
    "in_channels": 4,
    "out_channels": 4,
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
    "block_out_channels": [320, 640, 1280, 1280],
    "layers_per_block": 2,
    "norm_num_groups": 32,
}
SMALL = {"block_out_channels": [32, 64, 128, 128], "norm_num_groups": 8, "cross_attention_dim": 24}
SD1_JSON = {**SD, "cross_attention_dim": 768, "attention_head_dim": 8, "use_linear_projection": False}
SD2_JSON = {
    **SD,
    "cross_attention_dim": 1024,
    "attention_head_dim": [5, 10, 20, 20],
    "use_linear_projection": True,
}

STRUCTURES = {
    "sd1": Structure(
        SD1_JSON,
        UNetConfig(
            attention_factors=(1, 2, 4),
            num_heads=8,
            head_dim=None,
            projection="conv",
            transformer_depth=(1,) * 4,
        ),
        UNetSizes(4, 4, 768),
        SMALL,
    ),
    "sd2": Structure(
        SD2_JSON,
        UNetConfig(attention_factors=(1, 2, 4), transformer_depth=(1,) * 4),
        UNetSizes(4, 4, 1024),
        {**SMALL, "attention_head_dim": [4, 8, 16, 16]},
    ),
    "sd2-inpaint": Structure(
        {**SD2_JSON, "in_channels": 9},
        UNetConfig(attention_factors=(1, 2, 4), transformer_depth=(1,) * 4),
        UNetSizes(9, 4, 1024),
        {**SMALL, "attention_head_dim": [4, 8, 16, 16]},
    ),
    "x4-upscaler": Structure(
        {
            **SD1_JSON,
            "in_channels": 7,
            "sample_size": 128,
            "down_block_types": ["DownBlock2D"] + ["CrossAttnDownBlock2D"] * 3,
            "up_block_types": ["CrossAttnUpBlock2D"] * 3 + ["UpBlock2D"],
            "block_out_channels": [256, 512, 512, 1024],
            "cross_attention_dim": 1024,
            "use_linear_projection": True,
            "only_cross_attention": [True, True, True, False],
            "num_class_embeds": 1000,
        },
        UNetConfig(
            model_channels=256,
            channel_multipliers=(1, 2, 2, 4),
            attention_factors=(2, 4, 8),
            num_heads=8,
            head_dim=None,
            transformer_depth=(1, 1, 1, 1),
            cross_attention_only=(True, True, True, False),
        ),
        UNetSizes(7, 4, 1024, num_classes=1000),
        {**SMALL, "block_out_channels": [32, 64, 64, 128], "num_class_embeds": 10},
    ),
    "sdxl": Structure(
        {
            **SD,
            "sample_size": 128,
            "down_block_types": ["DownBlock2D"] + ["CrossAttnDownBlock2D"] * 2,
            "up_block_types": ["CrossAttnUpBlock2D"] * 2 + ["UpBlock2D"],
            "block_out_channels": [320, 640, 1280],
            "cross_attention_dim": 2048,
            "attention_head_dim": [5, 10, 20],
            "transformer_layers_per_block": [1, 2, 10],
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        },
        UNetConfig(channel_multipliers=(1, 2, 4), attention_factors=(2, 4), transformer_depth=(1, 2, 10)),
        UNetSizes(4, 4, 2048, vector_dim=2816),
        {
            **SMALL,
            "block_out_channels": [32, 64, 128],
            "attention_head_dim": [4, 8, 16],
            "transformer_layers_per_block": [1, 2, 3],
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 6 * 8 + 5,
        },
    ),
    "ldm-unconditional": Structure(
        {
            "_class_name": "UNet2DModel",
            "sample_size": 64,
            "in_channels": 3,
            "out_channels": 3,
            "down_block_types": ["DownBlock2D"] + ["AttnDownBlock2D"] * 3,
            "up_block_types": ["AttnUpBlock2D"] * 3 + ["UpBlock2D"],
            "block_out_channels": [224, 448, 672, 896],
            "layers_per_block": 2,
            "attention_head_dim": 32,
            "norm_num_groups": 32,
        },
        UNetConfig(
            model_channels=224,
            channel_multipliers=(1, 2, 3, 4),
            attention_factors=(2, 4, 8),
            attention="plain",
            head_dim=32,
        ),
        UNetSizes(3, 3),
        {"block_out_channels": [32, 64, 96, 128], "attention_head_dim": 8, "norm_num_groups": 8},
    ),
    "ldm-scale-shift-resblocks": Structure(
        {
            "_class_name": "UNet2DModel",
            "sample_size": 32,
            "in_channels": 4,
            "out_channels": 4,
            "down_block_types": ["AttnDownBlock2D", "ResnetDownsampleBlock2D", "AttnDownBlock2D"],
            "up_block_types": ["AttnUpBlock2D", "ResnetUpsampleBlock2D", "AttnUpBlock2D"],
            "block_out_channels": [192, 384, 768],
            "layers_per_block": 2,
            "attention_head_dim": 24,
            "norm_num_groups": 32,
            "downsample_type": "resnet",
            "upsample_type": "resnet",
            "resnet_time_scale_shift": "scale_shift",
            "attn_norm_num_groups": 32,
            "num_class_embeds": 11,
        },
        UNetConfig(
            model_channels=192,
            channel_multipliers=(1, 2, 4),
            attention_factors=(1, 4),
            attention="plain",
            head_dim=24,
            scale_shift_norm=True,
            resblock_updown=True,
        ),
        UNetSizes(4, 4, num_classes=11),
        {
            "block_out_channels": [32, 64, 128],
            "attention_head_dim": 8,
            "norm_num_groups": 8,
            "attn_norm_num_groups": 8,
        },
    ),
}


def reference(json: dict[str, Any]) -> nn.Module:
    arguments = {name: value for name, value in json.items() if name != "_class_name"}
    return getattr(diffusers, json["_class_name"])(**arguments)


def randomise(unet: nn.Module) -> None:
    """Every parameter random and of a size that keeps activations near one."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in unet.named_parameters():
            if p.dim() == 1:
                centre = 1.0 if "norm" in name and name.endswith("weight") else 0.0
                p.copy_(centre + 0.1 * torch.randn(p.shape, generator=generator))
            else:
                p.copy_(torch.randn(p.shape, generator=generator) / p[0].numel() ** 0.5)


def pair(name: str) -> tuple[UNet, nn.Module, UNetConfig, UNetSizes]:
    """Ours and theirs with the same weights, at reduced width."""
    described = unet_from_diffusers(STRUCTURES[name].small)
    sizes = described.sizes
    ours = sizes.build(described.config).to_empty(device="cpu")
    randomise(ours)
    theirs = reference(STRUCTURES[name].small)
    theirs.load_state_dict(
        export_tensors(unet_links(described.config, ours.state_dict(), "diffusers"), ours.state_dict()),
        strict=True,
    )
    return ours.train(), theirs.train(), described.config, sizes


def make_inputs(sizes: UNetSizes, size: tuple[int, int]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    values = {
        "x": torch.randn(2, sizes.in_channels, *size, generator=generator).requires_grad_(),
        "timesteps": torch.tensor([17, 803]),
        "target": torch.randn(2, sizes.out_channels, *size, generator=generator),
    }
    if sizes.context_dim:
        values["context"] = torch.randn(2, 7, sizes.context_dim, generator=generator).requires_grad_()
    if sizes.num_classes:
        values["class_labels"] = torch.tensor([3, sizes.num_classes - 1])
    return values


def theirs_forward(model: nn.Module, inputs: dict[str, Tensor], added: dict[str, Tensor]) -> Tensor:
    keywords: dict[str, Any] = {"class_labels": inputs.get("class_labels")}
    if "context" in inputs:
        keywords["encoder_hidden_states"] = inputs["context"]
    if added:
        keywords["added_cond_kwargs"] = added
    return model(inputs["x"], inputs["timesteps"], **keywords).sample


def added_conditions(sizes: UNetSizes) -> tuple[Tensor | None, dict[str, Tensor]]:
    """Our vector, and the same as SDXL's pooled text and six numbers."""
    if sizes.vector_dim is None:
        return None, {}
    pooled = torch.randn(2, 5, generator=torch.Generator().manual_seed(2))
    numbers = torch.tensor([[512.0, 640, 0, 16, 512, 512], [300, 200, 8, 0, 512, 512]])
    frequencies = torch.exp(-torch.log(torch.tensor(10_000.0)) * torch.arange(4) / 4)
    angles = numbers[:, :, None] * frequencies
    features = torch.cat([angles.cos(), angles.sin()], dim=-1).flatten(1)
    return torch.cat([pooled, features], dim=1), {"text_embeds": pooled, "time_ids": numbers}


def assert_close(ours: Tensor, theirs: Tensor, name: str, scale: Tensor | None = None) -> None:
    """`scale`: what the error is relative to, if not to `theirs`."""
    error = (ours - theirs).abs().max() / (theirs if scale is None else scale).abs().max()
    assert error < TOLERANCE, f"{name}: relative error {error:.1e}"


@pytest.mark.parametrize("name", STRUCTURES)
def test_outputs_and_gradients_equal_diffusers(name: str) -> None:
    ours, theirs, config, sizes = pair(name)
    inputs = make_inputs(sizes, (16, 24))
    vector, added = added_conditions(sizes)
    expected = theirs_forward(theirs, inputs, added)
    wanted = [inputs[key] for key in ("x", "context") if key in inputs]
    ((expected - inputs["target"]) ** 2).mean().backward()
    gradients_of_inputs = [value.grad.clone() for value in wanted]  # type: ignore[union-attr]
    for value in wanted:
        value.grad = None
    got = ours(inputs["x"], inputs["timesteps"], inputs.get("context"), vector, inputs.get("class_labels"))
    ((got - inputs["target"]) ** 2).mean().backward()

    assert expected.std() > 0.1
    assert_close(got, expected, "prediction")
    for value, gradient in zip(wanted, gradients_of_inputs, strict=True):
        assert_close(value.grad, gradient, "input gradient")  # type: ignore[arg-type]
    links = unet_links(config, dict(ours.named_parameters()), "diffusers")
    ours_in_theirs = export_tensors(links, {n: p.grad for n, p in ours.named_parameters()})  # type: ignore[misc]
    parameters = dict(theirs.named_parameters())
    for key, parameter in parameters.items():
        # Softmax does not see the bias of a key: its gradient is rounding error, beside the query's.
        scale = parameters[key.replace("to_k.bias", "to_q.bias")].grad
        assert_close(ours_in_theirs[key], parameter.grad, key, scale)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["sd1", "sd2"])
def test_sizes_that_do_not_halve_evenly_equal_diffusers(name: str) -> None:
    ours, theirs, _, sizes = pair(name)
    inputs = make_inputs(sizes, (11, 13))
    with torch.no_grad():
        expected = theirs_forward(theirs, inputs, {})
        got = ours(inputs["x"], inputs["timesteps"], inputs.get("context"))
    assert_close(got, expected, "prediction")


@pytest.mark.parametrize("name", STRUCTURES)
def test_configuration_goes_both_ways(name: str) -> None:
    structure = STRUCTURES[name]
    described = unet_from_diffusers(structure.json)
    assert described.config == structure.config
    assert described.sizes == structure.sizes
    back = unet_to_diffusers(structure.config, structure.sizes, structure.json["sample_size"])
    assert {key: back[key] for key in structure.json} == {
        **structure.json,
        "attention_head_dim": back["attention_head_dim"],
    }
    assert unet_from_diffusers(back) == described


@pytest.mark.parametrize("name", STRUCTURES)
def test_every_name_and_shape_at_full_size(name: str) -> None:
    """On the meta device: the real networks, no memory."""
    structure = STRUCTURES[name]
    with torch.device("meta"):
        theirs = reference(structure.json)
    wanted = {key: tuple(value.shape) for key, value in theirs.state_dict().items()}
    ours = structure.sizes.build(structure.config).state_dict()
    exported = export_tensors(unet_links(structure.config, ours, "diffusers"), ours)
    check_fit(wanted, shapes_of(exported), name, "")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sd1", "sd2"])
def test_full_size_prediction_equals_diffusers(name: str) -> None:
    """About 7 GB and a minute; run with LDM_FULL_SIZE=1."""
    if not os.environ.get("LDM_FULL_SIZE"):
        pytest.skip("set LDM_FULL_SIZE=1 for the full-size comparison (7 GB)")
    structure = STRUCTURES[name]
    ours = structure.sizes.build(structure.config).to_empty(device="cpu")
    randomise(ours)
    with torch.device("meta"):
        theirs = reference(structure.json)
    exported = export_tensors(unet_links(structure.config, ours.state_dict(), "diffusers"), ours.state_dict())
    theirs.load_state_dict(exported, strict=True, assign=True)
    inputs = make_inputs(structure.sizes, (16, 16))
    with torch.no_grad():
        expected = theirs_forward(theirs, inputs, {})
        got = ours(inputs["x"], inputs["timesteps"], inputs["context"])
    assert_close(got, expected, "prediction")
