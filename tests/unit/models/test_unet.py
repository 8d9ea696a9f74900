"""The UNet: published sizes, shapes, options, checkpointing, layout, compilation."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from trainer.config.models import UNetConfig
from trainer.models.attention import Attention, PlainAttention, SpatialTransformer
from trainer.models.unet import UNet

SD2 = UNetConfig()
SD1 = replace(SD2, num_heads=8, head_dim=None, projection="conv")
CELEBA = UNetConfig(
    model_channels=224,
    channel_multipliers=(1, 2, 3, 4),
    attention_factors=(8, 4, 2),
    head_dim=32,
    attention="plain",
)
TINY = UNetConfig(
    model_channels=8,
    channel_multipliers=(1, 2),
    attention_factors=(2, 1),
    num_res_blocks=1,
    head_dim=4,
    num_groups=4,
)


def tiny(config: UNetConfig = TINY, **sizes: int | None) -> UNet:
    """A small UNet whose zero-initialised layers are random, so that every path shows in the output."""
    torch.manual_seed(0)
    defaults: dict[str, int | None] = {"in_channels": 4, "out_channels": 4, "context_dim": 6}
    unet = UNet(config, **{**defaults, **sizes})  # type: ignore[arg-type]
    with torch.no_grad():
        for parameter in unet.parameters():
            if not parameter.any():
                parameter.normal_(std=0.1)
    return unet.eval()


def inputs(size: tuple[int, int] = (8, 8), channels: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return (
        torch.randn(2, channels, *size, generator=generator),
        torch.tensor([3, 700]),
        torch.randn(2, 5, 6, generator=generator),
    )


@pytest.mark.parametrize(
    ("config", "sizes", "parameters"),
    [
        pytest.param(SD1, (4, 4, 768, None, None), 859_520_964, id="sd1"),
        pytest.param(SD2, (4, 4, 1024, None, None), 865_910_724, id="sd2"),
        pytest.param(
            replace(
                SD2, channel_multipliers=(1, 2, 4), attention_factors=(4, 2), transformer_depth=(1, 2, 10)
            ),
            (4, 4, 2048, 2816, None),
            2_567_463_684,
            id="sdxl",
        ),
        pytest.param(
            replace(
                SD1,
                model_channels=256,
                channel_multipliers=(1, 2, 2, 4),
                attention_factors=(2, 4, 8),
                cross_attention_only=(True, True, True, False),
            ),
            (7, 4, 1024, None, 1000),
            473_398_020,
            id="x4-upscaler",
        ),
        pytest.param(CELEBA, (3, 3, None, None, None), 274_056_163, id="celebahq"),
        pytest.param(
            replace(
                SD1,
                model_channels=192,
                channel_multipliers=(1, 2, 3, 5),
                attention_factors=(8, 4, 2),
                num_heads=1,
            ),
            (3, 3, 512, None, None),
            400_920_579,
            id="cin256-v2",
        ),
        pytest.param(SD1, (4, 4, 1280, None, None), 872_300_484, id="text-1.45B"),
        pytest.param(
            replace(
                CELEBA,
                model_channels=192,
                channel_multipliers=(1, 2, 2, 4, 4),
                attention_factors=(1, 2, 4, 8),
                head_dim=24,
                scale_shift_norm=True,
                resblock_updown=True,
            ),
            (4, 4, None, None, None),
            294_966_916,
            id="churches",
        ),
        pytest.param(
            replace(CELEBA, model_channels=160, channel_multipliers=(1, 2, 2, 4), attention_factors=(8,)),
            (6, 3, None, None, None),
            113_622_563,
            id="bsr",
        ),
        pytest.param(
            replace(CELEBA, model_channels=256, num_heads=8, head_dim=None, resblock_updown=True),
            (7, 3, None, None, None),
            387_245_827,
            id="inpainting-big",
        ),
        pytest.param(
            replace(CELEBA, model_channels=128, channel_multipliers=(1, 4, 8), attention_factors=(32, 16)),
            (6, 3, None, None, None),
            215_229_315,
            id="semantic",
        ),
    ],
)
def test_published_sizes_on_the_meta_device(
    config: UNetConfig, sizes: tuple[int, int, int | None, int | None, int | None], parameters: int
) -> None:
    names = ("in_channels", "out_channels", "context_dim", "vector_dim", "num_classes")
    with torch.device("meta"):
        unet = UNet(config, **dict(zip(names, sizes, strict=True)))  # type: ignore[arg-type]
    assert sum(p.numel() for p in unet.parameters()) == parameters
    assert not list(unet.buffers())


@pytest.mark.parametrize("size", [(8, 8), (7, 5), (4, 12), (1, 3)])
@pytest.mark.parametrize("updown", [False, True])
def test_any_resolution(size: tuple[int, int], updown: bool) -> None:
    config = replace(TINY, channel_multipliers=(1, 2, 2), resblock_updown=updown, scale_shift_norm=updown)
    x, timesteps, context = inputs(size)
    out = tiny(config)(x, timesteps, context)
    assert out.shape == x.shape
    assert out.isfinite().all()


def test_a_fresh_unet_predicts_zero() -> None:
    x, timesteps, context = inputs()
    unet = UNet(TINY, in_channels=4, out_channels=4, context_dim=6)
    assert unet(x, timesteps, context).abs().max() == 0


def test_every_parameter_receives_a_gradient() -> None:
    config = replace(TINY, cross_attention_only=(True, False))
    unet = tiny(config, vector_dim=7, num_classes=3)
    x, timesteps, context = inputs()
    out = unet(x, timesteps, context, torch.randn(2, 7), torch.tensor([0, 2]))
    out.square().mean().backward()
    dead = [name for name, p in unet.named_parameters() if p.grad is None or not p.grad.any()]
    assert dead == []


def test_each_condition_changes_the_prediction() -> None:
    unet = tiny(vector_dim=7, num_classes=3)
    x, timesteps, context = inputs()
    vector, labels = torch.zeros(2, 7), torch.tensor([0, 2])
    base = unet(x, timesteps, context, vector, labels)
    for changed in (
        unet(x, timesteps + 1, context, vector, labels),
        unet(x, timesteps, context + 1, vector, labels),
        unet(x, timesteps, context, vector + 1, labels),
        unet(x, timesteps, context, vector, labels - torch.tensor([0, 1])),
    ):
        assert (changed - base).abs().max() > 1e-5
    with pytest.raises(ValueError, match="class_labels"):
        unet(x, timesteps, context, vector)
    with pytest.raises(ValueError, match="vector"):
        unet(x, timesteps, context, class_labels=labels)


def test_samples_of_a_batch_are_independent() -> None:
    unet = tiny()
    x, timesteps, context = inputs()
    both = unet(x, timesteps, context)
    alone = torch.cat([unet(x[i : i + 1], timesteps[i : i + 1], context[i : i + 1]) for i in range(2)])
    torch.testing.assert_close(both, alone, rtol=1e-4, atol=1e-5)


def test_integer_and_floating_point_timesteps_agree() -> None:
    unet = tiny()
    x, timesteps, context = inputs()
    torch.testing.assert_close(
        unet(x, timesteps, context), unet(x, timesteps.double(), context), rtol=0, atol=0
    )
    assert not torch.equal(unet(x, timesteps, context), unet(x, timesteps + 0.5, context))


@pytest.mark.parametrize("attention", ["transformer", "plain"])
def test_activation_checkpointing_changes_no_gradient(attention: str) -> None:
    gradients = []
    for recompute in (False, True):
        config = replace(TINY, attention=attention, activation_checkpointing=recompute, resblock_updown=True)
        unet = tiny(config).train()
        unet(*inputs()).square().sum().backward()
        gradients.append([p.grad for p in unet.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, recomputed, rtol=0, atol=0)


def test_channels_last_input_stays_channels_last_and_changes_nothing() -> None:
    unet = tiny()
    x, timesteps, context = inputs()
    strides: list[bool] = []

    def note(_module: torch.nn.Module, _inputs: object, out: torch.Tensor | tuple[torch.Tensor, ...]) -> None:
        for made in out if isinstance(out, tuple) else (out,):
            strides.append(made.is_contiguous(memory_format=torch.channels_last))

    for module in unet.modules():
        if isinstance(module, torch.nn.Conv2d | torch.nn.GroupNorm):
            module.register_forward_hook(note)
    last = unet(x.contiguous(memory_format=torch.channels_last), timesteps, context)
    assert all(strides)
    torch.testing.assert_close(last, unet(x, timesteps, context), rtol=1e-4, atol=1e-5)


def test_compiles_into_one_graph() -> None:
    unet = tiny(num_classes=3)
    x, timesteps, context = inputs()
    labels = torch.tensor([0, 2])
    compiled = torch.compile(unet, backend="eager", fullgraph=True)
    assert torch.equal(
        compiled(x, timesteps, context, None, labels), unet(x, timesteps, context, None, labels)
    )


def test_bfloat16_weights_take_float32_inputs() -> None:
    x, timesteps, context = inputs()
    unet = tiny(vector_dim=7).to(torch.bfloat16)
    out = unet(x, timesteps, context, torch.zeros(2, 7))
    assert out.dtype == torch.bfloat16
    reference = tiny(vector_dim=7)(x, timesteps, context, torch.zeros(2, 7))
    assert (out.float() - reference).norm() < 0.05 * reference.norm()


def test_attention_matches_its_definition() -> None:
    torch.manual_seed(0)
    attention = Attention(8, 2, context_dim=6)
    x, context = torch.randn(2, 5, 8), torch.randn(2, 3, 6)
    query = attention.to_q(x).view(2, 5, 2, 4)
    key, value = attention.to_kv(context).view(2, 3, 2, 2, 4).unbind(2)
    weights = torch.einsum("bnhd,blhd->bhnl", query, key).div(2.0).softmax(-1)
    expected = attention.to_out(torch.einsum("bhnl,blhd->bnhd", weights, value).flatten(2))
    made, pending_bias = attention(x, context)
    assert pending_bias is None, "on a CPU every layer adds its own bias"
    torch.testing.assert_close(made, expected)


def test_attention_sits_where_the_factors_say() -> None:
    def count(config: UNetConfig, kind: type[torch.nn.Module]) -> int:
        return sum(isinstance(m, kind) for m in tiny(config).modules())

    assert count(replace(TINY, attention_factors=()), SpatialTransformer) == 1
    assert count(replace(TINY, attention_factors=(2,)), SpatialTransformer) == 1 + 3
    assert count(replace(TINY, attention_factors=(1, 2)), SpatialTransformer) == 1 + 6
    assert count(replace(TINY, attention="plain"), PlainAttention) == 7
    unet = tiny(replace(TINY, transformer_depth=(1, 3), middle_transformer_depth=2))
    assert len(unet.mid_block.attentions[0].transformer_blocks) == 2
    assert len(unet.down_blocks[1].attentions[0].transformer_blocks) == 3


def test_groups_of_residual_blocks_can_differ() -> None:
    unet = tiny(replace(TINY, res_block_groups=2))
    groups = {name: m.num_groups for name, m in unet.named_modules() if isinstance(m, torch.nn.GroupNorm)}
    assert {v for k, v in groups.items() if "resnets" in k} == {2}
    assert {v for k, v in groups.items() if "resnets" not in k} == {4}
