"""Several conditions at once: how they are joined, dropped and refused."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from trainer.conditioning.base import Conditioning, replace_dropped
from trainer.conditioning.build import Conditioner, build_conditioner, condition_index
from trainer.config.models import (
    ClassLabelConfig,
    ConditioningConfig,
    DepthConfig,
    FirstStageConfig,
    ImageSizeConfig,
    LayoutConfig,
    LowResolutionConfig,
    MaskedImageConfig,
    OpenCLIPConfig,
    SemanticMapConfig,
    TextTransformerConfig,
)
from trainer.config.run import ConfigError

FIRST_STAGE = FirstStageConfig(channel_multipliers=(1, 1, 1), latent_channels=4)
TOWER = OpenCLIPConfig(model="ViT-B-32", pretrained="random", width=16, layers=2, heads=2)
SEED = 4


def prepared(conditioner: Conditioner, count: int = 3, **conditions: torch.Tensor) -> dict[str, torch.Tensor]:
    return conditioner.frozen.prepare(
        [f"caption {i}" for i in range(count)],
        conditions,
        None,
        first_stage=None,
        seed=SEED,
        ordinals=torch.arange(count),
    )


def test_no_condition_at_all() -> None:
    conditioner = build_conditioner(ConditioningConfig(), FIRST_STAGE)
    assert (conditioner.context_dim, conditioner.vector_dim, conditioner.num_classes) == (None, None, None)
    assert conditioner.concat_channels == 0
    assert conditioner.drop_masks(SEED, torch.arange(3)) == {}
    out = conditioner.trained(prepared(conditioner), {})
    assert all(getattr(out, f.name) is None for f in dataclasses.fields(out))


def test_two_towers_join_in_width_and_the_vector_is_pooled_text_then_sizes() -> None:
    second = dataclasses.replace(TOWER, width=24, pooled=True)
    config = ConditioningConfig(openclip=TOWER, openclip_second=second, image_size=ImageSizeConfig(width=8))
    conditioner = build_conditioner(config, FIRST_STAGE)
    assert (conditioner.context_dim, conditioner.vector_dim) == (40, 24 + 6 * 8)
    sizes = torch.tensor([[512.0, 384, 0, 10, 256, 256]] * 3)
    out = conditioner.trained(prepared(conditioner, size=sizes), conditioner.keep_masks(3))
    first, other = (conditioner.conditions[name] for name in ("openclip", "openclip_second"))
    captions = [f"caption {i}" for i in range(3)]
    assert out.context is not None
    assert out.vector is not None
    torch.testing.assert_close(out.context[..., :16], first.encode(captions)["context"])
    torch.testing.assert_close(out.context[..., 16:], other.encode(captions)["context"])
    torch.testing.assert_close(out.vector[:, :24], other.encode(captions)["pooled"])


def test_sdxl_sizes() -> None:
    with torch.device("meta"):
        conditioner = build_conditioner(
            ConditioningConfig(
                openclip=OpenCLIPConfig(model="ViT-L-14-quickgelu", final_norm=False, padding="end"),
                openclip_second=OpenCLIPConfig(model="ViT-bigG-14", final_norm=False, pooled=True),
                image_size=ImageSizeConfig(),
            ),
            FirstStageConfig(),
        )
    assert (conditioner.context_dim, conditioner.vector_dim) == (2048, 2816)


def test_other_contexts_join_in_length_behind_the_towers() -> None:
    config = ConditioningConfig(
        openclip=TOWER,
        text_transformer=TextTransformerConfig(16, 1, 2, 8, max_tokens=9),
        class_label=ClassLabelConfig(num_classes=4, width=16),
        layout=LayoutConfig(num_labels=3, max_boxes=2, grid=4, width=16, layers=1, heads=2, head_dim=8),
    )
    conditioner = build_conditioner(config, FIRST_STAGE)
    inputs = prepared(conditioner, class_label=torch.tensor([0, 1, 2]), layout=torch.rand(3, 2, 5))
    out = conditioner.trained(inputs, conditioner.keep_masks(3))
    assert out.context is not None
    assert out.context.shape == (3, 77 + 9 + 1 + 6, 16)
    # A dropped condition changes its own tokens only.
    drop = {**conditioner.keep_masks(3), "class_label": torch.ones(3, dtype=torch.bool)}
    dropped = conditioner.trained(inputs, drop).context
    assert dropped is not None
    changed = (dropped != out.context).any(dim=2).any(dim=0)
    assert changed.nonzero().flatten().tolist() == [77 + 9]


def test_concatenated_channels_add_up() -> None:
    config = ConditioningConfig(
        semantic_map=SemanticMapConfig(num_labels=5, channels=2),
        masked_image=MaskedImageConfig(),
        depth=DepthConfig(),
    )
    assert build_conditioner(config, FIRST_STAGE).concat_channels == 2 + (1 + 4) + 1


def test_contexts_of_two_widths_are_refused() -> None:
    config = ConditioningConfig(openclip=TOWER, class_label=ClassLabelConfig(width=20))
    with pytest.raises(ConfigError, match=r"class_label 20.*openclip 16"):
        build_conditioner(config, FIRST_STAGE)


def test_two_class_labels_are_refused() -> None:
    config = ConditioningConfig(
        class_label=ClassLabelConfig(inject="timestep"), low_resolution=LowResolutionConfig(max_noise_level=9)
    )
    with pytest.raises(ConfigError, match="inject=context"):
        build_conditioner(config, FIRST_STAGE)


def test_guidance_keeps_what_was_never_dropped_in_training() -> None:
    config = ConditioningConfig(
        openclip=dataclasses.replace(TOWER, drop_probability=0.0), masked_image=MaskedImageConfig()
    )
    masks = build_conditioner(config, FIRST_STAGE).null_masks(2)
    assert masks["openclip"].all()  # the empty prompt is an input like any other
    assert not masks["masked_image"].any()  # without its picture inpainting is another model
    trained = dataclasses.replace(config, masked_image=MaskedImageConfig(drop_probability=0.1))
    assert build_conditioner(trained, FIRST_STAGE).null_masks(2)["masked_image"].all()


def test_drops_of_two_conditions_are_independent_and_stable() -> None:
    tower = dataclasses.replace(TOWER, drop_probability=0.5)
    both = ConditioningConfig(openclip=tower, class_label=ClassLabelConfig(width=16, drop_probability=0.5))
    alone = ConditioningConfig(class_label=ClassLabelConfig(width=16, drop_probability=0.5))
    ordinals = torch.arange(10_000)
    masks = build_conditioner(both, FIRST_STAGE).drop_masks(SEED, ordinals)
    together = (masks["openclip"] & masks["class_label"]).float().mean().item()
    assert together == pytest.approx(0.25, abs=0.02)
    # Another condition beside it does not change which samples lose this one.
    assert torch.equal(
        masks["class_label"], build_conditioner(alone, FIRST_STAGE).drop_masks(SEED, ordinals)["class_label"]
    )
    assert condition_index("openclip") == 0


def test_all_conditions_are_dropped_together_as_often_as_asked() -> None:
    config = ConditioningConfig(
        openclip=dataclasses.replace(TOWER, drop_probability=0.1),
        class_label=ClassLabelConfig(width=16, drop_probability=0.0),
        masked_image=MaskedImageConfig(),
    )
    ordinals = torch.arange(20_000)
    alone = build_conditioner(config, FIRST_STAGE).drop_masks(SEED, ordinals)
    joint = dataclasses.replace(config, drop_all_probability=0.1)
    masks = build_conditioner(joint, FIRST_STAGE).drop_masks(SEED, ordinals)
    every = masks["class_label"]  # nothing else drops it
    assert every.float().mean().item() == pytest.approx(0.1, abs=0.01)
    assert torch.equal(masks["openclip"], alone["openclip"] | every)
    assert not masks["masked_image"].any()  # its null form is never trained
    part = build_conditioner(joint, FIRST_STAGE).drop_masks(SEED, ordinals[5:9])
    assert torch.equal(masks["class_label"][5:9], part["class_label"])


def test_conditionings_join_for_guidance_and_change_type() -> None:
    one = Conditioning(context=torch.ones(2, 3, 4), class_labels=torch.tensor([1, 2]))
    two = Conditioning(context=torch.zeros(2, 3, 4), class_labels=torch.tensor([7, 7]))
    joined = one.cat(two)
    assert joined.context is not None
    assert joined.context[:, 0, 0].tolist() == [1, 1, 0, 0]
    assert joined.class_labels is not None
    assert joined.class_labels.tolist() == [1, 2, 7, 7]
    assert joined.vector is None
    half = joined.to(torch.bfloat16)
    assert half.context is not None
    assert half.context.dtype == torch.bfloat16
    assert half.class_labels is joined.class_labels
    with pytest.raises(AssertionError, match="same conditions"):
        one.cat(Conditioning(context=two.context))


def test_dropping_cuts_the_gradient_and_stops_not_a_number() -> None:
    values = torch.tensor([[float("nan")], [2.0]], requires_grad=True)
    out = replace_dropped(values, 0.0, torch.tensor([True, False]))
    assert out.tolist() == [[0.0], [2.0]]
    out.sum().backward()
    assert values.grad is not None
    assert values.grad.tolist() == [[0.0], [1.0]]
