"""Which noise levels the samplers visit."""

from __future__ import annotations

import itertools
import math

import pytest

from trainer.config.training import DiffusionConfig
from trainer.diffusion.levels import MIN_ALPHA, make_levels
from trainer.diffusion.schedule import make_schedule

SCHEDULE = make_schedule(DiffusionConfig())


@pytest.mark.parametrize("steps", [1, 2, 7, 50, 333, 999, 1000])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "karras"])
def test_levels_fall_and_end_clean(spacing, steps):
    levels = make_levels(SCHEDULE, steps, spacing)
    assert len(levels) == len(levels.timesteps) == len(levels.alphas) - 1 == len(levels.sigmas) - 1
    assert len(levels) == steps
    assert all(
        later < earlier for earlier, later in zip(levels.timesteps, levels.timesteps[1:], strict=False)
    )
    assert 0 <= levels.timesteps[-1] <= levels.timesteps[0] <= 999
    assert (levels.alphas[-1], levels.sigmas[-1]) == (1.0, 0.0)
    assert levels.log_snr(steps) == math.inf
    for alpha, sigma in zip(levels.alphas, levels.sigmas, strict=True):
        assert alpha**2 + sigma**2 == pytest.approx(1)


def test_spacings_of_the_literature():
    # CompVis' ddim timesteps (uniform, plus one), and both rows of Lin et al. 2023, table 2.
    assert make_levels(SCHEDULE, 50, "leading").timesteps[:3] == (981.0, 961.0, 941.0)
    assert make_levels(SCHEDULE, 50, "leading").timesteps[-1] == 1.0
    assert make_levels(SCHEDULE, 10, "trailing").timesteps == tuple(range(999, 0, -100))


def test_leading_never_leaves_the_schedule():
    assert make_levels(SCHEDULE, 1000, "leading").timesteps == tuple(range(999, -1, -1))
    small = make_schedule(DiffusionConfig(num_timesteps=10))
    for steps in range(1, 11):
        assert make_levels(small, steps, "leading").timesteps[0] <= 9


@pytest.mark.parametrize("num_timesteps", [7, 10, 999, 1000, 4000])
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
def test_any_number_of_steps_covers_the_schedule(spacing, num_timesteps):
    schedule = make_schedule(DiffusionConfig(num_timesteps=num_timesteps))
    for steps in {*range(1, min(60, num_timesteps) + 1), num_timesteps // 2 + 1, num_timesteps - 1}:
        levels = make_levels(schedule, steps, spacing)
        assert levels.timesteps[0] >= 0.9 * num_timesteps - 1
        assert levels.timesteps[-1] <= num_timesteps / steps
        widths = [a - b for a, b in itertools.pairwise(levels.timesteps)]
        assert all(abs(width - num_timesteps / steps) <= 1 for width in widths)
        assert len(set(levels.timesteps)) == steps


def test_leading_with_few_steps_is_trailing():
    assert make_levels(SCHEDULE, 1, "leading").timesteps == (999.0,)
    assert make_levels(SCHEDULE, 9, "leading") == make_levels(SCHEDULE, 9, "trailing")
    assert make_levels(SCHEDULE, 10, "leading").timesteps == tuple(range(901, 0, -100))
    assert make_levels(SCHEDULE, 501, "leading").timesteps[0] == 999.0


def test_karras_is_even_in_the_seventh_root():
    levels = make_levels(SCHEDULE, 12, "karras")
    roots = [levels.ratio(i) ** (1 / 7) for i in range(12)]
    widths = [a - b for a, b in itertools.pairwise(roots)]
    assert widths == pytest.approx([widths[0]] * 11, rel=1e-9)
    assert levels.ratio(0) == pytest.approx(SCHEDULE.sigmas[-1].item())
    assert levels.ratio(11) == pytest.approx(SCHEDULE.sigmas[0].item())


def test_final_level_may_keep_the_first_noise():
    levels = make_levels(SCHEDULE, 50, "leading", "first")
    assert levels.alphas[-1] ** 2 == pytest.approx(SCHEDULE.alphas_cumprod[0].item())


def test_zero_terminal_snr_levels():
    schedule = make_schedule(DiffusionConfig(zero_terminal_snr=True, prediction="v"))
    levels = make_levels(schedule, 10, "trailing")
    assert (levels.alphas[0], levels.sigmas[0]) == (0.0, 1.0)
    finite = levels.finite()
    assert finite.alphas[0] == MIN_ALPHA
    assert finite.alphas[0] ** 2 + finite.sigmas[0] ** 2 == pytest.approx(1)
    assert finite.alphas[1:] == levels.alphas[1:]
    assert finite.sigmas[1:] == levels.sigmas[1:]
    with pytest.raises(ValueError, match="trailing"):
        make_levels(schedule, 10, "karras")


@pytest.mark.parametrize("spacing", ["leading", "trailing", "karras"])
@pytest.mark.parametrize("steps", [1, 2, 25, 1000])
def test_the_cosine_schedule_keeps_its_levels_apart(spacing, steps):
    """Its last alpha is 5e-5, below MIN_ALPHA; Karras spacing has hundreds of levels down there."""
    levels = make_levels(make_schedule(DiffusionConfig(beta_schedule="cosine")), steps, spacing)
    assert levels.finite() == levels
    distances = [levels.log_snr(i + 1) - levels.log_snr(i) for i in range(steps - 1)]
    assert all(distance > 1e-4 for distance in distances)


def test_the_stand_in_for_zero_stays_below_its_neighbour():
    config = DiffusionConfig(num_timesteps=8000, beta_start=1e-5, beta_end=1e-3, zero_terminal_snr=True)
    levels = make_levels(make_schedule(config), 8000, "trailing")
    assert 0 < levels.alphas[1] < MIN_ALPHA
    assert levels.finite().alphas[0] == levels.alphas[1] / 2


@pytest.mark.parametrize("steps", [0, -1, 1001])
def test_impossible_numbers_of_steps(steps):
    with pytest.raises(ValueError, match="between 1 and 1000"):
        make_levels(SCHEDULE, steps)


def test_tail():
    levels = make_levels(SCHEDULE, 10, "trailing")
    tail = levels.tail(7)
    assert len(tail) == 3
    assert tail.timesteps == levels.timesteps[7:]
    assert tail.ratio(0) == levels.ratio(7)
