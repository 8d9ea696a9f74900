"""Each sampler, step by step in float64, against diffusers' scheduler of the same name and settings.

diffusers keeps its tables in float32 and rounds x to float32 inside some steps, so here its modules see a
torch whose float32 is float64, and get float64 tables from the same betas: agreement to 1e-9 is then about
the formulas, not about rounding.
Deliberate differences, kept out of the comparison:
- every sampler here starts from unit noise in the scale of training; diffusers starts Euler and Heun with
  trailing spacing from sigma times noise (0.2 % less deviation), so the same x is handed to both here;
- "leading" is CompVis' T // n for every sampler; diffusers' DPM-Solver++ and UniPC use T // (n + 1), so
  their timesteps are set from ours;
- diffusers' DPM-Solver++ rounds Karras timesteps, ours are real numbers: the test's model rounds them;
- PLMS extrapolates eps whatever the network predicts; diffusers extrapolates raw v outputs, which belong
  to different levels: compared for eps;
- diffusers' DDPM takes t - T // n as the next timestep even if the next one visited differs (T % n != 0).
"""

from __future__ import annotations

import importlib
import itertools

import diffusers
import numpy as np
import pytest
import torch

from trainer.config.training import DiffusionConfig
from trainer.diffusion.levels import make_levels
from trainer.diffusion.samplers import SAMPLERS
from trainer.diffusion.schedule import make_schedule

SHAPE = (2, 4, 3, 3)
STEPS = 10


