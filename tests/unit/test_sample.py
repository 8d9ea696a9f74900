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
from trainer.cli.conditions_from_files import sampling_inputs
from trainer.cli.wishes import Wishes
from trainer.config.io import config_to_dict, load_config
from trainer.config.run import Config
from trainer.first_stage.build import build_first_stage
from trainer.metrics.pictures import grid
from trainer.model import DiffusionModel, build_model
from trainer.sample import Request, StartingPicture, generate
from trainer.weights import read_metadata, write_weights

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


def test_a_size_has_its_own_shift() -> None:
    """At twice the edge a flow shifts twice as far, and not at all where the shift is for every size."""

    def made(settings: str, edge: int) -> Tensor:
        flow = f"diffusion={{process: flow, prediction: velocity, {settings}}}"
        return draw(model(flow, "sampling.steps=4", "sampling.sampler=euler"), size=(edge, edge))

    assert torch.equal(made("shift: 2, shift_pixels: 16", 16), made("shift: 2", 16))
    assert torch.equal(made("shift: 2, shift_pixels: 16", 32), made("shift: 4", 32))
    assert not torch.equal(made("shift: 2, shift_pixels: 16", 32), made("shift: 2", 32))


FLOW = ("diffusion={process: flow, prediction: velocity}", "sampling.spacing=trailing")
EDM = ("diffusion={process: edm, prediction: edm, density: log_normal}", "sampling.spacing=karras")


@pytest.mark.parametrize("objective", [(), FLOW, EDM], ids=["eps", "flow", "edm"])
@pytest.mark.parametrize("sampler", ["ddim", "dpmpp_2m", "euler_ancestral"])
@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_inpainting_keeps_what_is_known(sampler: str, strength: float, objective: tuple[str, ...]) -> None:
    pixels, mask = gradient(16, 16), torch.zeros(2, 1, 16, 16)
    mask[..., 8:] = 1
    made = draw(
        model(f"sampling.sampler={sampler}", *objective), start=StartingPicture(pixels, strength, mask)
    )
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


def shout(made: DiffusionModel) -> None:
    """Let the network hear its conditions."""
    for name, parameter in made.network.named_parameters():
        if "attn2" in name or name.startswith("conditions."):
            nn.init.normal_(parameter, std=0.5)


def exported(folder: Path, *settings: str) -> str:
    config, made = model(*settings)
    shout(made)
    url = str(folder / "model.safetensors")
    write_weights(url, dict(made.network.state_dict()), {"config": json.dumps(config_to_dict(config))})
    return url


def test_the_command_draws_classes(tmp_path: Path) -> None:
    source, out = exported(tmp_path, *CLASSES), tmp_path / "out"
    arguments = ["--class-label", "2", "--class-label", "-1", "--per-prompt", "2", "--steps", "2"]
    assert main(["sample", source, *arguments, "--size", "24x16", "--out", str(out)]) == 0
    assert sorted(path.name for path in (out / "pictures").iterdir()) == [f"0000{i}.png" for i in range(4)]
    assert np.asarray(Image.open(out / "pictures" / "00003.png")).shape == (24, 16, 3)
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
    assert json.loads((out / "prompts.json").read_text())["strength"] == 1.0
    made = np.asarray(Image.open(out / "pictures" / "00000.png"))
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
    assert np.asarray(Image.open(out / "pictures" / "00000.png")).shape == (24, 20, 3)


