"""PSNR and SSIM against closed forms and a direct transcription of their definitions."""

from __future__ import annotations

import math

import pytest
import torch

from trainer.config.models import FirstStageConfig
from trainer.evaluation.reconstruction import MAX_PSNR, psnr, reconstruction_metrics, ssim
from trainer.first_stage.build import build_first_stage
from trainer.first_stage.perceptual import load_perceptual


def pictures(count: int = 2, edge: int = 24) -> torch.Tensor:
    return torch.rand(count, 3, edge, edge, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_psnr_of_a_constant_error() -> None:
    x = pictures()
    error = torch.tensor([0.1, 0.02]).view(2, 1, 1, 1)
    expected = torch.tensor([20 * math.log10(2 / 0.1), 20 * math.log10(2 / 0.02)])
    torch.testing.assert_close(psnr(x, x + error), expected, rtol=1e-4, atol=1e-3)
    assert psnr(x, x).tolist() == [MAX_PSNR] * 2


def test_ssim_of_equal_and_of_shifted_constants() -> None:
    x = pictures()
    torch.testing.assert_close(ssim(x, x), torch.ones(2))
    # Constant pictures: the structure term is 1, the luminance term has a closed form.
    a, b, c1 = 0.2, 0.6, (0.01 * 2) ** 2
    flat = torch.full((1, 3, 16, 16), a)
    expected = (2 * a * b + c1) / (a * a + b * b + c1)
    assert float(ssim(flat, torch.full_like(flat, b))) == pytest.approx(expected, rel=1e-5)


def test_ssim_equals_its_definition_window_by_window() -> None:
    x = pictures(1, 13)
    y = (x + 0.3 * torch.randn(x.shape, generator=torch.Generator().manual_seed(1))).clamp(-1, 1)
    offsets = torch.arange(11, dtype=torch.float64) - 5
    row = torch.exp(-offsets.square() / (2 * 1.5**2))
    window = torch.outer(row, row)
    window /= window.sum()
    c1, c2 = 0.02**2, 0.06**2
    values = []
    for channel in range(3):
        for top in range(3):
            for left in range(3):
                a = x[0, channel, top : top + 11, left : left + 11].double()
                b = y[0, channel, top : top + 11, left : left + 11].double()
                mean_a, mean_b = (window * a).sum(), (window * b).sum()
                var_a, var_b = (window * (a - mean_a) ** 2).sum(), (window * (b - mean_b) ** 2).sum()
                covariance = (window * (a - mean_a) * (b - mean_b)).sum()
                values.append(
                    (2 * mean_a * mean_b + c1)
                    * (2 * covariance + c2)
                    / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))
                )
    assert float(ssim(x, y)) == pytest.approx(float(torch.stack(values).mean()), rel=1e-5)


def test_ssim_orders_pictures_as_eyes_do() -> None:
    x = pictures()
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    assert (ssim(x, x + 0.1 * noise) > ssim(x, x + 0.5 * noise)).all()


def test_metrics_of_a_first_stage_that_returns_its_input() -> None:
    module = build_first_stage(FirstStageConfig(name="identity")).eval()
    batches = [torch.randint(0, 256, (n, 3, 32, 32), dtype=torch.uint8) for n in (2, 1)]
    metrics = reconstruction_metrics(module, batches, load_perceptual("random"))
    assert metrics == {
        "psnr": MAX_PSNR, "ssim": pytest.approx(1.0), "random_features": pytest.approx(0.0, abs=1e-6),
        "pictures": 3.0,
    }  # fmt: skip


def test_metrics_are_means_over_pictures_not_over_batches() -> None:
    torch.manual_seed(0)
    config = FirstStageConfig(base_channels=4, channel_multipliers=(1, 2), num_res_blocks=1)
    module = build_first_stage(config).eval()
    pixels = torch.randint(0, 256, (3, 3, 16, 16), dtype=torch.uint8)
    together = reconstruction_metrics(module, [pixels], None)
    uneven = reconstruction_metrics(module, [pixels[:1], pixels[1:]], None)
    assert together["pictures"] == 3.0
    assert uneven == pytest.approx(together, rel=1e-4)
    assert set(together) == {"psnr", "ssim", "pictures"}
