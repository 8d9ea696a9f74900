"""Latent statistics that were never measured are a state of their own, which no second stage takes for 1."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from data_pipeline.batch import Batch
from data_pipeline.config import DataConfig
from data_pipeline.loader import build_loader
from data_pipeline.tools.scenes.scene import SceneOptions
from data_pipeline.tools.scenes.write_shards import SynthesisOptions, synthesize
from trainer.__main__ import main
from trainer.checkpoint.manager import CheckpointManager
from trainer.config.io import config_to_dict, load_config
from trainer.config.models import FirstStageConfig
from trainer.config.run import Config, ConfigError
from trainer.config.training import (
    AutoencoderLossConfig,
    CheckpointConfig,
    DistributedConfig,
    EMAConfig,
)
from trainer.distributed.env import DistributedEnv
from trainer.distributed.torch_engine import TorchEngine
from trainer.ema import EMA
from trainer.first_stage.build import build_first_stage, first_stage_tensors, load_first_stage
from trainer.first_stage.statistics import GIVEN, MARK, MEASURED, MEASURED_TENSOR, UNMEASURED
from trainer.interop.convert import import_weights
from trainer.interop.export import export_weights
from trainer.metrics.timer import StepTimer
from trainer.model import build_autoencoder, build_model
from trainer.stages.autoencoder import AutoencoderStage
from trainer.weights import read_weights, write_weights

TINY = FirstStageConfig(
    base_channels=8, channel_multipliers=(1, 2), num_res_blocks=1, latent_channels=3, codebook_size=16
)
STATISTICS = {"latent_shift", "latent_scale"}
SAMPLES = 12
ENV = DistributedEnv.detect({})


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("shards")
    scene = SceneOptions(min_edge=32, max_edge=40)
    list(synthesize(str(folder), SynthesisOptions(SAMPLES, samples_per_shard=6, failed_share=0, scene=scene)))
    return f"{folder}/*.tar"


class TinyRun:
    """A first stage's run that saves what `ldm train` saves, without the loop."""

    def __init__(self, run_dir: Path, statistics: str = "global") -> None:
        self.config = Config(
            run_dir=str(run_dir),
            stage="autoencoder",
            global_batch_size=4,
            micro_batch_size=4,
            data=DataConfig(shards="/gone/*.tar", image_size=32),
            first_stage=TINY,
            autoencoder_loss=AutoencoderLossConfig(
                perceptual_weight=0.0,
                discriminator_weight=0.0,
                latent_statistics=statistics,  # type: ignore[arg-type]
            ),
            distributed=DistributedConfig(engine="torch", precision="fp32", channels_last=False),
            checkpoint=CheckpointConfig(asynchronous=False, keep_last=9),
            ema=EMAConfig(decay=0.5),
        )
        engine = TorchEngine(build_autoencoder(self.config)["autoencoder"], self.config, ENV)
        self.stage = AutoencoderStage(self.config, {"autoencoder": engine}, None, StepTimer(ENV.device))
        self.ema = EMA(self.config.ema, engine.fragments())
        self.manager = CheckpointManager(self.config, ENV)

    def train(self, *, finish: bool) -> None:
        """One step, what the last step of a run does if asked for, and a checkpoint."""
        engine = self.stage.engines["autoencoder"]
        step = engine.optimizer_steps
        self.stage.train_step(batch(step), step, 1e-3)
        self.ema.update(step + 1)
        if finish:
            self.stage.finish(iter([batch(step)]))
        self.save(self.stage.state())

    def save(self, tensors: dict[str, torch.Tensor]) -> None:
        """A checkpoint with these tensors beside the weights."""
        engine = self.stage.engines["autoencoder"]
        self.manager.save(
            engine.optimizer_steps, self.stage.engines, self.ema, state={}, tensors=tensors, loss=None
        )
        self.manager.wait()


def batch(seed: int) -> Batch:
    size = 4
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (size, 3, 32, 32), dtype=torch.uint8, generator=generator)
    order = torch.arange(size)
    return Batch(pixels, ("",) * size, {}, ("",) * size, order, order, {})


@pytest.fixture
def run(tmp_path: Path) -> Iterator[TinyRun]:
    made = TinyRun(tmp_path / "run")
    yield made
    made.manager.close()


def reads(file: Path, **changes: object) -> FirstStageConfig:
    return dataclasses.replace(TINY, weights=str(file), **changes)  # type: ignore[arg-type]


def export(run: TinyRun, file: Path, *options: str) -> dict[str, str]:
    """Metadata of what `ldm export` wrote."""
    assert main(["export", run.config.run_dir, str(file), *options]) == 0
    return read_weights(str(file))[1]


