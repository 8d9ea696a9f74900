"""Classifier-free guidance, image-to-image starts and inpainting by replacement."""

from __future__ import annotations

import pytest
import torch

from trainer.config.training import DiffusionConfig
from trainer.diffusion.denoiser import ClassifierFreeGuidance, guide
from trainer.diffusion.editing import ReplacementInpainting, image_to_image_start
from trainer.diffusion.levels import make_levels
from trainer.diffusion.schedule import make_schedule

SCHEDULE = make_schedule(DiffusionConfig())


def pair():
    return torch.randn(2, 3, 4, 5, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_scale_one_is_the_conditional_prediction_bit_for_bit():
    cond, uncond = pair()
    assert torch.equal(guide(cond, uncond, 1.0), cond)


def test_guidance_is_the_formula_of_the_paper():
    cond, uncond = pair()
    torch.testing.assert_close(guide(cond, uncond, 7.5), uncond + 7.5 * (cond - uncond))
    torch.testing.assert_close(guide(cond, uncond, 0.0), uncond)


def test_rescale_interpolates_to_the_deviation_of_the_conditional_prediction():
    cond, uncond = pair()
    plain, full, half = (guide(cond, uncond, 7.5, phi) for phi in (0.0, 1.0, 0.5))
    for i in range(3):
        assert full[i].std().item() == pytest.approx(cond[i].std().item())
        assert full[i].std() < plain[i].std()
    torch.testing.assert_close(half, (plain + full) / 2)


class Recorder:
    """Predicts the index of each row, and remembers what it was asked."""

    schedule = SCHEDULE
    prediction = "eps"

    def __call__(self, x, timesteps):
        self.x, self.timesteps = x, timesteps
        return torch.arange(len(x), dtype=x.dtype).view(-1, 1, 1, 1).expand(x.shape)


def test_one_doubled_pass_conditions_first():
    both = Recorder()
    guided = ClassifierFreeGuidance(both, 3.0)
    x, timesteps = torch.randn(2, 1, 2, 2), torch.tensor([7, 7])
    out = guided(x, timesteps)
    assert torch.equal(both.x, torch.cat([x, x]))
    assert both.timesteps.tolist() == [7] * 4
    # Conditional rows predict 0 and 1, unconditional ones 2 and 3: cond + 2 (cond - uncond) = cond - 4.
    assert out[:, 0, 0, 0].tolist() == [-4.0, -3.0]
    assert guided.schedule is SCHEDULE
    assert guided.prediction == "eps"


@pytest.mark.parametrize(("strength", "steps"), [(1.0, 10), (0.75, 7), (0.5, 5), (0.01, 1)])
def test_image_to_image_runs_the_last_share_of_the_steps(strength, steps):
    levels = make_levels(SCHEDULE, 10, "trailing")
    latents, noise = pair()
    x, remaining = image_to_image_start(latents, noise, levels, strength)
    assert len(remaining) == steps
    assert remaining.timesteps == levels.timesteps[-steps:]
    alpha, sigma = SCHEDULE.level(remaining.timesteps[0])
    torch.testing.assert_close(x, alpha * latents + sigma * noise)


@pytest.mark.parametrize("strength", [0.0, -0.5, 1.1])
def test_impossible_strengths(strength):
    with pytest.raises(ValueError, match="strength"):
        image_to_image_start(*pair(), make_levels(SCHEDULE, 10), strength)


def test_replacement_shows_the_model_the_known_part_at_this_noise_level():
    latents, noise = pair()
    mask = torch.zeros(3, 1, 5, 5)
    mask[:, :, :, 3:] = 1
    model = Recorder()
    inpainting = ReplacementInpainting(model, latents, mask, noise)
    x = torch.full_like(latents, 9.0)
    out = inpainting(x, torch.tensor([400] * 3))
    alpha, sigma = SCHEDULE.level(400.0)
    torch.testing.assert_close(model.x[..., :3], (alpha * latents + sigma * noise)[..., :3])
    assert (model.x[..., 3:] == 9).all()
    # In the known part the prediction is the noise that leads from x to the known latents.
    torch.testing.assert_close(((x - sigma * out) / alpha)[..., :3], latents[..., :3])
    assert torch.equal(out[1, ..., 3:], torch.ones_like(out[1, ..., 3:]))
