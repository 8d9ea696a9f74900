"""Our original-layout files against diffusers' converter of that layout; plain attention against ADM's."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from trainer.config.models import FirstStageConfig, UNetConfig
from trainer.first_stage.build import build_first_stage
from trainer.interop import compvis
from trainer.interop.diffusers_stage import first_stage_to_diffusers
from trainer.interop.diffusers_unet import unet_to_diffusers
from trainer.interop.first_stage_names import STATISTICS, first_stage_links
from trainer.interop.links import Link, export_tensors, import_tensors
from trainer.interop.text_tower_names import open_clip_names, text_tower_links
from trainer.interop.unet_names import Dialect, UNetSizes, unet_links
from trainer.models.attention import PlainAttention
from trainer.models.unet import UNet

converter = pytest.importorskip("diffusers.loaders.single_file_utils")

SMALL = {"model_channels": 32, "num_groups": 8, "num_res_blocks": 2}
UNETS: dict[str, tuple[UNetConfig, UNetSizes]] = {
    "sd1": (UNetConfig(**SMALL, num_heads=8, head_dim=None, projection="conv"), UNetSizes(4, 4, 24)),
    "sd2": (UNetConfig(**SMALL, head_dim=8), UNetSizes(4, 4, 24)),
    "sd2-inpaint": (UNetConfig(**SMALL, head_dim=8), UNetSizes(9, 4, 24)),
    "x4-upscaler": (
        UNetConfig(
            **SMALL,
            channel_multipliers=(1, 2, 2, 4),
            attention_factors=(2, 4, 8),
            num_heads=8,
            head_dim=None,
            cross_attention_only=(True, True, True, False),
        ),
        UNetSizes(7, 4, 24, num_classes=10),
    ),
    "sdxl": (
        UNetConfig(
            **SMALL,
            head_dim=8,
            channel_multipliers=(1, 2, 4),
            attention_factors=(4, 2),
            transformer_depth=(1, 2, 3),
        ),
        UNetSizes(4, 4, 24, vector_dim=40),
    ),
}
PLAIN: dict[str, tuple[UNetConfig, UNetSizes]] = {
    "celebahq": (
        UNetConfig(**SMALL, attention="plain", head_dim=8, attention_factors=(8, 4, 2)),
        UNetSizes(3, 3),
    ),
    "churches": (
        UNetConfig(
            **SMALL,
            attention="plain",
            head_dim=8,
            attention_factors=(1, 2, 8),
            resblock_updown=True,
            scale_shift_norm=True,
        ),
        UNetSizes(4, 4),
    ),
}
EVERY = UNETS | PLAIN


def weights(config: UNetConfig, sizes: UNetSizes) -> dict[str, Tensor]:
    unet: UNet = sizes.build(config).to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(t.shape, generator=generator) for name, t in unet.state_dict().items()}


def in_dialect(config: UNetConfig, tensors: dict[str, Tensor], dialect: Dialect) -> dict[str, Tensor]:
    return export_tensors(unet_links(config, tensors, dialect), tensors)


def assert_identical(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert set(left) == set(right)
    different = [name for name in left if not torch.equal(left[name], right[name])]
    assert different == []


@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize("name", UNETS)
def test_diffusers_reads_our_original_layout_file(name: str, average: bool) -> None:
    config, sizes = UNETS[name]
    tensors = weights(config, sizes)
    parts = compvis.CompVisParts(unet=in_dialect(config, tensors, "compvis"))
    if average:
        parts.unet_average = {key: 0.5 * value for key, value in parts.unet.items()}
    json = unet_to_diffusers(config, sizes, 32)
    converted = converter.convert_ldm_unet_checkpoint(compvis.join(parts), json, extract_ema=average)
    expected = {k: (0.5 if average else 1.0) * v for k, v in in_dialect(config, tensors, "diffusers").items()}
    assert_identical(converted, expected)


@pytest.mark.parametrize("name", EVERY)
def test_round_trips_are_bit_identical(name: str) -> None:
    config, sizes = EVERY[name]
    tensors = weights(config, sizes)
    for dialect in ("compvis", "diffusers"):
        exported = in_dialect(config, tensors, dialect)
        assert UNetSizes.of(dialect, exported) == sizes
        back = import_tensors(unet_links(config, tensors, dialect), tensors, exported, name)
        assert_identical(back, tensors)
    assert UNetSizes.of_ours(tensors) == sizes


def test_diffusers_reads_our_original_layout_first_stage() -> None:
    """Without attention outside the middle, which their converter cannot read."""
    config = FirstStageConfig(
        base_channels=16, num_groups=4, channel_multipliers=(1, 2, 4), latent_channels=5
    )
    ours = build_first_stage(config).state_dict()
    parts = compvis.CompVisParts()
    parts.first_stage = export_tensors(first_stage_links(config, ours, "compvis"), ours)
    json = first_stage_to_diffusers(config, [0.0] * 5, [1.0] * 5, 32, 4)
    converted = converter.convert_ldm_vae_checkpoint(compvis.join(parts), json)
    expected = export_tensors(first_stage_links(config, ours, "diffusers"), ours)
    assert_identical({k: v.reshape(expected[k].shape) for k, v in converted.items()}, expected)


@pytest.mark.parametrize("name", ["kl", "vq"])
def test_first_stage_round_trips_are_bit_identical(name: Literal["kl", "vq"]) -> None:
    config = FirstStageConfig(
        name=name, base_channels=16, channel_multipliers=(1, 2, 2), attention_factors=(2, 4), codebook_size=7
    )
    ours = {n: t for n, t in build_first_stage(config).state_dict().items() if n not in STATISTICS}
    for dialect in ("compvis", "diffusers"):
        links = first_stage_links(config, ours, dialect)
        exported = export_tensors(links, ours)
        assert_identical(import_tensors(links, ours, exported, name), ours)
        assert ("encoder.down.1.attn.0.q.weight" in exported) == (dialect == "compvis")


def test_diffusers_reads_our_open_clip_tower() -> None:
    width, layers = 16, 3
    ours: dict[str, Tensor] = {
        "token_embedding.weight": torch.randn(30, width),
        "positional_embedding": torch.randn(7, width),
        "ln_final.weight": torch.randn(width),
        "ln_final.bias": torch.randn(width),
        "text_projection": torch.randn(width, width),
    }
    for i in range(layers):
        block = f"transformer.resblocks.{i}."
        shapes: dict[str, tuple[int, ...]] = {
            "attn.in_proj_weight": (3 * width, width),
            "attn.in_proj_bias": (3 * width,),
            "attn.out_proj.weight": (width, width),
            "attn.out_proj.bias": (width,),
            "mlp.c_fc.weight": (4 * width, width),
            "mlp.c_fc.bias": (4 * width,),
            "mlp.c_proj.weight": (width, 4 * width),
            "mlp.c_proj.bias": (width,),
        }
        shapes |= {f"ln_{n}.{kind}": (width,) for n in (1, 2) for kind in ("weight", "bias")}
        ours |= {block + name: torch.randn(shape) for name, shape in shapes.items()}
    exported = export_tensors(text_tower_links(ours), ours)
    file = compvis.join(compvis.CompVisParts(open_clip=ours))
    model: Any = SimpleNamespace(config=SimpleNamespace(hidden_size=width))
    converted = converter.convert_open_clip_checkpoint(model, file)  # leaves the projection out for SD2
    assert_identical(converted | {"text_projection.weight": ours["text_projection"].t()}, exported)
    links: list[Link] = text_tower_links(open_clip_names(exported))
    assert_identical(import_tensors(links, ours, exported, "clip"), ours)


@pytest.mark.parametrize("heads", [1, 2, 4])
def test_plain_attention_in_the_original_layout_is_adm_attention(heads: int) -> None:
    """ADM reshapes [B, 3C, N] to [B * heads, 3C / heads, N] before it splits q, k and v."""
    config = UNetConfig(**SMALL, channel_multipliers=(1,), attention="plain", num_heads=heads, head_dim=None)
    torch.manual_seed(0)
    attention = PlainAttention(32, heads, groups=8)
    torch.nn.init.normal_(attention.attn.to_out.weight, std=0.1)
    prefix = "mid_block.attentions.0."
    ours = {prefix + name: tensor for name, tensor in attention.state_dict().items()}
    stored = export_tensors(unet_links(config, ours, "compvis"), ours)
    x = torch.randn(2, 32, 3, 5)

    hidden = torch.nn.functional.group_norm(
        x, 8, stored["middle_block.1.norm.weight"], stored["middle_block.1.norm.bias"], eps=1e-5
    )
    qkv = torch.nn.functional.conv1d(
        hidden.flatten(2), stored["middle_block.1.qkv.weight"], stored["middle_block.1.qkv.bias"]
    )
    query, key, value = qkv.reshape(2 * heads, 3 * 32 // heads, 15).split(32 // heads, dim=1)
    mixing = torch.softmax(torch.einsum("bct,bcs->bts", query, key) * (32 // heads) ** -0.5, dim=-1)
    mixed = torch.einsum("bts,bcs->bct", mixing, value).reshape(2, 32, 15)
    out = torch.nn.functional.conv1d(
        mixed, stored["middle_block.1.proj_out.weight"], stored["middle_block.1.proj_out.bias"]
    )
    torch.testing.assert_close(attention(x, None), x + out.view_as(x), rtol=1e-5, atol=1e-5)