def test_guidance_needs_a_trained_null(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    never = "conditioning.class_label={num_classes: 4, width: 16, drop_probability: 0}"
    arguments = ["sample", exported(tmp_path, never), "--class-label", "1", "--out", str(tmp_path / "out")]
    assert main(arguments) == 2
    assert "conditioning.class_label.drop_probability=0" in capsys.readouterr().err
    assert main([*arguments, "--guidance", "1"]) == 0


def texts(folder: Path, *settings: str) -> str:
    """A model of captions; its vocabulary is on disk, six tokens are read."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "red", "blue", "circle", "square", "large"]
    (folder / "vocabulary.txt").write_text("\n".join(words))
    section = f"max_tokens: 6, tokenizer: wordpiece, vocabulary: {folder / 'vocabulary.txt'}"
    shape = "width: 16, layers: 1, heads: 1, head_dim: 16"
    return exported(folder, f"conditioning={{text_transformer: {{{shape}, {section}}}}}", *settings)


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path))


def test_guidance_leads_away_from_the_negative_prompt(tmp_path: Path) -> None:
    """Away from the prompt itself it leads nowhere: the unguided picture. Away from "": the null form."""
    config, made = model(f"conditioning={config_of(texts(tmp_path))}")
    shout(made)

    def one(scale: float, *negative: str) -> Tensor:
        own = replace(config, sampling=replace(config.sampling, guidance_scale=scale))
        return generate(own, made, Request(("a red circle",), negative=negative), seed=1).int()

    assert (one(5.0, "a red circle") - one(1.0)).abs().max() <= 1
    assert torch.equal(one(5.0, ""), one(5.0))
    assert (one(5.0, "a blue square") - one(5.0)).abs().max() > 3


def test_a_negative_prompt_needs_no_trained_null(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = texts(tmp_path)
    section = json.loads(config_of(words))["text_transformer"] | {"drop_probability": 0.0}
    source = exported(tmp_path, f"conditioning={json.dumps({'text_transformer': section})}")
    arguments = ["sample", source, "--prompt", "a red circle", "--out", str(tmp_path / "out")]
    assert main(arguments) == 2
    assert "drop_probability=0 never trains" in capsys.readouterr().err
    assert main([*arguments, "--negative-prompt", "a blue square"]) == 0
    assert main([*arguments, "--negative-prompt", "a blue square", "--guidance", "1"]) == 2
    assert "--negative-prompt needs guidance" in capsys.readouterr().err


def config_of(source: str) -> str:
    section = json.loads(read_metadata(source)["config"])["conditioning"]["text_transformer"]
    return json.dumps({"text_transformer": section})


def test_a_picture_can_be_made_again_from_what_it_carries(tmp_path: Path) -> None:
    source, out = texts(tmp_path), tmp_path / "out"
    listed = tmp_path / "prompts.txt"
    listed.write_bytes("\ufeffa red  circle\na blue square\r\na large circle\n".encode())
    asked = ["--prompts-file", str(listed), "--negative-prompt", "a blue circle", "--guidance", "4"]
    how = ["--steps", "3", "--sampler", "dpmpp_2m", "--spacing", "trailing", "--guidance-rescale", "0.5"]
    arguments = ["sample", source, *asked, *how, "--seed", "7", "--out", str(out), "--batch-size", "2"]
    assert main(arguments) == 0
    record = json.loads((out / "prompts.json").read_text())
    assert record["prompts"] == ["a red circle", "a blue square", "a large circle"]
    assert {"torch", "commit", "ldm", "device"} == set(record["versions"])
    carried = Image.open(out / "pictures" / "00002.png").text
    assert carried["prompt"] == "a large circle"
    told = json.loads(carried["ldm"])
    assert told["index"] == 2
    again = [
        *("--prompt", told["prompt"], "--first-index", str(told["index"]), "--seed", str(told["seed"])),
        *("--negative-prompt", told["negative_prompt"], "--guidance", str(told["guidance"])),
        *("--steps", str(told["steps"]), "--sampler", told["sampler"], "--spacing", told["spacing"]),
        *("--guidance-rescale", str(told["guidance_rescale"]), "--precision", told["precision"]),
        *("--size", told["size"]),
    ]
    assert main(["sample", told["source"], *again, "--out", str(tmp_path / "again")]) == 0
    first, second = pixels(out / "pictures" / "00002.png"), pixels(tmp_path / "again/pictures/00000.png")
    assert np.abs(first.astype(int) - second).max() <= 1
    other = ["--guidance-rescale", "0", "--guidance", "60"]
    assert main(["sample", source, *again, *other, "--out", str(tmp_path / "other")]) == 0
    assert np.abs(first.astype(int) - pixels(tmp_path / "other/pictures/00000.png")).max() > 1


def test_another_set_is_not_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = exported(tmp_path, *CLASSES), tmp_path / "out"
    first = ["sample", source, "--class-label", "1", "--per-prompt", "3", "--steps", "2", "--out", str(out)]
    other = [*first[:3], "2", *first[6:]]
    assert main(first) == 0
    before = {path.name: path.read_bytes() for path in (out / "pictures").iterdir()}
    assert len(before) == 3
    assert main(other) == 2
    assert "holds another set of pictures" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in (out / "pictures").iterdir()} == before
    assert main(first) == 0, "the same set may be made again"
    assert main([*other, "--overwrite"]) == 0
    assert [path.name for path in (out / "pictures").iterdir()] == ["00000.png"], "nothing is left of it"
    (out / "prompts.json").unlink()
    assert main(other) == 2, "pictures that nobody wrote a record of"


def test_mistakes_are_told_before_the_weights_are_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A file that ends behind its header: reading the weights would be another sentence."""
    for name, settings in (("classes", CLASSES), ("plain", ()), ("sizes", ("conditioning.image_size={}",))):
        (tmp_path / name).mkdir()
        whole = Path(exported(tmp_path / name, *settings))
        data = whole.read_bytes()
        whole.write_bytes(data[: 8 + int.from_bytes(data[:8], "little")])
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "file").write_bytes(b"")
    classes, plain, sizes = (
        str(tmp_path / name / "model.safetensors") for name in ("classes", "plain", "sizes")
    )
    good, out = ["--class-label", "1"], ["--out", str(tmp_path / "out")]
    cases: list[tuple[str, list[str], str]] = [
        (classes, [], "give --class-label"),
        (classes, ["--class-label", "4"], "--class-label 4 must lie in 0 .. 3"),
        (classes, [*good, "--batch-size", "0"], "--batch-size 0 must be at least 1"),
        (classes, [*good, "--first-index", "-1"], "--first-index -1"),
        (classes, [*good, "--seed", "-1"], "--seed -1"),
        (classes, [*good, "--seed", str(2**63)], "below 2**63"),
        (classes, [*good, "--steps", "0"], "sampling.steps=0"),
        (classes, [*good, "--guidance", "nan"], "sampling.guidance_scale=nan"),
        (classes, [*good, "--guidance-rescale", "2"], "sampling.guidance_rescale=2"),
        (classes, [*good, "--size", "0x16"], "must be"),
        (classes, [*good, "--size", "16X16"], "--size 16X16 is not two numbers"),
        (classes, [*good, "--size", "\u00b2x16"], "is not two numbers"),
        (classes, [*good, "--size", "999999x999999"], "--size 999999x999999"),
        (classes, [*good, "--crop", "1x1"], "without the size condition"),
        (classes, [*good, "--negative-prompt", "x"], "leave out --negative-prompt"),
        (plain, ["--image", str(tmp_path)], "is a folder"),
        (plain, ["--image", str(tmp_path / "latin.txt")], "cannot be read as a picture"),
        (plain, ["--prompts-file", str(tmp_path / "latin.txt")], "save it as UTF-8"),
        (plain, ["--prompts-file", str(tmp_path)], "is a folder"),
        (plain, ["--prompts-file", str(tmp_path / "file")], "holds no prompt"),
        (plain, ["--prompts-file", ""], "folder"),
        (plain, ["--out", ""], "--out is empty"),
        (plain, ["--count", "2", "--out", " "], "--out is empty"),
        (plain, ["--weights", "power_0.1"], "holds weights alone, not 'power_0.1'"),
        (plain, ["--checkpoint", "5"], "holds weights of no known step, not step 5"),
        (plain, ["--out", str(tmp_path / "file")], "file"),
        (plain, ["--out", str(tmp_path / "file" / "out")], "file"),
        (plain, ["--out", "s4://nowhere"], "s4"),
        (plain, ["--first-stage", str(tmp_path)], "leave out --first-stage"),
        (str(tmp_path / "nowhere"), [], "nowhere"),
        (sizes, ["--crop", "1,1"], "--crop 1,1 is not two numbers"),
    ]
    for source, arguments, sentence in cases:
        assert main(["sample", source, *out, *arguments]) == 2, arguments
        error = capsys.readouterr().err
        assert sentence in error, (arguments, error)
        assert "Traceback" not in error
    assert not (tmp_path / "out").exists()
    assert main(["sample", plain, *out]) == 2, "nothing else is wrong"
    assert "model.safetensors is not a safetensors file" in capsys.readouterr().err