class SmoothDenoiser:
    """A fixed nonlinear function of x and t, in float64."""

    def __init__(self, prediction: str = "eps", *, rescaled: bool = False) -> None:
        self.config = DiffusionConfig(prediction=prediction, zero_terminal_snr=rescaled)
        self.schedule = make_schedule(self.config)
        self.prediction = prediction

    def __call__(self, x: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        time = timesteps.double().round().view(-1, 1, 1, 1) / 1000
        return torch.sin(1.3 * x + 3 * time) + 0.2 * x * torch.cos(5 * time) - 0.1 * x.roll(1, dims=1)


def noise(index: int) -> torch.Tensor:
    return torch.randn(SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(index))


def start() -> torch.Tensor:
    return noise(10_000)


def our_trajectory(name, denoiser, spacing, *, eta=0.0, final="clean", steps=STEPS):
    """x after every step (x at the level that the step ends on), ours."""
    levels = make_levels(denoiser.schedule, steps, spacing, final)
    x0s = []
    result = SAMPLERS[name](
        denoiser, start(), levels, noise=noise, eta=eta, callback=lambda i, n, x0: x0s.append(x0)
    )
    return levels, result, x0s


def build(cls, denoiser, **settings):
    """A diffusers scheduler with our betas, in float64."""
    config = denoiser.config
    scheduler = cls(
        num_train_timesteps=1000,
        trained_betas=denoiser.schedule.betas.numpy(),
        prediction_type={"eps": "epsilon", "x0": "sample", "v": "v_prediction"}[denoiser.prediction],
        **settings,
    )
    assert config.num_timesteps == 1000
    scheduler.betas = denoiser.schedule.betas
    scheduler.alphas = 1.0 - denoiser.schedule.betas
    scheduler.alphas_cumprod = denoiser.schedule.alphas_cumprod.clone()
    if hasattr(scheduler, "final_alpha_cumprod"):
        one = torch.tensor(1.0, dtype=torch.float64)
        keep_first = not settings.get("set_alpha_to_one", True)
        scheduler.final_alpha_cumprod = scheduler.alphas_cumprod[0] if keep_first else one
    if hasattr(scheduler, "alpha_t"):
        scheduler.alpha_t = scheduler.alphas_cumprod.sqrt()
        scheduler.sigma_t = (1 - scheduler.alphas_cumprod).sqrt()
        scheduler.lambda_t = scheduler.alpha_t.log() - scheduler.sigma_t.log()
    return scheduler


MODULES = (
    "ddpm",
    "ddim",
    "pndm",
    "euler_discrete",
    "euler_ancestral_discrete",
    "heun_discrete",
    "dpmsolver_multistep",
    "unipc_multistep",
)


class DoublePrecisionTorch:
    """torch, except that float32 means float64."""

    float32 = torch.float64

    def __getattr__(self, name):
        return getattr(torch, name)


@pytest.fixture(autouse=True)
def double_precision_with_numbered_noise(monkeypatch):
    """diffusers computes in float64, and its randn_tensor gives noise(0), noise(1), ..."""
    counter = itertools.count()

    def draw(shape, **_):
        assert tuple(shape) == SHAPE
        return noise(next(counter))

    for name in MODULES:
        module = importlib.import_module(f"diffusers.schedulers.scheduling_{name}")
        monkeypatch.setattr(module, "torch", DoublePrecisionTorch())
        if hasattr(module, "randn_tensor"):
            monkeypatch.setattr(module, "randn_tensor", draw)


def assert_same(ours, theirs, tolerance=1e-9):
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


PREDICTIONS = ("eps", "v", "x0")


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("eta", [0.0, 0.6, 1.0])
@pytest.mark.parametrize(("spacing", "final"), [("leading", "first"), ("trailing", "clean")])
def test_ddim(prediction, eta, spacing, final):
    denoiser = SmoothDenoiser(prediction)
    levels, ours, x0s = our_trajectory("ddim", denoiser, spacing, eta=eta, final=final)
    scheduler = build(
        diffusers.DDIMScheduler,
        denoiser,
        clip_sample=False,
        set_alpha_to_one=final == "clean",
        steps_offset=1,
        timestep_spacing=spacing,
    )
    scheduler.set_timesteps(STEPS)
    assert scheduler.timesteps.tolist() == list(levels.timesteps)
    x = start()
    for t, x0 in zip(scheduler.timesteps, x0s, strict=True):
        step = scheduler.step(denoiser(x, t.expand(2)), t, x, eta=eta)
        assert_same(x0, step.pred_original_sample)
        x = step.prev_sample
    assert_same(ours, x)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_ddpm(prediction):
    denoiser = SmoothDenoiser(prediction)
    levels, ours, x0s = our_trajectory("ddpm", denoiser, "trailing")
    scheduler = build(diffusers.DDPMScheduler, denoiser, clip_sample=False, timestep_spacing="trailing")
    scheduler.one = torch.tensor(1.0, dtype=torch.float64)
    scheduler.set_timesteps(STEPS)
    assert scheduler.timesteps.tolist() == list(levels.timesteps)
    x = start()
    for t, x0 in zip(scheduler.timesteps, x0s, strict=True):
        step = scheduler.step(denoiser(x, t.expand(2)), t, x)
        assert_same(x0, step.pred_original_sample)
        x = step.prev_sample
    # diffusers adds noise of deviation 1e-10 at the last step, where ours adds none.
    assert_same(ours, x)


@pytest.mark.parametrize(("spacing", "final"), [("leading", "first"), ("trailing", "clean")])
def test_plms(spacing, final):
    denoiser = SmoothDenoiser("eps")
    _, ours, _ = our_trajectory("plms", denoiser, spacing, final=final)
    scheduler = build(
        diffusers.PNDMScheduler,
        denoiser,
        skip_prk_steps=True,
        set_alpha_to_one=final == "clean",
        steps_offset=1,
        timestep_spacing=spacing,
    )
    scheduler.set_timesteps(STEPS)
    x = start()
    for t in scheduler.timesteps:
        x = scheduler.step(denoiser(x, t.expand(2)), t, x).prev_sample
    assert_same(ours, x)


def continuous(cls, denoiser, levels, spacing, **settings):
    """A diffusers scheduler that works on sigma / alpha, with float64 sigmas and our timesteps."""
    scheduler = build(
        cls, denoiser, timestep_spacing="linspace" if spacing == "karras" else spacing, **settings
    )
    scheduler.set_timesteps(len(levels))
    ratios = [levels.finite().ratio(i) for i in range(len(levels) + 1)]
    timesteps = torch.tensor(levels.timesteps, dtype=torch.float64)
    return scheduler, torch.tensor(ratios, dtype=torch.float64), timesteps


@pytest.mark.parametrize("prediction", ["eps", "v"])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "karras"])
@pytest.mark.parametrize("name", ["euler", "euler_ancestral", "heun"])
def test_euler_family(name, prediction, spacing):
    cls = {
        "euler": diffusers.EulerDiscreteScheduler,
        "euler_ancestral": diffusers.EulerAncestralDiscreteScheduler,
        "heun": diffusers.HeunDiscreteScheduler,
    }[name]
    # Not offered for the ancestral one, whose sigmas are replaced by ours below.
    spacing_settings = {} if name == "euler_ancestral" else {"use_karras_sigmas": spacing == "karras"}
    denoiser = SmoothDenoiser(prediction)
    levels, ours, _ = our_trajectory(name, denoiser, spacing)
    scheduler, ratios, timesteps = continuous(
        cls, denoiser, levels, spacing, steps_offset=1, **spacing_settings
    )
    if name == "heun":
        ratios = torch.cat([ratios[:1], ratios[1:-1].repeat_interleave(2), ratios[-1:]])
        timesteps = torch.cat([timesteps[:1], timesteps[1:].repeat_interleave(2)])
    if not (name == "euler_ancestral" and spacing == "karras"):
        # Their own float32 tables agree with our levels before they are replaced.
        np.testing.assert_allclose(scheduler.sigmas, ratios, rtol=2e-5)
        np.testing.assert_allclose(scheduler.timesteps, timesteps, atol=1e-2, rtol=1e-5)
    scheduler.sigmas, scheduler.timesteps = ratios, timesteps
    y = start() / levels.alphas[0]
    for t in timesteps:
        model_input = scheduler.scale_model_input(y, t)
        y = scheduler.step(denoiser(model_input, t.expand(2)), t, y).prev_sample
    assert_same(ours, y)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("spacing", ["leading", "trailing", "karras"])
