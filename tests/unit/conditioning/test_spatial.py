"""Semantic maps, depth, masks and sizes: values, not only shapes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from trainer.conditioning.base import Source
from trainer.conditioning.image_size import ImageSize, uncropped
from trainer.conditioning.masked_image import MaskedImage, random_masks
from trainer.conditioning.spatial import Depth, LabelReduction
from trainer.config.models import DepthConfig, FirstStageConfig, ImageSizeConfig, MaskedImageConfig
from trainer.config.run import ConfigError

FIRST_STAGE = FirstStageConfig(channel_multipliers=(1, 1, 1), latent_channels=4)


def source(count: int, pixels: Tensor | None = None, stage: object = None, **conditions: Tensor) -> Source:
    return Source([""] * count, torch.arange(count), 0, conditions, pixels, stage)  # type: ignore[arg-type]


def test_label_reduction_is_a_one_by_one_convolution_of_the_one_hot_map() -> None:
    part = LabelReduction(num_labels=6, channels=3, factor=4)
    labels = torch.randint(0, 6, (2, 16, 24), dtype=torch.uint8)
    labels[0, :5, :7] = 255
    one_hot = F.one_hot(labels.long().clamp(max=6), 7)[..., :6].permute(0, 3, 1, 2).float()
    halved = F.interpolate(one_hot, scale_factor=0.5, mode="bilinear")  # two stages, as the paper's rescaler
    halved = F.interpolate(halved, scale_factor=0.5, mode="bilinear")
    expected = F.conv2d(halved, part.reduction.weight.T[:, :, None, None])
    out = part({"labels": labels}, torch.zeros(2, dtype=torch.bool)).concat
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


def test_unlabelled_everywhere_is_the_null_form() -> None:
    part = LabelReduction(num_labels=6, channels=3, factor=4)
    unlabelled = torch.full((1, 8, 8), 255, dtype=torch.uint8)
    out = part({"labels": unlabelled}, torch.tensor([False])).concat
    assert out is not None
    assert not out.any()


def test_depth_is_stretched_image_by_image() -> None:
    condition = Depth(DepthConfig(), FIRST_STAGE, 8)
    ramp = torch.linspace(3, 7, 32).expand(32, 32)
    field = torch.stack([ramp, ramp * 100, torch.full((32, 32), 9.0)])
    out = condition.prepare(source(3, depth=field))["concat"]
    assert out.shape == (3, 1, 8, 8)
    for row in out[:2]:
        assert (row.min(), row.max()) == (-1, 1)
    torch.testing.assert_close(out[0], out[1])
    assert not out[2].any()  # a flat map says nothing
    bytes_too = condition.prepare(source(3, depth=field.to(torch.uint8).unsqueeze(1)))["concat"]
    assert bytes_too.shape == out.shape
    with pytest.raises(ConfigError, match=r"depth\.channels"):
        condition.prepare(source(1, depth=torch.zeros(1, 2, 32, 32)))


def masks(count: int, size: int = 48, full: float = 0.0, seed: int = 0) -> Tensor:
    return random_masks(size, size, full_probability=full, seed=seed, ordinals=torch.arange(count))


def test_masks_hide_something_and_rarely_all() -> None:
    hidden = masks(300)
    assert set(hidden.unique().tolist()) == {0.0, 1.0}
    share = hidden.mean(dim=(1, 2, 3))
    assert (share > 0.005).all()
    assert (share < 1).float().mean() > 0.98
    assert 0.15 < share.mean() < 0.6
    assert share.std() > 0.1
    # No region is always spared: every pixel is hidden somewhere.
    assert hidden.amax(dim=0).all()


def test_masks_are_a_function_of_seed_and_ordinal() -> None:
    hidden = masks(20)
    alone = random_masks(48, 48, full_probability=0.0, seed=0, ordinals=torch.tensor([7]))
    assert torch.equal(alone[0], hidden[7])
    assert not torch.equal(masks(20, seed=1), hidden)
    assert len({tuple(row.flatten().tolist()) for row in hidden}) == 20


def test_masks_scale_with_the_picture() -> None:
    small, large = masks(40, 32), masks(40, 96)
    again = F.avg_pool2d(large, 3)
    assert (small - again).abs().mean() < 0.05


def test_all_is_hidden_as_often_as_asked() -> None:
    share = (masks(2000, 8, full=0.25).mean(dim=(1, 2, 3)) == 1).float().mean().item()
    partly = (masks(2000, 8).mean(dim=(1, 2, 3)) == 1).float().mean().item()
    assert share == pytest.approx(0.25 + 0.75 * partly, abs=0.04)


class PixelStage:
    """A first stage whose latents are the averaged pixels and their number of channels."""

    def latents(self, pixels: Tensor, noise: Tensor | None) -> Tensor:
        assert noise is None
        return torch.cat([F.avg_pool2d(pixels, 4), torch.ones(len(pixels), 1, 8, 8)], dim=1)


def test_masked_latents_know_nothing_of_the_hidden_part() -> None:
    condition = MaskedImage(MaskedImageConfig(), FIRST_STAGE, 7)
    pixels = torch.rand(2, 3, 32, 32) * 2 - 1
    mask = torch.zeros(2, 32, 32, dtype=torch.bool)
    mask[:, :, 16:] = True
    first = condition.prepare(source(2, pixels, PixelStage(), mask=mask))["concat"]
    assert first.shape == (2, 1 + 4, 8, 8)
    expected = torch.zeros(2, 1, 8, 8)
    expected[..., 4:] = 1
    assert torch.equal(first[:, :1], expected)  # 1 = hidden, before the latents: SD2's channel order
    assert not first[:, 1:4, :, 4:].any()
    torch.testing.assert_close(first[:, 1:4, :, :4], F.avg_pool2d(pixels, 4)[..., :4])
    other = torch.where(mask.unsqueeze(1), torch.rand(2, 3, 32, 32), pixels)
    assert torch.equal(condition.prepare(source(2, other, PixelStage(), mask=mask))["concat"], first)
    floats = mask.float().unsqueeze(1)
    assert torch.equal(condition.prepare(source(2, pixels, PixelStage(), mask=floats))["concat"], first)


def test_a_mask_of_another_size_is_refused() -> None:
    condition = MaskedImage(MaskedImageConfig(), FIRST_STAGE, 7)
    wrong = source(2, torch.zeros(2, 3, 32, 32), PixelStage(), mask=torch.zeros(2, 16, 16))
    with pytest.raises(ConfigError, match="32 x 32"):
        condition.prepare(wrong)


def test_sizes_become_the_fourier_features_of_sdxl() -> None:
    embeddings = pytest.importorskip("diffusers.models.embeddings")
    condition = ImageSize(ImageSizeConfig(), FIRST_STAGE, 9)
    numbers = torch.tensor([[1024, 768, 0, 128, 1024, 1024], [512, 512, 3, 0, 256, 256]])
    out = condition.trained(condition.prepare(source(2, size=numbers)), torch.tensor([False, False])).vector
    reference = embeddings.get_timestep_embedding(
        numbers.flatten(), 256, flip_sin_to_cos=True, downscale_freq_shift=0
    ).view(2, -1)
    torch.testing.assert_close(out, reference, rtol=1e-4, atol=1e-4)
    assert condition.vector_dim == 1536


def test_uncropped_names_height_before_width() -> None:
    assert uncropped(2, 64, 96).tolist() == [[64, 96, 0, 0, 64, 96]] * 2


def test_ldms_form_shows_black_and_a_mask_of_both_signs() -> None:
    """make_batch of CompVis' inpainting script: mask and masked picture are made in 0 .. 1, then doubled."""
    pixels = torch.rand(2, 3, 32, 32) * 2 - 1
    mask = torch.zeros(2, 32, 32, dtype=torch.bool)
    mask[:, :, 16:] = True
    hidden = mask.unsqueeze(1).float()
    shown = {}
    for form in ("sd", "ldm"):
        condition = MaskedImage(MaskedImageConfig(form=form), FirstStageConfig(name="identity"), 7)  # type: ignore[arg-type]
        shown[form] = condition.prepare(source(2, pixels, PixelStage(), mask=mask))["concat"]
    theirs = (1 - hidden) * (pixels + 1) / 2 * 2 - 1
    assert torch.equal(shown["ldm"][:, :1], shown["sd"][:, :1] * 2 - 1)
    torch.testing.assert_close(shown["ldm"][:, 1:], PixelStage().latents(theirs, None))
    torch.testing.assert_close(shown["sd"][:, 1:], PixelStage().latents(pixels * (1 - hidden), None))
