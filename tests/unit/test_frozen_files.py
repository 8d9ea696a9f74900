"""First stage, tower, vocabulary and perceptual network are known by what their files hold."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import open_clip
import pytest
import torch

from tests.unit.one_rank import Train, one_rank, small_shards
from trainer.__main__ import main
from trainer.conditioning.open_clip_towers import architecture, build_tower
from trainer.config.models import FirstStageConfig, OpenCLIPConfig
from trainer.exit_codes import ExitCode
from trainer.first_stage.build import build_first_stage, first_stage_tensors
from trainer.first_stage.perceptual import LAYERS
from trainer.weights import write_weights

MODEL = "smallest-tower"
TOWER = OpenCLIPConfig(model=MODEL, pretrained="random", layer="last", pooled=True)
STAGE = FirstStageConfig(base_channels=8, channel_multipliers=(1, 2), num_res_blocks=1, num_groups=4)
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "red", "blue", "circle", "square"]
TINY = (
    *("data.image_size=16", "data.workers=0", "global_batch_size=2", "micro_batch_size=2"),
    "first_stage={base_channels: 8, channel_multipliers: [1, 2], num_res_blocks: 1, num_groups: 4}",
    "logging={every: 1, wandb: disabled, progress_bar: false}",
    "distributed={engine: torch, zero_stage: 0, precision: fp32, doctor: false, watchdog_s: 0}",
    "checkpoint.asynchronous=false",
)
SECOND = (
    "unet={model_channels: 16, channel_multipliers: [1, 2], num_res_blocks: 1, attention_factors: [2]}",
    *("unet.head_dim=16", "unet.num_groups=4", "unet.attention=plain", "sampling.steps=2"),
    f"conditioning.openclip={{model: {MODEL}, layer: last}}",
    "conditioning.text_transformer={width: 16, layers: 1, heads: 1, head_dim: 16, max_tokens: 6}",
    "conditioning.text_transformer.tokenizer=wordpiece",
)


def write_stage(file: Path, seed: int) -> None:
    torch.manual_seed(seed)
    module = build_first_stage(STAGE)
    module.set_latent_statistics(torch.zeros(4), torch.full((4,), 0.18215))  # the same whatever the weights
    write_weights(str(file), *first_stage_tensors(module))


def write_tower(file: Path, seed: int) -> None:
    write_weights(str(file), build_tower(TOWER, architecture(TOWER), seed=seed).state_dict(), {})


def write_words(file: Path, seed: int) -> None:
    file.write_text("\n".join([*WORDS[:4], *(WORDS[:3:-1] if seed else WORDS[4:])]))


def write_vgg(file: Path, seed: int) -> None:
    torch.manual_seed(seed)
    tensors, index, channels = {}, 0, 3
    for stage in LAYERS:
        for out in stage:
            tensors[f"features.{index}.weight"] = torch.randn(out, channels, 3, 3) * 0.03
            tensors[f"features.{index}.bias"] = torch.zeros(out)
            index, channels = index + 2, out
        index += 1
    write_weights(str(file), tensors, {})


FILES: dict[str, tuple[str, Callable[[Path, int], None]]] = {
    "first_stage.weights": ("stage.safetensors", write_stage),
    "conditioning.openclip.pretrained": ("tower.safetensors", write_tower),
    "conditioning.text_transformer.vocabulary": ("words.txt", write_words),
}
PERCEPTUAL = "autoencoder_loss.perceptual_weights"


@pytest.fixture(scope="module", autouse=True)
def model_of_open_clip(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Its own are too large for a test, and one that is shrunk takes no weights."""
    tower = {"context_length": 8, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
    picture = {"image_size": 32, "layers": 1, "width": 16, "patch_size": 16}
    file = tmp_path_factory.mktemp("models") / f"{MODEL}.json"
    file.write_text(json.dumps({"embed_dim": 16, "vision_cfg": picture, "text_cfg": tower}))
    open_clip.add_model_config(file)


@pytest.fixture
def train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Train:
    """A second stage over files of seed 0, one step of which is made."""
    where = [f"run_dir={tmp_path}/run", f"data.shards={small_shards(tmp_path / 'shards')}"]
    for setting, (name, write) in FILES.items():
        write(tmp_path / name, 0)
        where.append(f"{setting}={tmp_path / name}")
    made = one_rank(monkeypatch, tmp_path, [*TINY, *SECOND, *where])
    assert made("steps=1") == ExitCode.DONE
    return made


def errors(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]


@pytest.mark.parametrize("setting", FILES)
def test_another_file_of_the_old_name_is_refused_and_the_old_one_may_move(
    setting: str, train: Train, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    name, write = FILES[setting]
    file, moved = tmp_path / name, tmp_path / f"moved-{name}"
    shutil.copy(file, moved)
    write(file, 1)
    caplog.clear()
    assert train("steps=2") == ExitCode.USER_ERROR
    (error,) = errors(caplog)
    assert f"{setting} was {file} of contents " in error
    assert f", is {file} of contents " in error
    assert f"'resume_changed=[{setting}]'" in error
    assert all(other not in error for other in FILES if other != setting)
    assert train("steps=2", f"{setting}={moved}") == ExitCode.DONE
    assert train("steps=3", f"resume_changed=[{setting}]") == ExitCode.DONE
    assert train("steps=4") == ExitCode.DONE, "what it went on with is what counts from then on"


@pytest.mark.parametrize("exported", [False, True])
def test_nothing_is_drawn_or_exported_with_other_networks(
    train: Train, tmp_path: Path, exported: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    source = str(tmp_path / "run")
    if exported:
        source = str(tmp_path / "weights.safetensors")
        assert main(["export", str(tmp_path / "run"), source]) == 0
    sample = ["sample", source, "--prompt", "red circle", "--guidance", "1", "--overwrite"]
    sample += ["--out", str(tmp_path / "out")]
    export = ["export", source, str(tmp_path / "model.safetensors"), "--layout", "compvis"]
    assert main(sample) == 0
    for setting, (name, write) in FILES.items():
        write(tmp_path / name, 1)
        for command in (sample, export):
            assert main(command) == 2
            assert f"was trained with other contents of {setting} than" in capsys.readouterr().err
        write(tmp_path / name, 0)
    write_stage(tmp_path / "mine.safetensors", 1)
    mine = ["--first-stage", str(tmp_path / "mine.safetensors")]
    assert main([*sample, *mine]) == 0, "a decoder of one's own, say"
    assert main([*export, *mine]) == 0


def test_a_first_stage_goes_on_beside_its_perceptual_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    write_vgg(tmp_path / "vgg.safetensors", 0)
    where = (f"run_dir={tmp_path}/run", f"data.shards={small_shards(tmp_path / 'shards')}")
    loss = ("stage=autoencoder", "autoencoder_loss.discriminator_weight=0")
    vgg = f"{PERCEPTUAL}={tmp_path}/vgg.safetensors"
    train = one_rank(monkeypatch, tmp_path, [*TINY, *loss, vgg, *where])
    assert train("steps=1") == ExitCode.DONE
    write_vgg(tmp_path / "vgg.safetensors", 1)
    caplog.clear()
    assert train("steps=2") == ExitCode.USER_ERROR
    assert f"{PERCEPTUAL} was {tmp_path}/vgg.safetensors of contents " in errors(caplog)[0]
    write_vgg(tmp_path / "vgg.safetensors", 0)
    assert train("steps=2") == ExitCode.DONE
