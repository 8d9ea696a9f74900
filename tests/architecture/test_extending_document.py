"""The files that docs/extending.md shows work as shown."""

from __future__ import annotations

import dataclasses
import re
import struct
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from data_pipeline.batch import Batch
from trainer.conditioning.build import CONDITIONERS, Conditioner
from trainer.config.models import FirstStageConfig, UNetConfig
from trainer.config.run import Config, ConfigError
from trainer.config.training import AutoencoderLossConfig, DiffusionConfig, DistributedConfig
from trainer.diffusion.levels import make_levels
from trainer.diffusion.samplers import SAMPLERS, Sampler
from trainer.diffusion.schedule import make_schedule
from trainer.distributed.build import build_engine
from trainer.distributed.env import DistributedEnv
from trainer.distributed.place import Place
from trainer.exit_codes import ExitCode
from trainer.first_stage.build import (
    FIRST_STAGES,
    build_first_stage,
    first_stage_tensors,
    load_first_stage,
)
from trainer.interop.unet_names import unet_links
from trainer.launch.rank import LAUNCHER_VARIABLE
from trainer.metrics.timer import StepTimer
from trainer.model import build_autoencoder
from trainer.models.unet import ATTENTIONS, UNet
from trainer.reliability.doubt import FAULTS_VARIABLE
from trainer.reliability.heartbeat import BOARD_VARIABLE
from trainer.reliability.job import JOB_VARIABLE, RESTARTS_VARIABLE, STARTS_VARIABLE
from trainer.stages.autoencoder import AutoencoderStage
from trainer.weights import write_weights

ROOT = Path(__file__).parents[2]
DOCUMENT = (ROOT / "docs/extending.md").read_text()


