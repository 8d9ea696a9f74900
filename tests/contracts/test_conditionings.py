"""Every entry of CONDITIONERS keeps the promises that the UNet, the loop and guidance rely on."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from trainer.conditioning.base import Conditioning
from trainer.conditioning.build import CONDITIONERS, Conditioner, build_conditioner
from trainer.config.checks_diffusion import GUIDED
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

EDGE, FACTOR, BATCH, SEED = 32, 4, 6, 11
FIRST_STAGE = FirstStageConfig(channel_multipliers=(1, 1, 1), latent_channels=4)
TOWER = OpenCLIPConfig(
    model="ViT-B-32", pretrained="random", width=32, layers=3, heads=4, drop_probability=0.3
)
SECTIONS: dict[str, Any] = {
    "openclip": TOWER,
    "openclip_second": dataclasses.replace(TOWER, pooled=True, final_norm=False, null="zeros"),
    "text_transformer": TextTransformerConfig(32, 2, 2, 8, max_tokens=16, drop_probability=0.3),
    "class_label": ClassLabelConfig(num_classes=7, width=32, drop_probability=0.3),
    "layout": LayoutConfig(
        num_labels=5, max_boxes=3, grid=8, width=32, layers=2, heads=2, head_dim=8, drop_probability=0.3
    ),
    "semantic_map": SemanticMapConfig(num_labels=6, channels=3, drop_probability=0.3),
    "low_resolution": LowResolutionConfig(
        factor=FACTOR, degradation="bsr_light", max_noise_level=350, drop_probability=0.3
    ),
    "masked_image": MaskedImageConfig(full_mask_probability=0.2, drop_probability=0.3),
    "depth": DepthConfig(drop_probability=0.3),
    "image_size": ImageSizeConfig(width=16, drop_probability=0.3),
}
RANDOM = {"low_resolution", "masked_image"}
"""Conditions that draw something besides the drop."""


class AverageStage:
    """A first stage of area averages; its fourth channel is the mean of the others."""

    def latents(self, pixels: Tensor, noise: Tensor | None) -> Tensor:
        small = torch.nn.functional.avg_pool2d(pixels, FACTOR)
        return torch.cat([small, small.mean(dim=1, keepdim=True)], dim=1)


def samples(count: int = BATCH) -> dict[str, Any]:
    """`count` samples that differ in every field."""
    generator = torch.Generator().manual_seed(3)
    boxes = torch.rand(count, 3, 5, generator=generator).sort(dim=2).values
    boxes[..., 0] = torch.randint(0, 5, (count, 3), generator=generator)
    boxes[0, 2] = -1.0
    conditions = {
        "class_label": torch.arange(count) % 7,
        "layout": boxes,
        "semantic_map": torch.randint(0, 6, (count, EDGE, EDGE), generator=generator, dtype=torch.uint8),
        "depth": torch.rand(count, 1, EDGE, EDGE, generator=generator) * 40,
        "size": torch.randint(1, 900, (count, 6), generator=generator),
    }
    conditions["semantic_map"][0, :8] = 255
    return {
        "captions": [
            f"a picture of {word}" for word in ("one", "two", "three", "four", "five", "six")[:count]
        ],
        "conditions": conditions,
        "pixels": torch.rand(count, 3, EDGE, EDGE, generator=generator) * 2 - 1,
        "ordinals": torch.arange(100, 100 + count),
    }


def take(batch: dict[str, Any], rows: slice) -> dict[str, Any]:
    return {
        "captions": batch["captions"][rows],
        "conditions": {name: value[rows] for name, value in batch["conditions"].items()},
        "pixels": batch["pixels"][rows],
        "ordinals": batch["ordinals"][rows],
    }


def build(*names: str, **changes: Any) -> Conditioner:
    torch.manual_seed(0)
    sections = {name: dataclasses.replace(SECTIONS[name], **changes) for name in names}
    return build_conditioner(ConditioningConfig(**sections), FIRST_STAGE)


def prepare(conditioner: Conditioner, batch: dict[str, Any], seed: int = SEED) -> dict[str, Tensor]:
    return conditioner.frozen.prepare(
        batch["captions"],
        batch["conditions"],
        batch["pixels"],
        first_stage=AverageStage(),
        seed=seed,
        ordinals=batch["ordinals"],
    )


def fields(conditioning: Conditioning) -> dict[str, Tensor]:
    present = {f.name: getattr(conditioning, f.name) for f in dataclasses.fields(conditioning)}
    return {name: value for name, value in present.items() if value is not None}


def drop_all(conditioner: Conditioner, n: int) -> dict[str, Tensor]:
    return {name: torch.ones(n, dtype=torch.bool) for name in conditioner.conditions}


@pytest.fixture(params=list(CONDITIONERS))
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_every_section_of_the_configuration_is_a_condition_and_is_tested_here() -> None:
    sections = [f.name for f in dataclasses.fields(ConditioningConfig) if f.default is None]
    assert list(CONDITIONERS) == sections
    assert list(SECTIONS) == sections


def test_contributions_have_the_declared_shapes(name: str) -> None:
    conditioner = build(name)
    out = conditioner.trained(prepare(conditioner, samples()), conditioner.keep_masks(BATCH))
    cells = EDGE // FACTOR
    assert fields(out)
    assert (out.context is None) == (conditioner.context_dim is None)
    assert (out.vector is None) == (conditioner.vector_dim is None)
    assert (out.concat is None) == (conditioner.concat_channels == 0)
    assert (out.class_labels is None) == (conditioner.num_classes is None)
    if out.context is not None:
        assert (out.context.shape[0], out.context.shape[2]) == (BATCH, conditioner.context_dim)
    if out.vector is not None:
        assert out.vector.shape == (BATCH, conditioner.vector_dim)
    if out.concat is not None:
        assert out.concat.shape == (BATCH, conditioner.concat_channels, cells, cells)
    if out.class_labels is not None:
        assert out.class_labels.dtype == torch.int64
        assert 0 <= out.class_labels.min() <= out.class_labels.max() < conditioner.num_classes


def test_dropped_rows_take_one_null_form_and_kept_rows_do_not_notice(name: str) -> None:
    conditioner = build(name)
    inputs = prepare(conditioner, samples())
    kept = fields(conditioner.trained(inputs, conditioner.keep_masks(BATCH)))
    null = fields(conditioner.trained(inputs, drop_all(conditioner, BATCH)))
    some = torch.tensor([True, False, True, False, False, True])
    mixed = fields(conditioner.trained(inputs, dict.fromkeys(conditioner.conditions, some)))
    for key, value in mixed.items():
        torch.testing.assert_close(value[some], null[key][some])
        torch.testing.assert_close(value[~some], kept[key][~some])
        if (name, key) == ("low_resolution", "class_labels"):
            continue  # the noise level describes the input and is never dropped
        torch.testing.assert_close(null[key], null[key][:1].expand_as(null[key]))
        for row in range(BATCH):
            assert not torch.equal(kept[key][row], null[key][row]), f"{key} of sample {row} is null when kept"


def test_gradients_reach_every_trained_parameter(name: str) -> None:
    conditioner = build(name)
    half = torch.arange(BATCH) < 2
    out = conditioner.trained(prepare(conditioner, samples()), dict.fromkeys(conditioner.conditions, half))
    parameters = dict(conditioner.trained.named_parameters())
    if not parameters:
        assert not any(value.requires_grad for value in fields(out).values())
        return
    sum((value.float() ** 2).sum() for value in fields(out).values() if value.is_floating_point()).backward()
    without = [key for key, value in parameters.items() if value.grad is None or not value.grad.any()]
    assert not without


def test_inputs_are_a_function_of_seed_and_ordinal(name: str) -> None:
    conditioner = build(name)
    batch = samples()
    first = prepare(conditioner, batch)
    torch.rand(5)  # the global generator must not matter
    again = prepare(conditioner, batch)
    for key, value in first.items():
        assert torch.equal(value, again[key]), key
    moved = prepare(conditioner, {**batch, "ordinals": batch["ordinals"] + 50})
    seeded = prepare(conditioner, batch, seed=SEED + 1)
    for other in (moved, seeded):
        changed = any(not torch.equal(value, other[key]) for key, value in first.items())
        assert changed == (name in RANDOM)


def test_a_sample_does_not_depend_on_its_neighbours(name: str) -> None:
    conditioner = build(name)
    batch = samples()
    whole_inputs = prepare(conditioner, batch)
    drop = conditioner.drop_masks(SEED, batch["ordinals"])
    whole = fields(conditioner.trained(whole_inputs, drop))
    for rows in (slice(0, 2), slice(2, 3), slice(3, 6)):
        part_inputs = prepare(conditioner, take(batch, rows))
        part_drop = conditioner.drop_masks(SEED, batch["ordinals"][rows])
        part = fields(conditioner.trained(part_inputs, part_drop))
        for key, value in part.items():
            torch.testing.assert_close(value, whole[key][rows], rtol=1e-4, atol=1e-5)
        for key, value in part_inputs.items():
            assert len(value) == len(part_drop[name]), f"{key} cannot be cut into micro-batches"


def test_frozen_weights_and_trained_weights_are_separate(name: str) -> None:
    conditioner = build(name)
    trained = {id(p) for p in conditioner.trained.parameters()}
    for module in conditioner.frozen.modules().values():
        assert not module.training
        for parameter in module.parameters():
            assert not parameter.requires_grad
            assert id(parameter) not in trained
    assert all(not value.requires_grad for value in prepare(conditioner, samples()).values())


def test_drop_probability_is_kept_and_zero_never_drops(name: str) -> None:
    ordinals = torch.arange(20_000)
    share = build(name).drop_masks(SEED, ordinals)[name].float().mean().item()
    assert share == pytest.approx(0.3, abs=0.015)  # 4.6 standard deviations
    assert not build(name, drop_probability=0.0).drop_masks(SEED, ordinals)[name].any()


def test_guidance_drops_what_the_configuration_check_believes_it_drops(name: str) -> None:
    assert build(name).conditions[name].guided
    assert build(name, drop_probability=0.0).conditions[name].guided == (name in GUIDED)


def test_half_precision_weights_work(name: str) -> None:
    conditioner = build(name)
    inputs = prepare(conditioner, samples())
    drop = conditioner.drop_masks(SEED, samples()["ordinals"])
    exact = fields(conditioner.trained(inputs, drop))
    half = fields(conditioner.trained.to(torch.bfloat16)(inputs, drop))
    for key, value in half.items():
        torch.testing.assert_close(value.float(), exact[key].float(), rtol=0.05, atol=0.1)


def test_parameters_can_be_counted_without_memory(name: str) -> None:
    expected = {key: value.shape for key, value in build(name).trained.named_parameters()}
    with torch.device("meta"):
        counted = dict(build(name).trained.named_parameters())
    assert all(value.is_meta for value in counted.values())
    assert {key: value.shape for key, value in counted.items()} == expected


@pytest.mark.parametrize("name", ["class_label", "layout", "semantic_map", "depth", "image_size"])
def test_a_missing_field_is_named(name: str) -> None:
    field = "size" if name == "image_size" else name
    batch = samples()
    del batch["conditions"][field]
    with pytest.raises(ConfigError, match=f"needs the field {field} .*in the shards"):
        prepare(build(name), batch)


@pytest.mark.parametrize(("name", "label"), [("class_label", 7), ("layout", 5), ("semantic_map", 6)])
def test_labels_outside_the_model_are_refused_at_once_and_harmless_later(name: str, label: int) -> None:
    batch = samples()
    wrong = batch["conditions"][name].clone()
    wrong[(3, 0, 0) if name == "layout" else 3] = label
    conditioner = build(name)
    with pytest.raises(ConfigError, match=rf"{name} holds the label {label} .*{name}.num_.*={label} "):
        prepare(conditioner, {**batch, "conditions": {name: wrong}})
    for _ in range(4):  # from here on the host no longer waits for the device to look
        prepare(conditioner, batch)
    inputs = prepare(conditioner, {**batch, "conditions": {name: wrong}})
    out = fields(conditioner.trained(inputs, conditioner.keep_masks(BATCH)))
    assert all(value.isfinite().all() for value in out.values())


@pytest.mark.parametrize("field", ["low_resolution", "masked_image"])
def test_missing_pictures_are_named(field: str) -> None:
    with pytest.raises(ConfigError, match=f"{field}.*pictures"):
        prepare(build(field), {**samples(), "pixels": None})
