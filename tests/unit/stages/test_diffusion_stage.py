"""The diffusion stage on one process: what one step computes for each objective, from the draws alone."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from data_pipeline.batch import Batch
from trainer.config.io import load_config
from trainer.config.run import Config
from trainer.diffusion.objective import draw_timesteps
from trainer.diffusion.processes import at_size
from trainer.distributed.env import DistributedEnv
from trainer.distributed.torch_engine import TorchEngine
from trainer.metrics.timer import StepTimer
from trainer.model import build_model
from trainer.pixels import to_unit_range
from trainer.rng import Purpose, normal, permutation, uniform
from trainer.stages.diffusion import DiffusionStage

CPU = torch.device("cpu")
N = 8
SETTINGS = [
    "data.image_size=8",
    "first_stage.name=identity",
    "unet={model_channels: 8, channel_multipliers: [1], num_res_blocks: 1, attention_factors: [], "
    "head_dim: 8, num_groups: 4, attention: plain}",
    f"global_batch_size={N}",
    "distributed={engine: torch, precision: fp32, channels_last: false}",
    "diffusion.timesteps=stratified",
]
FLOW = ["diffusion.process=flow", "diffusion.prediction=velocity"]
EDM = ["diffusion.process=edm", "diffusion.prediction=edm", "diffusion.density=log_normal"]


def make(*settings: str) -> tuple[Config, DiffusionStage]:
    config = load_config(None, [*SETTINGS, *settings])
    torch.manual_seed(0)
    model = build_model(config)
    env = DistributedEnv(0, 0, 1, 1, "127.0.0.1", 29500, "single", CPU)
    engine = TorchEngine(model.network, config, env)
    return config, DiffusionStage(
        config, {"unet": engine}, model.conditioner, model.first_stage, StepTimer(CPU)
    )


def make_batch(height: int = 8, width: int | None = None, **conditions: Tensor) -> Batch:
    generator = torch.Generator().manual_seed(0)
    shape = (N, 3, height, width or height)
    pixels = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    return Batch(pixels, ("",) * N, conditions, ("",) * N, torch.arange(N) + 40, torch.arange(N), {})


def draws(config: Config, batch: Batch, step: int) -> tuple[Tensor, Tensor, Tensor]:
    """Latents, noise and timesteps of that step, keyed by sample."""
    latents = to_unit_range(batch.pixels)
    noise = normal(config.seed, batch.ordinals, Purpose.NOISE, tuple(latents.shape[1:]))
    slots = permutation(config.seed, step, Purpose.STRATUM, N)
    uniforms = uniform(config.seed, batch.ordinals, Purpose.TIMESTEP, ())
    diffusion = at_size(config.diffusion, *batch.pixels.shape[2:])
    return latents, noise, draw_timesteps(diffusion, uniforms, slots, N)


@pytest.mark.parametrize(
    "settings",
    [
        [],
        FLOW,
        [*FLOW, "diffusion.density=logit_normal", "diffusion.shift=3", "diffusion.weighting=cosmap"],
        [*FLOW, "diffusion.density=mode", "diffusion.shift=2", "diffusion.shift_pixels=4"],
        ["diffusion.process=flow", "diffusion.prediction=x0"],
        EDM,
        [*EDM, "diffusion.sigma_data=0.5"],
    ],
)
def test_the_first_loss_is_that_of_a_prediction_of_zero(settings: list[str]) -> None:
    """The last convolution starts at zero, so the first loss is the weighted mean square of the target."""
    config, stage = make(*settings, "micro_batch_size=8")
    batch = make_batch()
    latents, noise, timesteps = draws(config, batch, 3)
    time = timesteps.double().view(-1, 1, 1, 1)
    match config.diffusion.prediction:
        case "eps":
            target = noise
        case "velocity":
            target = noise - latents
        case "x0":
            target = latents
        case _:
            sigma, data = (4 * time).exp(), config.diffusion.sigma_data
            skipped = data**2 / (sigma**2 + data**2) * (latents + sigma * noise)
            target = (latents - skipped) * (sigma**2 + data**2).sqrt() / (sigma * data)
    t = time / 1000
    weights = 2 / (math.pi * (1 - 2 * t + 2 * t**2)) if config.diffusion.weighting == "cosmap" else 1.0
    loss = stage.train_step(batch, 3, 1e-3)["loss"].item()
    assert loss == pytest.approx((weights * target.double() ** 2).mean().item(), rel=1e-5)


@pytest.mark.parametrize("settings", [FLOW, EDM], ids=["flow", "edm"])
def test_micro_batches_draw_the_same(settings: list[str]) -> None:
    losses = []
    for micro in (8, 2):
        _, stage = make(*settings, f"micro_batch_size={micro}")
        losses.append([stage.train_step(make_batch(), step, 1e-3)["loss"].item() for step in range(3)])
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


@pytest.mark.parametrize("settings", [[], FLOW, EDM], ids=["eps", "flow", "edm"])
def test_it_learns_one_batch(settings: list[str]) -> None:
    _, stage = make(*settings, "micro_batch_size=8")
    losses = [stage.train_step(make_batch(), 0, 3e-3)["loss"].item() for _ in range(60)]
    assert losses[-1] < 0.7 * losses[0]
    assert all(p.grad is None or p.grad.isfinite().all() for p in stage.engines["unet"].module.parameters())


@pytest.mark.parametrize("settings", [[], FLOW, EDM], ids=["eps", "flow", "edm"])
def test_uncertainty_is_learned_beside_the_network(settings: list[str]) -> None:
    """The first loss is the plain one; "error" goes on as it; u follows, and previews do not see it."""
    learned = "diffusion.learned_uncertainty=true"
    _, plain = make(*settings, "micro_batch_size=4")
    _, stage = make(*settings, learned, "micro_batch_size=4", "sampling={num_previews: 2, steps: 3}")
    expected = plain.train_step(make_batch(), 0, 0.0)
    first = stage.train_step(make_batch(), 0, 0.0)
    assert first["loss"].item() == first["error"].item() == expected["loss"].item()
    assert "error" not in expected
    steps = [stage.train_step(make_batch(), step, 3e-3) for step in range(60)]
    assert steps[-1]["error"] < 0.9 * steps[0]["error"]
    assert steps[-1]["loss"] < steps[-1]["error"]
    weight = stage.engines["unet"].module.get_parameter("uncertainty.linear.weight")
    assert weight.isfinite().all()
    assert weight.any()
    assert stage.preview(make_batch()).pixels.shape == (2, 3, 8, 8)


def test_a_bucket_has_its_own_shift() -> None:
    """Pictures of twice the edge are seen with more noise."""
    config, _ = make(*FLOW, "diffusion.shift=2", "diffusion.shift_pixels=8", "micro_batch_size=8")
    small, large = (draws(config, make_batch(edge), 0)[2] / 1000 for edge in (8, 16))
    torch.testing.assert_close(large / (1 - large), 2 * small / (1 - small), rtol=1e-3, atol=1e-3)


def test_the_network_is_told_what_it_was_trained_with() -> None:
    """Sampling a flow asks the network at float32 timesteps in the range of training."""
    _, stage = make(*FLOW, "micro_batch_size=8", "sampling={num_previews: 2, steps: 4, spacing: trailing}")
    asked: list[Tensor] = []
    network = stage.engines["unet"].module
    assert isinstance(network, nn.Module)
    hook = network.register_forward_pre_hook(lambda _, args: asked.append(args[1]))
    stage.train_step(make_batch(), 0, 0.0)
    assert asked[0].min() > 0
    assert asked[0].max() <= 1000
    made = stage.preview(make_batch())
    hook.remove()
    assert made.pixels.shape == (2, 3, 8, 8)
    assert [float(timesteps[0]) for timesteps in asked[1:]] == [1000.0, 750.0, 500.0, 250.0]
    assert {timesteps.dtype for timesteps in asked} == {torch.float32}


def test_previews_have_the_size_and_the_conditions_of_their_batch_and_the_prompts_of_the_run() -> None:
    """Of a bucket of another shape, too; prompts say what they say beside other conditions."""
    text = "text_transformer: {width: 16, layers: 1, heads: 1, head_dim: 8, max_tokens: 8}"
    settings = (f"conditioning={{depth: {{}}, {text}}}", "micro_batch_size=8")
    sampling = "sampling={num_previews: 3, steps: 2, prompts: [red, blue]}"
    _, stage = make(*settings, sampling)
    shown = stage.preview(make_batch(4, 12, depth=torch.rand(N, 1, 4, 12)))
    assert shown.pixels.shape == (3, 3, 4, 12)
    assert shown.captions == ("red", "blue", "red")
    _, stage = make(*settings, "sampling={num_previews: 3, steps: 2}")
    assert stage.preview(make_batch(4, 12, depth=torch.rand(N, 1, 4, 12))).captions == ("", "", "")