def shown(name: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The names that a file of the document defines."""
    (code,) = [block for block in re.findall(r"```python\n(.*?)```", DOCUMENT, re.DOTALL) if name in block]
    module = types.ModuleType(f"shown_{Path(name).stem}")
    monkeypatch.setitem(sys.modules, module.__name__, module)  # dataclasses look their module up
    exec(compile(code, name, "exec"), module.__dict__)
    return module.__dict__


def test_conditioning(monkeypatch: pytest.MonkeyPatch) -> None:
    names = shown("trainer/conditioning/brightness.py", monkeypatch)
    section = names["BrightnessConfig"](width=8)
    conditioner = Conditioner({"brightness": names["Brightness"](section, FirstStageConfig(), 10)})
    assert conditioner.vector_dim == 8
    pixels = torch.stack([torch.full((3, 8, 8), value) for value in (-1.0, 0.0, 1.0)])
    inputs = conditioner.frozen.prepare(
        ["", "", ""], {}, pixels, first_stage=None, seed=0, ordinals=torch.arange(3)
    )
    vector = conditioner.trained(inputs, {"brightness": torch.tensor([False, True, False])}).vector
    assert vector.shape == (3, 8)
    assert (vector[1] == 0).all()
    assert not torch.equal(vector[0], vector[2])
    vector.sum().backward()
    assert all(p.grad is not None for p in conditioner.trained.parameters())


def test_sampler(monkeypatch: pytest.MonkeyPatch) -> None:
    sample_midpoint = shown("trainer/diffusion/midpoint.py", monkeypatch)["sample_midpoint"]

    class Exact:
        """The denoiser of a Gaussian of mean 2 and deviation 0.5."""

        schedule = make_schedule(DiffusionConfig())
        prediction = "x0"

        def __call__(self, x: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
            alpha, sigma = self.schedule.level(float(timesteps[0]))
            return 2 + alpha * 0.25 / (alpha**2 * 0.25 + sigma**2) * (x - 2 * alpha)

    noise = torch.randn(20_000, 1, 1, 1, generator=torch.Generator().manual_seed(0))
    levels = make_levels(Exact.schedule, 100, "trailing")
    alpha, sigma = levels.alphas[0], levels.sigmas[0]
    start = 2 * alpha + (0.25 * alpha**2 + sigma**2) ** 0.5 * noise
    made, euler = (
        sampler(Exact(), start, levels) for sampler in (Sampler(sample_midpoint), SAMPLERS["euler"])
    )
    assert made.mean() == pytest.approx(2, abs=0.02)
    assert abs(made.std() - 0.5) < max(0.02, abs(euler.std() - 0.5))


def test_unet_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ATTENTIONS, "mixing", shown("trainer/models/mixing.py", monkeypatch)["Mixing"])
    small = {"model_channels": 16, "channel_multipliers": (1, 2), "num_groups": 4, "head_dim": 16}
    config = UNetConfig(attention="mixing", attention_factors=(1,), **small)  # type: ignore[arg-type]
    torch.manual_seed(0)
    plain = dataclasses.replace(config, attention_factors=())
    unet, without = (UNet(c, in_channels=3, out_channels=3, context_dim=5) for c in (config, plain))
    without.load_state_dict(unet.state_dict(), strict=False)
    nn.init.normal_(unet.conv_out.weight, std=0.1)
    without.conv_out.load_state_dict(unet.conv_out.state_dict())
    x, timesteps, context = torch.randn(2, 3, 8, 8), torch.tensor([1, 9]), torch.randn(2, 4, 5)
    out = unet(x, timesteps, context)
    torch.testing.assert_close(out, without(x, timesteps, context))  # it starts as the identity
    out.square().sum().backward()
    pointwise = [p for name, p in unet.named_parameters() if "pointwise.weight" in name]
    assert len(pointwise) == 2 + 3 + 1  # down, up, middle
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in pointwise)
    with pytest.raises(ConfigError, match="depthwise"):
        unet_links(config, unet.state_dict(), "compvis")


def test_first_stage(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(
        FIRST_STAGES, "shuffle", shown("trainer/first_stage/shuffle.py", monkeypatch)["Shuffle"]
    )
    config = dataclasses.replace(
        FirstStageConfig(),
        name="shuffle",
        channel_multipliers=(1, 1, 1),
        latent_channels=48,  # type: ignore[arg-type]
    )
    stage = build_first_stage(config)
    stage.set_latent_statistics(torch.full((48,), 0.1), torch.full((48,), 3.0))
    pixels = torch.rand(2, 3, 16, 24, generator=torch.Generator().manual_seed(0)) * 2 - 1
    latents = stage.latents(pixels, None)
    assert latents.shape == (2, 48, 4, 6)
    torch.testing.assert_close(stage.decode(latents), pixels)
    write_weights(str(tmp_path / "shuffle.safetensors"), *first_stage_tensors(stage))
    loaded = load_first_stage(dataclasses.replace(config, weights=str(tmp_path / "shuffle.safetensors")))
    assert torch.equal(loaded.latents(pixels, None), latents)


def test_first_stage_trains(monkeypatch: pytest.MonkeyPatch) -> None:
    """As `stage=autoencoder` does: builder, engines, loss, discriminator and a learned log variance."""
    Shuffle = shown("trainer/first_stage/shuffle.py", monkeypatch)["Shuffle"]
    monkeypatch.setitem(FIRST_STAGES, "shuffle", Shuffle)
    first_stage = FirstStageConfig(name="shuffle", channel_multipliers=(1, 1, 1), latent_channels=48)  # type: ignore[arg-type]
    config = Config(
        stage="autoencoder",
        global_batch_size=4,
        micro_batch_size=2,
        first_stage=first_stage,
        autoencoder_loss=AutoencoderLossConfig(
            perceptual_weight=0.0,
            learned_logvar=True,
            discriminator_weight=0.01,
            discriminator_start=0,
            discriminator_channels=4,
            discriminator_layers=1,
        ),
        distributed=DistributedConfig(engine="torch", precision="fp32"),
    )
    networks = build_autoencoder(config)
    assert isinstance(networks["autoencoder"], Shuffle)
    with torch.no_grad():
        networks["autoencoder"].gain.fill_(0.5)
    env = DistributedEnv.detect({})
    engines = {name: build_engine(network, config, env) for name, network in networks.items()}
    stage = AutoencoderStage(config, engines, None, StepTimer(env.device))
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (4, 3, 16, 16), dtype=torch.uint8, generator=generator)
    batch = Batch(pixels, ("",) * 4, {}, ("",) * 4, torch.arange(4), torch.arange(4), {})
    metrics = [stage.train_step(batch, step, 0.02) for step in range(40)]
    assert float(metrics[-1]["reconstruction"]) < 0.3 * float(metrics[0]["reconstruction"])
    assert 0.9 < float(stage.module.gain) < 1.1  # type: ignore[arg-type]
    assert {"generator", "adaptive_weight", "discriminator", "logvar"} <= metrics[-1].keys()
    stage.finish(iter([batch]))
    assert (stage.state()["latent_scale"] > 1).all()


SPEAKING_RANK = """
import os, sys
from trainer.reliability.heartbeat import board_from_environment
rank, local_rank = int(os.environ["RANK"]), int(os.environ["LOCAL_RANK"])
board_from_environment(local_rank).write(local_rank, deadline=1e9, step=rank, phase="step")
print(rank, local_rank, *(os.environ[name] for name in sys.argv[2:]))
sys.exit(int(sys.argv[1]) if rank == 3 else 0)
"""


@pytest.mark.parametrize("code", [ExitCode.DONE, ExitCode.RETRYABLE, ExitCode.USER_ERROR])
def test_launcher(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, code: ExitCode) -> None:
    run_node = shown("trainer/launch/hosts.py", monkeypatch)["run_node"]
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    names = ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    command = [sys.executable, "-c", SPEAKING_RANK, str(int(code)), *names]
    ended = [run_node(command, node, 2, 2, "10.0.0.1", 4711, tmp_path) for node in range(2)]
    assert ended == [ExitCode.DONE, code]
    said = [(tmp_path / f"rank_{rank}.log").read_text().split() for rank in (0, 1, 3)]
    assert said == [[str(rank), str(rank % 2), "4", "2", "10.0.0.1", "4711"] for rank in (0, 1, 3)]
    deadline, _, _, step, phase = struct.unpack_from("=dddq24s", (tmp_path / "heartbeat-1").read_bytes(), 64)
    assert (deadline, step, phase.rstrip(b"\0")) == (1e9, 3, b"step")


def test_a_launcher_s_variables_are_all_in_the_document() -> None:
    table = DOCUMENT[DOCUMENT.index("## A launcher") :]
    place = Place(0, 0, 1, 1, "host", 1)
    for name in (
        *place.variables(),
        BOARD_VARIABLE,
        LAUNCHER_VARIABLE,
        RESTARTS_VARIABLE,
        STARTS_VARIABLE,
        JOB_VARIABLE,
        FAULTS_VARIABLE,
    ):
        assert f"`{name}`" in table, name


def test_what_the_document_names_exists() -> None:
    for path in set(re.findall(r"`((?:trainer|tests|data_pipeline|docs)/[\w./]+?)`", DOCUMENT)):
        assert (ROOT / path).exists(), path
    assert "brightness" not in CONDITIONERS
    for name in ("CONDITIONERS", "SAMPLERS", "ATTENTIONS", "FIRST_STAGES"):
        assert name in DOCUMENT
