"""Sampling from pictures, at other sizes, and the command around it; networks with random weights."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from trainer.__main__ import main
from trainer.config.io import config_to_dict, load_config
from trainer.config.run import Config
from trainer.first_stage.build import build_first_stage
from trainer.model import DiffusionModel, build_model
from trainer.sample import Request, StartingPicture, generate
from trainer.weights import write_weights

SETTINGS = [
    "data.image_size=16",
    "first_stage.name=identity",
    "unet={model_channels: 16, channel_multipliers: [1, 2], num_res_blocks: 1, attention_factors: [2], "
    "head_dim: 16, num_groups: 4}",
    "sampling={steps: 8, guidance_scale: 3.0}",
]
CLASSES = ("conditioning.class_label={num_classes: 4, width: 16}",)


def model(*settings: str) -> tuple[Config, DiffusionModel]:
    config = load_config(None, [*SETTINGS, *settings])
    torch.manual_seed(0)
    made = build_model(config)
    for parameter in made.network.parameters():  # the last convolution starts at zero
        nn.init.normal_(parameter, std=0.05)
    return config, made


def draw(
    made: tuple[Config, DiffusionModel],
    n: int = 2,
    *,
    start: StartingPicture | None = None,
    conditions: dict[str, Tensor] | None = None,
    size: tuple[int, int] | None = None,
    batch_size: int = 16,
) -> Tensor:
    request = Request(("",) * n, conditions or {}, size=size, start=start)
    return generate(*made, request, seed=3, batch_size=batch_size)


def gradient(height: int, width: int) -> Tensor:
    row = torch.linspace(-1, 1, width).expand(height, width)
    return torch.stack([row, -row, row * 0]).expand(2, 3, height, width)


def test_the_last_steps_alone_keep_the_picture() -> None:
    pixels = gradient(16, 24)
    distances = []
    for strength in (0.13, 0.5, 1.0):
        made = draw(model(), start=StartingPicture(pixels, strength))
        assert made.shape == (2, 3, 16, 24)
        distances.append(float((made.float() / 127.5 - 1 - pixels).abs().mean()))
    assert distances[0] < 0.5 * distances[1] < 0.5 * distances[2]


@pytest.mark.parametrize("sampler", ["ddim", "dpmpp_2m", "euler_ancestral"])
@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_inpainting_keeps_what_is_known(sampler: str, strength: float) -> None:
    pixels, mask = gradient(16, 16), torch.zeros(2, 1, 16, 16)
    mask[..., 8:] = 1
    made = draw(model(f"sampling.sampler={sampler}"), start=StartingPicture(pixels, strength, mask))
    known = ((pixels + 1) * 127.5).round()
    assert (made.float() - known)[..., :8].abs().max() <= 1
    assert (made.float() - known)[..., 8:].abs().mean() > 10


def test_a_whole_hole_does_not_see_what_it_hides() -> None:
    mask = torch.zeros(2, 1, 16, 16)
    mask[..., 8:] = 1
    one, other = gradient(16, 16), gradient(16, 16).clone()
    other[..., 8:] = 0.3
    a, b = (draw(model(), start=StartingPicture(pixels, 1.0, mask)) for pixels in (one, other))
    assert torch.equal(a, b)


def test_pictures_do_not_depend_on_their_batch() -> None:
    labels = torch.tensor([0, 3, -1])
    start = StartingPicture(torch.cat([gradient(16, 16), gradient(16, 16)])[:3], 0.6)
    together, alone = (
        draw(model(*CLASSES), 3, start=start, conditions={"class_label": labels}, batch_size=size)
        for size in (3, 1)
    )
    assert (together.int() - alone.int()).abs().max() <= 1


def test_larger_and_oblong_pictures_than_trained_on() -> None:
    assert draw(model(), size=(40, 24)).shape == (2, 3, 40, 24)


class Counting(nn.Module):
    """Remembers how many rows it was asked for."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.rows: list[int] = []

    def forward(self, x: Tensor, *rest: object) -> Tensor:
        self.rows.append(len(x))
        made: Tensor = self.network(x, *rest)
        return made


