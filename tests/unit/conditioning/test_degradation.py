"""Low-resolution pictures against Pillow, and noise levels against diffusers."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from trainer.conditioning.base import Source
from trainer.conditioning.low_resolution import (
    CHROMINANCE,
    LUMINANCE,
    LowResolution,
    jpeg,
    noise_level_alphas_cumprod,
    quantisation_steps,
    quantise,
    shrink_bicubic,
    shrink_degraded,
)
from trainer.config.models import FirstStageConfig, LowResolutionConfig
from trainer.config.run import ConfigError
from trainer.rng import Purpose

FIRST_STAGE = FirstStageConfig(channel_multipliers=(1, 1, 1))


def scene(size: int = 96, count: int = 1) -> Tensor:
    """Smooth ramps with a few hard edges: [count, 3, size, size] in [-1, 1], on 8-bit levels."""
    y, x = torch.meshgrid(torch.linspace(0, 1, size), torch.linspace(0, 1, size), indexing="ij")
    picture = torch.stack([x, y, (x * 7).sin() * 0.5 + 0.5])
    picture[:, 20:40, 30:70] = torch.tensor([0.9, 0.1, 0.2]).view(3, 1, 1)
    return quantise(picture.unsqueeze(0).expand(count, -1, -1, -1) * 2 - 1)


def to_pillow(picture: Tensor) -> Image.Image:
    levels = ((picture + 1) * 127.5).round().to(torch.uint8)
    return Image.fromarray(levels.permute(1, 2, 0).numpy())


def from_pillow(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1) / 127.5 - 1


def psnr(first: Tensor, second: Tensor) -> float:
    return float(10 * torch.log10(4 / (first - second).square().mean()))


def test_bicubic_shrinking_equals_pillow() -> None:
    picture = scene()
    ours = shrink_bicubic(picture, 4)[0]
    theirs = from_pillow(to_pillow(picture[0]).resize((24, 24), Image.Resampling.BICUBIC))
    # Pillow rounds to 8 bits between its two passes: at most one level apart.
    assert (ours - theirs).abs().max() <= 1.01 / 127.5
    assert torch.equal(ours, quantise(ours))


@pytest.mark.parametrize("quality", [10, 50, 80, 95])
def test_jpeg_loses_what_libjpeg_loses(quality: int) -> None:
    picture = scene()
    buffer = io.BytesIO()
    to_pillow(picture[0]).save(buffer, "JPEG", quality=quality, subsampling=2)
    theirs = from_pillow(Image.open(buffer))
    ours = jpeg(picture, torch.tensor([float(quality)]))[0]
    loss, difference = psnr(theirs, picture[0]), psnr(ours, theirs)
    assert psnr(ours, picture[0]) == pytest.approx(loss, abs=1.0)
    assert difference > loss + 4  # the same errors, not only as many


@pytest.mark.parametrize("quality", [1, 30, 49, 50, 87, 100])
def test_quantisation_is_libjpegs(quality: int) -> None:
    buffer = io.BytesIO()
    to_pillow(scene()[0]).save(buffer, "JPEG", quality=quality)
    tables = Image.open(buffer).quantization
    for table, theirs in ((LUMINANCE, tables[0]), (CHROMINANCE, tables[1])):
        ours = quantisation_steps(table, torch.tensor([float(quality)]))
        assert ours.flatten().tolist() == list(theirs)


def test_jpeg_of_any_size_and_mixed_qualities() -> None:
    picture = scene(50, 2)
    both = jpeg(picture, torch.tensor([30.0, 95.0]))
    assert both.shape == picture.shape
    assert psnr(both[0], picture[0]) < psnr(both[1], picture[1])
    torch.testing.assert_close(both[1:], jpeg(picture[1:], torch.tensor([95.0])))


def degrade(picture: Tensor, ordinals: Tensor) -> Tensor:
    return shrink_degraded(picture, 4, seed=1, ordinals=ordinals, noise_purpose=Purpose.CONDITION + 6)


def test_degraded_pictures_differ_by_sample_and_stay_the_same_scene() -> None:
    ordinals = torch.arange(64)
    low = degrade(scene(96, 64), ordinals)
    clean = shrink_bicubic(scene(), 4)
    assert low.shape == (64, 3, 24, 24)
    assert low.abs().max() <= 1
    losses = [psnr(row, clean[0]) for row in low]
    assert 18 < min(losses) < max(losses) < 42
    assert max(losses) - min(losses) > 2  # weak and strong ones occur
    assert len({tuple(row.flatten().tolist()) for row in low}) == 64
    torch.testing.assert_close(degrade(scene(), ordinals[5:6])[0], low[5], rtol=0, atol=2.1 / 127.5)


def source(pixels: Tensor | None, count: int, **conditions: Tensor) -> Source:
    return Source([""] * count, torch.arange(count), 0, conditions, pixels)


def build(**changes: object) -> LowResolution:
    return LowResolution(LowResolutionConfig(**changes), FIRST_STAGE, 6)  # type: ignore[arg-type]


def test_noise_levels_are_the_upscalers() -> None:
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DDPMScheduler(beta_start=1e-4, beta_end=0.02, beta_schedule="scaled_linear")
    ours = noise_level_alphas_cumprod(LowResolutionConfig())
    torch.testing.assert_close(ours, scheduler.alphas_cumprod, rtol=1e-5, atol=1e-7)


def test_the_condition_is_noised_to_its_level() -> None:
    condition = build(max_noise_level=350)
    grey = torch.full((400, 3, 32, 32), 0.25)
    inputs = condition.prepare(source(grey, 400))
    level = inputs["level"]
    assert condition.num_classes == 1000
    assert 0 <= level.min() < 20
    assert 330 < level.max() < 350
    signal = noise_level_alphas_cumprod(condition.config)[level]
    value = quantise(torch.tensor(0.25))
    means, spreads = inputs["picture"].mean(dim=(1, 2, 3)), inputs["picture"].std(dim=(1, 2, 3))
    elements = 3 * 8 * 8
    bound = 5 * (1 - signal).sqrt() / elements**0.5 + 1e-6
    assert ((means - signal.sqrt() * value).abs() <= bound).all()
    assert ((spreads - (1 - signal).sqrt()).abs() <= bound).all()


def test_a_given_picture_needs_no_pixels_and_takes_the_asked_noise_level() -> None:
    given = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    clean = build().prepare(source(None, 2, low_resolution=given))
    assert list(clean) == ["picture"]
    torch.testing.assert_close(clean["picture"], given / 127.5 - 1)
    noised = build(max_noise_level=350)
    assert noised.prepare(source(None, 2, low_resolution=given))["level"].tolist() == [20, 20]
    asked = source(None, 2, low_resolution=given, noise_level=torch.tensor([0, 999]))
    assert noised.prepare(asked)["level"].tolist() == [0, 349]


def test_a_noise_level_beyond_the_schedule_is_refused() -> None:
    with pytest.raises(ConfigError, match="noise_num_timesteps"):
        build(max_noise_level=1001)