def test_only_a_finished_run_has_statistics(
    run: TinyRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run.train(finish=False)
    run.train(finish=True)
    early, last = tmp_path / "early.safetensors", tmp_path / "last.safetensors"
    assert export(run, early, "--checkpoint", "1")[MARK] == UNMEASURED
    assert "never measured" in capsys.readouterr().err
    assert not STATISTICS & read_weights(str(early))[0].keys()
    with pytest.raises(ConfigError, match=r"never measured.*--measure SHARDS.*first_stage\.latent_scale"):
        load_first_stage(reads(early))
    assert load_first_stage(reads(early, latent_scale=0.5)).latent_scale.tolist() == [0.5] * 3
    assert export(run, last)[MARK] == MEASURED
    assert capsys.readouterr().err == ""
    assert torch.equal(load_first_stage(reads(last)).latent_scale, run.stage.module.latent_scale)


def test_a_run_that_goes_on_has_to_measure_again(run: TinyRun) -> None:
    run.train(finish=True)
    finished = run.stage.state()
    assert finished.keys() == STATISTICS | {MEASURED_TENSOR}
    run.train(finish=False)
    assert {name: value.tolist() for name, value in run.stage.state().items()} == {MEASURED_TENSOR: [0.0]}
    run.stage.load_state(finished)
    assert torch.equal(run.stage.state()["latent_scale"], finished["latent_scale"])
    run.stage.load_state({MEASURED_TENSOR: torch.zeros(1)})
    assert run.stage.state().keys() == {MEASURED_TENSOR}


@pytest.mark.parametrize(("scale", "mark"), [(1.0, UNMEASURED), (0.7, MEASURED)])
def test_checkpoints_of_older_versions_resume_and_export(
    scale: float, mark: str, run: TinyRun, tmp_path: Path
) -> None:
    run.train(finish=False)
    older = {"latent_shift": torch.zeros(3), "latent_scale": torch.full((3,), scale)}
    run.stage.load_state(older)
    assert ("latent_scale" in run.stage.state()) == (mark == MEASURED)
    run.stage.engines["autoencoder"].optimizer_steps += 1
    run.save(older)
    assert export(run, tmp_path / "out.safetensors")[MARK] == mark


@pytest.mark.parametrize("metadata", [{}, {"network": "autoencoder", "step": "10"}])
def test_files_of_older_versions_are_taken_where_their_scale_says_something(
    metadata: dict[str, str], tmp_path: Path
) -> None:
    file = tmp_path / "older.safetensors"
    module = build_first_stage(TINY)
    write_weights(str(file), module.state_dict(), metadata)
    with pytest.raises(ConfigError, match="never measured"):
        load_first_stage(reads(file))
    assert load_first_stage(reads(file, latent_scale=1.0)).statistics_measured
    module.set_latent_statistics(torch.zeros(3), torch.full((3,), 0.7))
    write_weights(str(file), module.state_dict(), metadata)
    torch.testing.assert_close(load_first_stage(reads(file)).latent_scale, torch.full((3,), 0.7))


def test_a_measured_scale_of_one_is_a_scale(tmp_path: Path) -> None:
    file, module = tmp_path / "one.safetensors", build_first_stage(TINY)
    write_weights(str(file), *first_stage_tensors(module))
    with pytest.raises(ConfigError, match="never measured"):
        load_first_stage(reads(file))
    module.set_latent_statistics(torch.zeros(3), torch.ones(3))
    write_weights(str(file), *first_stage_tensors(module))
    assert load_first_stage(reads(file)).latent_scale.tolist() == [1.0] * 3


def test_a_scale_of_one_in_another_program_s_weights_is_their_word(tmp_path: Path) -> None:
    config = Config(first_stage=dataclasses.replace(TINY, latent_scale=1.0))
    stage = {f"first_stage.{n}": t for n, t in build_first_stage(TINY).state_dict().items()}
    export_weights(stage, str(tmp_path / "theirs"), config, "diffusers")
    import_weights(str(tmp_path / "theirs"), str(tmp_path / "ours"), None)
    file = tmp_path / "ours/first_stage.safetensors"
    tensors, metadata = read_weights(str(file))
    assert metadata[MARK] == GIVEN
    assert load_first_stage(reads(file)).latent_scale.tolist() == [1.0] * 3
    assert load_config(str(tmp_path / "ours/structure.yaml")).first_stage.base_channels == 8
    del metadata[MARK]  # as imported by an older version
    write_weights(str(file), tensors, metadata)
    assert load_first_stage(reads(file)).latent_scale.tolist() == [1.0] * 3


@pytest.mark.parametrize("statistics", ["global", "channel"])
def test_export_measures_what_the_last_step_would(statistics: str, shards: str, tmp_path: Path) -> None:
    run, file, again = TinyRun(tmp_path / "run", statistics), tmp_path / "a.safetensors", tmp_path / "b"
    run.train(finish=False)
    measure = ["--measure", shards, "--weights", "weights"]
    assert export(run, file, *measure, "--dtype", "bf16")[MARK] == MEASURED
    tensors = read_weights(str(file))[0]
    assert tensors["latent_scale"].dtype == torch.float32
    assert tensors["encoder.conv_in.weight"].dtype == torch.bfloat16
    data = DataConfig(shards=shards, image_size=32, workers=0)
    with build_loader(data, seed=0, global_batch_size=SAMPLES) as batches:
        pixels = next(batches).pixels
    run.stage.finish(dataclasses.replace(batch(0), pixels=part) for part in pixels.split(4))
    for name in STATISTICS:
        torch.testing.assert_close(tensors[name], getattr(run.stage.module, name), rtol=1e-4, atol=1e-4)
    assert torch.equal(load_first_stage(reads(file)).latent_scale, tensors["latent_scale"])
    # A file that was exported without them is measured too, where its run is gone.
    bare = tmp_path / "bare.safetensors"
    export(run, bare, "--weights", "weights", "--checkpoint", "1")
    assert main(["export", str(bare), str(again), "--measure", shards]) == 0
    assert torch.equal(
        read_weights(f"{again}/weights.safetensors")[0]["latent_scale"], tensors["latent_scale"]
    )
    run.manager.close()


def test_other_layouts_need_statistics_too(
    run: TinyRun, shards: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run.train(finish=False)
    for layout, name in (("diffusers", "folder"), ("compvis", "file.safetensors")):
        arguments = ["export", run.config.run_dir, str(tmp_path / name), "--layout", layout]
        assert main(arguments) == 2
        assert "--measure SHARDS" in capsys.readouterr().err
        assert main([*arguments, "--measure", shards]) == 0
    written = json.loads((tmp_path / "folder/vae/config.json").read_text())
    measured = tmp_path / "native.safetensors"
    export(run, measured, "--measure", shards)
    assert written["scaling_factor"] == pytest.approx(
        read_weights(str(measured))[0]["latent_scale"][0].item()
    )
    assert main([*arguments, "--latent-scale", "0.5"]) == 0
    assert main([*arguments, "--latent-scale", "-1"]) == 2
    assert "first_stage.latent_scale=-1" in capsys.readouterr().err


def test_mistakes_are_one_sentence(
    run: TinyRun, shards: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run.train(finish=False)
    export = ["export", run.config.run_dir, str(tmp_path / "out.safetensors")]
    for options, said in (
        (["--measure", str(tmp_path / "nothing/*.tar")], "nothing"),
        (["--measure", shards, "--samples", "0"], "--samples 0"),
        (["--latent-scale", "0.5"], "--layout compvis or diffusers"),
        (["--measure", shards, "--dtype", "fp8"], "invalid choice"),
    ):
        try:
            code = main([*export, *options])
        except SystemExit as stopped:  # argparse
            code = int(stopped.code or 0)
        assert code == 2
        assert said in capsys.readouterr().err
    assert not (tmp_path / "out.safetensors").exists()


def second_stage(folder: Path, first_stage: Path, *, scale: float) -> str:
    """An exported second stage that was trained at a latent scale, over this first stage."""
    settings = [
        "data.image_size=16",
        f"first_stage={json.dumps({'name': 'kl', 'base_channels': 8, 'channel_multipliers': [1, 2]})}",
        "first_stage.num_res_blocks=1",
        "first_stage.latent_channels=3",
        f"first_stage.weights={first_stage}",
        "unet={model_channels: 16, channel_multipliers: [1, 2], num_res_blocks: 1, attention_factors: [2], "
        "head_dim: 16, num_groups: 4}",
    ]
    config = load_config(None, settings)
    known = load_config(None, [*settings, "first_stage.latent_scale=1"])
    network: nn.Module = build_model(known).network
    tensors = {
        **network.state_dict(),
        "latent_shift": torch.zeros(3),
        "latent_scale": torch.full((3,), scale),
    }
    url = str(folder / "second.safetensors")
    write_weights(url, tensors, {"config": json.dumps(config_to_dict(config)), "network": "unet"})
    return url


def test_sampling_refuses_a_first_stage_without_statistics_or_with_others(
    run: TinyRun, shards: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run.train(finish=False)
    bare, measured = tmp_path / "bare.safetensors", tmp_path / "measured.safetensors"
    export(run, bare)
    export(run, measured, "--measure", shards)
    source = second_stage(tmp_path, bare, scale=1.0)
    sample = ["sample", source, "--steps", "2", "--out", str(tmp_path / "out")]
    capsys.readouterr()
    assert main(sample) == 2
    assert "never measured" in capsys.readouterr().err
    assert main([*sample, "--first-stage", str(measured)]) == 2
    assert "trained with latent_scale=[1.0, 1.0, 1.0]" in capsys.readouterr().err
    assert main([*sample, "--latent-scale", "0"]) == 2
    assert "first_stage.latent_scale=0" in capsys.readouterr().err
    assert main([*sample, "--latent-scale", "1"]) == 0


def test_evaluation_refuses_a_first_stage_without_statistics(
    run: TinyRun, shards: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run.train(finish=False)
    export(run, tmp_path / "bare.safetensors")
    capsys.readouterr()
    assert main(["evaluate", "reconstruction", str(tmp_path / "bare.safetensors"), "--shards", shards]) == 2
    assert "never measured" in capsys.readouterr().err