@pytest.mark.parametrize("final", ["clean", "first"])
@pytest.mark.parametrize("steps", [10, 20])
@pytest.mark.parametrize("name", ["dpmpp_2m", "dpmpp_sde", "unipc"])
def test_log_snr_family(name, prediction, spacing, final, steps):
    cls, settings = {
        "dpmpp_2m": (diffusers.DPMSolverMultistepScheduler, {"algorithm_type": "dpmsolver++"}),
        "dpmpp_sde": (diffusers.DPMSolverMultistepScheduler, {"algorithm_type": "sde-dpmsolver++"}),
        "unipc": (diffusers.UniPCMultistepScheduler, {"solver_type": "bh2"}),
    }[name]
    denoiser = SmoothDenoiser(prediction)
    levels, ours, _ = our_trajectory(name, denoiser, spacing, final=final, steps=steps)
    scheduler, ratios, timesteps = continuous(
        cls,
        denoiser,
        levels,
        spacing,
        solver_order=2,
        steps_offset=1,
        use_karras_sigmas=spacing == "karras",
        final_sigmas_type="zero" if final == "clean" else "sigma_min",
        **settings,
    )
    if spacing != "leading":
        np.testing.assert_allclose(scheduler.sigmas, ratios, rtol=2e-5)
        np.testing.assert_allclose(scheduler.timesteps, timesteps, atol=0.51)
    scheduler.sigmas, scheduler.timesteps = ratios, timesteps
    x = start()
    for t in timesteps:
        x = scheduler.step(denoiser(x, t.expand(2)), t, x).prev_sample
    assert_same(ours, x)


@pytest.mark.parametrize("name", ["ddim", "euler", "dpmpp_2m", "unipc"])
def test_zero_terminal_snr(name):
    denoiser = SmoothDenoiser("v", rescaled=True)
    levels, ours, _ = our_trajectory(name, denoiser, "trailing")
    cls = {
        "ddim": diffusers.DDIMScheduler,
        "euler": diffusers.EulerDiscreteScheduler,
        "dpmpp_2m": diffusers.DPMSolverMultistepScheduler,
        "unipc": diffusers.UniPCMultistepScheduler,
    }[name]
    if name == "ddim":
        scheduler = build(cls, denoiser, clip_sample=False, timestep_spacing="trailing")
        scheduler.set_timesteps(STEPS)
    else:
        scheduler, ratios, timesteps = continuous(cls, denoiser, levels, "trailing")
        scheduler.sigmas, scheduler.timesteps = ratios, timesteps
    scale = 1.0 / levels.finite().alphas[0] if name == "euler" else 1.0
    x = start() * scale
    for t in scheduler.timesteps:
        model_input = scheduler.scale_model_input(x, t)
        x = scheduler.step(denoiser(model_input, t.expand(2)), t, x).prev_sample
    assert_same(ours, x)