def test_no_second_pass_where_guidance_has_nothing_to_drop() -> None:
    depth, labels = torch.rand(2, 1, 16, 16), torch.tensor([0, 1])
    for settings, conditions, rows in (
        (("conditioning.depth={}",), {"depth": depth}, {2}),
        (CLASSES, {"class_label": labels}, {4}),
    ):
        config, made = model(*settings)
        counting = Counting(made.network)
        draw((config, replace(made, network=counting)), conditions=conditions)
        assert set(counting.rows) == rows


def exported(folder: Path, *settings: str) -> str:
    config, made = model(*settings)
    url = str(folder / "model.safetensors")
    write_weights(url, dict(made.network.state_dict()), {"config": json.dumps(config_to_dict(config))})
    return url


def test_the_command_draws_classes(tmp_path: Path) -> None:
    source, out = exported(tmp_path, *CLASSES), tmp_path / "out"
    arguments = ["--class-label", "2", "--class-label", "-1", "--per-prompt", "2", "--steps", "2"]
    assert main(["sample", source, *arguments, "--size", "24x16", "--out", str(out)]) == 0
    assert sorted(path.name for path in out.glob("0*.png")) == [f"0000{i}.png" for i in range(4)]
    assert np.asarray(Image.open(out / "00003.png")).shape == (24, 16, 3)
    assert json.loads((out / "prompts.json").read_text())["class_labels"] == [2, -1]


def test_the_command_fills_a_hole_and_leaves_the_rest(tmp_path: Path) -> None:
    source, out = exported(tmp_path), tmp_path / "out"
    photo = np.random.default_rng(0).integers(0, 256, (20, 28, 3), dtype=np.uint8)
    hole = np.zeros((20, 28), dtype=np.uint8)
    hole[5:12, 6:20] = 255
    Image.fromarray(photo).save(tmp_path / "photo.png")
    Image.fromarray(hole).save(tmp_path / "hole.png")
    files = ["--image", str(tmp_path / "photo.png"), "--mask", str(tmp_path / "hole.png")]
    assert main(["sample", source, *files, "--steps", "3", "--out", str(out)]) == 0
    made = np.asarray(Image.open(out / "00000.png"))
    assert (made[hole == 0] == photo[hole == 0]).all()
    assert (made[hole > 0] != photo[hole > 0]).mean() > 0.9


def test_the_command_enlarges(tmp_path: Path) -> None:
    stage = "first_stage={name: kl, base_channels: 8, channel_multipliers: [1, 2], num_res_blocks: 1}"
    weights = str(tmp_path / "first_stage.safetensors")
    settings = (stage, f"first_stage.weights={weights}", "first_stage.latent_scale=1.0")
    config = load_config(None, [s for s in SETTINGS if "identity" not in s] + list(settings))
    write_weights(weights, dict(build_first_stage(config.first_stage).state_dict()), {})
    source = exported(tmp_path, "first_stage.name=kl", *settings, "conditioning.low_resolution={factor: 2}")
    Image.fromarray(np.zeros((12, 10, 3), dtype=np.uint8)).save(tmp_path / "small.png")
    out = tmp_path / "out"
    arguments = ["--image", str(tmp_path / "small.png"), "--steps", "2", "--out", str(out)]
    assert main(["sample", source, *arguments]) == 0
    assert np.asarray(Image.open(out / "00000.png")).shape == (24, 20, 3)


def test_guidance_needs_a_trained_null(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    never = "conditioning.class_label={num_classes: 4, width: 16, drop_probability: 0}"
    arguments = ["sample", exported(tmp_path, never), "--class-label", "1", "--out", str(tmp_path / "out")]
    assert main(arguments) == 2
    assert "conditioning.class_label.drop_probability=0" in capsys.readouterr().err
    assert main([*arguments, "--guidance", "1"]) == 0


def test_the_command_says_what_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = exported(tmp_path, *CLASSES)
    assert main(["sample", source, "--out", str(tmp_path / "out")]) == 2
    assert "give --class-label" in capsys.readouterr().err
    assert main(["sample", source, "--class-label", "9", "--out", str(tmp_path / "out")]) == 2
    assert "class_label" in capsys.readouterr().err