def test_the_size_condition_is_told(tmp_path: Path) -> None:
    """SDXL's numbers in its order; unasked, an uncropped picture of the size of the result."""
    sizes = load_config(None, [*SETTINGS, "conditioning.image_size={}"])

    def told(**given: tuple[int, int]) -> list[int]:
        return sampling_inputs(sizes, Wishes(size=(16, 24), **given)).request.conditions["size"][0].tolist()

    assert told() == [16, 24, 0, 0, 16, 24]
    assert told(original_size=(480, 640), crop=(3, 5), target_size=(32, 48)) == [480, 640, 3, 5, 32, 48]
    source = exported(tmp_path, "conditioning.image_size={width: 16}")
    made = []
    for name, more in (
        ("plain", []),
        ("same", ["--original-size", "16x16"]),
        ("low", ["--original-size", "4x4"]),
    ):
        assert main(["sample", source, *more, "--steps", "2", "--out", str(tmp_path / name)]) == 0
        made.append(pixels(tmp_path / name / "pictures" / "00000.png"))
    carried = json.loads(Image.open(tmp_path / "low/pictures/00000.png").text["ldm"])
    assert carried["original_size"] == [4, 4], "it can be made again"
    assert (made[0] == made[1]).all()
    assert (made[0] != made[2]).any()


