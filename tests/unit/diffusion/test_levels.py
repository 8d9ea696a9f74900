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