def test_long_prompts_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = texts(tmp_path)
    short, long = ["--prompt", "a large red circle"], ["--prompt", "a large red circle a blue square"]
    assert main(["sample", source, *short, *long, "--steps", "1", "--out", str(tmp_path / "out")]) == 0
    notes = [line for line in capsys.readouterr().err.splitlines() if line.startswith("note:")]
    assert len(notes) == 1
    assert "has 7 tokens and the model reads the first 4; shorten it." in notes[0], "chunks are not for it"


def test_precision(tmp_path: Path) -> None:
    """The run's own is for GPUs; a CPU takes fp32 unless asked."""
    source, made = exported(tmp_path, *CLASSES, "distributed.precision=bf16"), {}
    for name, more in (("default", []), ("fp32", ["--precision", "fp32"]), ("bf16", ["--precision", "bf16"])):
        out = tmp_path / name
        arguments = ["--class-label", "1", "--steps", "2", "--out", str(out), *more]
        assert main(["sample", source, *arguments]) == 0
        made[name] = pixels(out / "pictures" / "00000.png").astype(int)
        expected = "fp32" if name == "default" and not torch.cuda.is_available() else more[-1:] or "bf16"
        assert json.loads((out / "prompts.json").read_text())["precision"] in expected
    assert 0 < np.abs(made["bf16"] - made["fp32"]).mean() < 8


def test_the_grid_is_capped(tmp_path: Path) -> None:
    source, out = exported(tmp_path), tmp_path / "out"
    assert (
        main(["sample", source, "--per-prompt", "83", "--steps", "1", "--size", "8x8", "--out", str(out)])
        == 0
    )
    assert len(list((out / "pictures").iterdir())) == 83
    with Image.open(out / "grid.png") as sheet:
        assert sheet.size == (9 * 132 + 4, 9 * 132 + 4)
    large = grid(torch.zeros(4, 3, 500, 1000, dtype=torch.uint8), ("",) * 4, columns=2, max_cell=100)
    assert large.size == (2 * 104 + 4, 2 * 54 + 4)


def test_the_command_says_what_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = exported(tmp_path, *CLASSES)
    assert main(["sample", source, "--out", str(tmp_path / "out")]) == 2
    assert "give --class-label" in capsys.readouterr().err
    assert main(["sample", source, "--class-label", "9", "--out", str(tmp_path / "out")]) == 2
    assert "class_label" in capsys.readouterr().err


def test_tables_of_prompts_are_read_as_tables(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Not line by line, with the header as the first prompt and braces in the others."""
    tables = {
        "a.csv": "id,caption\n1,a red circle\n2,a blue one\n",
        "a.TSV": "caption\tid\na red circle\t1\na blue one\t2\n",
        "a.jsonl": '{"caption": "a red circle"}\n{"caption": "a blue one"}\n',
        "a.json": '["a red circle", {"text": "a blue one"}]',
        "a.txt": "a red circle\r\na blue one\r\n",
        "noending": "a red circle\na blue one",
    }
    source = texts(tmp_path)
    for name, content in tables.items():
        (tmp_path / name).write_bytes(content.encode())
        out = tmp_path / f"out-{name}"
        file = str(tmp_path / name)
        assert main(["sample", source, "--prompts-file", file, "--steps", "1", "--out", str(out)]) == 0
        assert json.loads((out / "prompts.json").read_text())["prompts"] == ["a red circle", "a blue one"]
    for content, sentence in (("{}", "no list"), ("[", "is not JSON"), ('[{"x": 1}]', "has the columns x")):
        (tmp_path / "b.json").write_text(content)
        command = ["sample", source, "--prompts-file", str(tmp_path / "b.json"), "--out", str(tmp_path / "b")]
        assert main(command) == 2
        assert sentence in capsys.readouterr().err
