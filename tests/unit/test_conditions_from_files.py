"""What `ldm sample` reads from files, and what it refuses."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from data_pipeline.batch import Batch
from data_pipeline.config import DataConfig
from data_pipeline.errors import DataError
from data_pipeline.feed.conditions import layout_rows
from data_pipeline.loader import build_loader
from data_pipeline.pictures.crops import Geometry
from trainer.cli.conditions_from_files import read_layout, sampling_inputs
from trainer.cli.wishes import Wishes, check_wishes
from trainer.config.io import load_config
from trainer.config.run import Config, ConfigError

KL_F4 = "first_stage.channel_multipliers=[1, 2, 4]"
BOXES = [[3, 0.0, 0.25, 0.5, 1.0], [0, 0.5, 0.5, 0.75, 0.75]]


def config(*settings: str) -> Config:
    return load_config(None, ["data.image_size=32", KL_F4, *settings])


def picture(path: Path, values: Any, mode: str | None = None) -> str:
    image = Image.fromarray(np.asarray(values, dtype=np.uint8))
    (image if mode is None else image.convert(mode)).save(path)
    return str(path)


@pytest.fixture
def photo(tmp_path: Path) -> str:
    """24 rows, 38 columns: the last two columns are no whole latent cell."""
    values = np.arange(24 * 38 * 3).reshape(24, 38, 3) % 251
    return picture(tmp_path / "photo.png", values)


@pytest.fixture
def hole(tmp_path: Path) -> str:
    values = np.zeros((24, 36))
    values[:, 20:] = 255
    return picture(tmp_path / "hole.png", values)


def test_prompts_are_repeated_in_their_order() -> None:
    inputs = sampling_inputs(config("conditioning.openclip={}"), Wishes(prompts=("a", "b"), per_prompt=2))
    assert inputs.request.captions == inputs.titles == ("a", "a", "b", "b")
    assert inputs.request.size == (32, 32)
    assert inputs.request.conditions == {}
    assert inputs.request.pixels is None
    assert inputs.request.start is None


def test_class_labels_join_one_prompt() -> None:
    both = config("conditioning={openclip: {width: 8}, class_label: {width: 8}}")
    inputs = sampling_inputs(both, Wishes(prompts=("a",), class_labels=(5, -1), per_prompt=2))
    assert inputs.request.captions == ("a",) * 4
    assert inputs.request.conditions["class_label"].tolist() == [5, 5, -1, -1]
    assert inputs.titles == ("a, class 5", "a, class 5", "a, class -1", "a, class -1")
    with pytest.raises(ConfigError, match="--prompt is given 2 times for 3"):
        sampling_inputs(both, Wishes(prompts=("a", "b"), class_labels=(1, 2, 3)))


def test_layout_as_in_the_shards(tmp_path: Path) -> None:
    file = tmp_path / "layout.json"
    file.write_text(json.dumps({"layout": BOXES, "caption": "ignored"}))
    model = config("conditioning.layout={}")
    inputs = sampling_inputs(model, Wishes(layout=str(file), per_prompt=3, size=(64, 48)))
    assert inputs.request.conditions["layout"].tolist() == [BOXES] * 3
    assert inputs.request.size == (64, 48)


def test_boxes_come_in_the_order_of_training(tmp_path: Path) -> None:
    """Largest first, without slivers: the places of boxes mean something to the network."""
    listed = [[2, 0, 0, 0.25, 0.25], [4, 0.5, 0, 0.501, 1], [1, 0, 0, 1, 0.5], [3, 0.5, 0.5, 1, 1]]
    file = tmp_path / "layout.json"
    file.write_text(json.dumps(listed))
    whole = Geometry(
        height=8, width=8, top=0, left=0, bottom=1, right=1, flip=False, target_height=8, target_width=8
    )
    trained = layout_rows({"layout": listed}, whole, 3)
    assert trained[:, 0].tolist() == [1, 3, 2]
    assert read_layout(str(file), 30).tolist() == trained.tolist()
    file.write_text(json.dumps(listed[1:2]))
    with pytest.raises(ConfigError, match="make one larger"):
        read_layout(str(file), 30)


@pytest.mark.parametrize(
    "content",
    [
        "[]",
        "[[1, 0, 0, 1]]",
        "[[0, 0.5, 0, 0.2, 1]]",
        "[[0.5, 0, 0, 1, 1]]",
        "[[true, 0, 0, 1, 1]]",
        "[[1e999, 0, 0, 1, 1]]",
        "[[NaN, 0, 0, 1, 1]]",
        "[[1, 0, 0, Infinity, 1]]",
        "[" * 100_000,
        "3",
        "{",
    ],
)
def test_layouts_that_are_none(tmp_path: Path, content: str) -> None:
    file = tmp_path / "layout.json"
    file.write_text(content)
    with pytest.raises(ConfigError, match=r"layout\.json"):
        read_layout(str(file), 30)


def test_layout_with_too_many_boxes(tmp_path: Path) -> None:
    file = tmp_path / "layout.json"
    file.write_text(json.dumps(BOXES))
    with pytest.raises(ConfigError, match="2 boxes and the model knows 1"):
        read_layout(str(file), 1)


def test_semantic_map_sets_the_size_and_keeps_its_labels(tmp_path: Path) -> None:
    labels = np.random.default_rng(0).choice([0, 7, 181, 255], size=(40, 52))
    model = config("conditioning.semantic_map={}")
    inputs = sampling_inputs(model, Wishes(semantic_map=picture(tmp_path / "map.png", labels)))
    assert inputs.request.size == (40, 52)
    assert inputs.request.conditions["semantic_map"].dtype == torch.uint8
    assert inputs.request.conditions["semantic_map"][0].numpy().tolist() == labels.tolist()
    resized = sampling_inputs(model, Wishes(semantic_map=str(tmp_path / "map.png"), size=(80, 104)))
    assert set(resized.request.conditions["semantic_map"].unique().tolist()) <= {0, 7, 181, 255}
    assert resized.request.conditions["semantic_map"].shape == (1, 80, 104)


def test_a_coloured_semantic_map_is_refused(photo: str) -> None:
    model = config("conditioning.semantic_map={}")
    with pytest.raises(DataError, match="label indices"):
        sampling_inputs(model, Wishes(semantic_map=photo))


def test_image_to_image_cuts_the_picture_to_whole_cells(photo: str) -> None:
    inputs = sampling_inputs(config("conditioning.openclip={}"), Wishes(prompts=("a", "b"), image=photo))
    assert inputs.request.size == (24, 36)
    assert inputs.request.start is not None
    assert inputs.request.start.pixels.shape == (2, 3, 24, 36)
    assert inputs.request.start.strength == 0.75
    assert inputs.request.start.mask is None
    assert inputs.request.pixels is None
    assert -1 <= float(inputs.request.start.pixels.min()) < -0.9
    given = Wishes(prompts=("a",), image=photo, strength=0.25, size=(48, 48))
    other = sampling_inputs(config("conditioning.openclip={}"), given).request.start
    assert other is not None
    assert (other.strength, other.pixels.shape) == (0.25, (1, 3, 48, 48))


def test_any_model_fills_a_hole_by_replacement(photo: str, hole: str) -> None:
    wishes = Wishes(prompts=("a",), image=photo, mask=hole, per_prompt=2, size=(24, 36))
    inputs = sampling_inputs(config("conditioning.openclip={}"), wishes)
    assert inputs.request.start is not None
    assert inputs.request.start.mask is not None
    assert inputs.request.start.strength == 1.0
    assert inputs.request.start.mask.shape == (2, 1, 24, 36)
    made = torch.full((2, 3, 24, 36), 9, dtype=torch.uint8)
    pasted = inputs.paste(made)
    kept = ((inputs.request.start.pixels + 1) * 127.5).round().to(torch.uint8)
    assert torch.equal(pasted[..., :20], kept[..., :20])
    assert (pasted[..., 20:] == 9).all()


def test_a_model_with_mask_channels_is_given_picture_and_mask(photo: str, hole: str) -> None:
    model = config("conditioning.masked_image={}")
    inputs = sampling_inputs(model, Wishes(image=photo, mask=hole, size=(24, 36)))
    assert inputs.request.start is None
    assert inputs.request.pixels is not None
    assert inputs.request.pixels.shape == (1, 3, 24, 36)
    assert inputs.request.conditions["mask"].shape == (1, 24, 36)
    assert inputs.request.conditions["mask"].float().mean() == pytest.approx(16 / 36)


def test_a_black_mask_is_refused(tmp_path: Path, photo: str) -> None:
    black = picture(tmp_path / "black.png", np.zeros((24, 36)))
    with pytest.raises(ConfigError, match="black everywhere"):
        sampling_inputs(config("conditioning.masked_image={}"), Wishes(image=photo, mask=black))


def test_super_resolution_multiplies_the_size(photo: str) -> None:
    model = config("conditioning.low_resolution={factor: 4, max_noise_level: 350}")
    inputs = sampling_inputs(model, Wishes(image=photo, noise_level=50))
    assert inputs.request.size == (96, 152)
    assert inputs.request.conditions["low_resolution"].shape == (1, 3, 24, 38)
    assert inputs.request.conditions["noise_level"].tolist() == [50]
    assert inputs.request.start is None


def test_depth_of_any_range(tmp_path: Path) -> None:
    file = tmp_path / "depth.png"
    Image.fromarray(np.arange(32 * 32, dtype=np.uint16).reshape(32, 32) * 60).save(file)
    model = config("conditioning.depth={}")
    depth = sampling_inputs(model, Wishes(depth=str(file))).request.conditions["depth"]
    assert depth.shape == (1, 1, 32, 32)
    assert float(depth.max()) == pytest.approx(2 * 60 * 1023 / 65535 - 1)
    assert float(depth.min()) == -1.0


@pytest.mark.parametrize(
    ("sections", "wishes", "sentence"),
    [
        ("{openclip: {}}", Wishes(), "give --prompt"),
        ("{class_label: {}}", Wishes(), "give --class-label"),
        ("{layout: {}}", Wishes(), "give --layout"),
        ("{semantic_map: {}}", Wishes(), "give --semantic-map"),
        ("{depth: {}}", Wishes(), "give --depth"),
        ("{low_resolution: {}}", Wishes(), "the small one with --image"),
        ("{masked_image: {}}", Wishes(image="x.png"), "give --image and --mask"),
        ("{}", Wishes(prompts=("a",)), "leave out --prompt"),
        ("{openclip: {}}", Wishes(prompts=("a",), class_labels=(1,)), "leave out --class-label"),
        ("{openclip: {}}", Wishes(prompts=("a",), layout="x"), "leave out --layout"),
        ("{low_resolution: {}}", Wishes(image="x.png", size=(8, 8)), "leave out --mask, --size"),
        ("{}", Wishes(mask="x.png"), "give --image"),
        ("{}", Wishes(strength=0.5), "give --image"),
        ("{}", Wishes(image="x.png", strength=1.5), "at most at 1"),
        ("{}", Wishes(image="x.png", strength=0.0), "above 0"),
        ("{low_resolution: {}}", Wishes(image="x.png", noise_level=3), "max_noise_level 0"),
        ("{}", Wishes(per_prompt=0), "--per-prompt 0 must lie in 1"),
        ("{}", Wishes(per_prompt=10**12), "must lie in 1 .. 1000000"),
        ("{openclip: {}}", Wishes(prompts=("a",), prompt_chunks=0), "--prompt-chunks 0 must lie in 1 .. 64"),
        ("{text_transformer: {}}", Wishes(prompts=("a",), prompt_chunks=2), "OpenCLIP towers alone"),
    ],
)
def test_what_is_missing_or_means_nothing(sections: str, wishes: Wishes, sentence: str) -> None:
    model = config(f"conditioning={sections}")
    with pytest.raises(ConfigError, match=sentence):
        check_wishes(model.conditioning, wishes)


def test_sizes_and_files_that_cannot_be(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="multiples of 4"):
        sampling_inputs(config(), Wishes(size=(30, 32)))
    with pytest.raises(ConfigError, match=r"no picture .*nowhere\.png"):
        sampling_inputs(config(), Wishes(image=str(tmp_path / "nowhere.png")))
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(DataError, match="cannot be read as a picture"):
        sampling_inputs(config(), Wishes(image=str(tmp_path / "text.png")))
    with pytest.raises(ConfigError, match="smaller than one latent cell"):
        sampling_inputs(config(), Wishes(image=picture(tmp_path / "dot.png", np.zeros((2, 2)))))


def ramp(height: int, width: int) -> np.ndarray:
    """Every turn, mirror and channel shows."""
    y, x = np.mgrid[0:height, 0:width]
    return np.stack([x * 255 // width, y * 255 // height, (x + y) % 97], axis=2).astype(np.uint8)


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def turned(kind: str, orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(Image.fromarray(ramp(40, 56)), kind, exif=exif)


def kinds_of_pictures() -> dict[str, bytes]:
    colours = Image.fromarray(ramp(40, 56))
    deep = Image.fromarray(np.arange(40 * 56, dtype=np.uint16).reshape(40, 56) * 29)
    dark = Image.fromarray(np.arange(40 * 56, dtype=np.uint16).reshape(40, 56) % 250)
    clear = colours.convert("RGBA")
    clear.putalpha(Image.fromarray((ramp(40, 56)[:, :, 0] > 90).astype(np.uint8) * 255))
    hole = colours.quantize(16)
    hole.info["transparency"] = 3
    frames = [colours, Image.new("RGB", (56, 40), "blue")]
    return {
        **{f"turned {kind} {o}": turned(kind, o) for kind in ("JPEG", "PNG", "WEBP", "TIFF") for o in (3, 6)},
        "large JPEG": encoded(Image.fromarray(ramp(400, 560)), "JPEG"),
        "transparent PNG": encoded(clear, "PNG"),
        "transparent WebP": encoded(clear, "WEBP", lossless=True),
        "transparent palette": encoded(hole, "GIF", transparency=3),
        "grey and alpha": encoded(clear.convert("LA"), "PNG"),
        "16-bit grey": encoded(deep, "PNG"),
        "16-bit grey TIFF": encoded(deep, "TIFF"),
        "dark 16-bit grey": encoded(dark, "PNG"),
        "float TIFF": encoded(Image.fromarray(np.asarray(deep, np.float32)), "TIFF"),
        "CMYK": encoded(colours.convert("CMYK"), "JPEG"),
        "palette": encoded(colours.quantize(64), "PNG"),
        "one bit": encoded(colours.convert("1"), "PNG"),
        "animated GIF": encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]),
        "animated WebP": encoded(frames[0], "WEBP", save_all=True, append_images=frames[1:], lossless=True),
    }


def as_trained(tmp_path: Path, members: dict[str, bytes], *conditions: str) -> Batch:
    """What the loader makes of one sample, 32 x 32 from its centre."""
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for extension, data in members.items():
            member = tarfile.TarInfo(f"0.{extension}")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    data = DataConfig(
        shards=str(tmp_path / "0.tar"), image_size=32, crop="center", workers=0, require_caption=False,
        conditions=conditions,
    )  # fmt: skip
    loader = build_loader(data, seed=0, global_batch_size=1)
    batch = next(loader)
    loader.close()
    return batch


@pytest.mark.parametrize(("kind", "data"), kinds_of_pictures().items(), ids=list(kinds_of_pictures()))
def test_pictures_are_read_as_training_reads_them(tmp_path: Path, kind: str, data: bytes) -> None:
    """Beside the loader's own pixels; a mask is their brightness, and a small picture to enlarge whole."""
    extension = "jpg" if data[:2] == b"\xff\xd8" else "png"
    expected = as_trained(tmp_path, {extension: data}).pixels[0]
    file = tmp_path / f"given.{extension}"
    file.write_bytes(data)
    start = sampling_inputs(config("conditioning={}"), Wishes(image=str(file), size=(32, 32))).request.start
    assert start is not None
    assert torch.equal(((start.pixels[0] + 1) * 127.5).round().to(torch.uint8), expected)
    grey = np.asarray(Image.fromarray(expected.permute(1, 2, 0).numpy()).convert("L"))
    if grey.max() >= 128:
        wishes = Wishes(image=str(file), mask=str(file), size=(32, 32))
        masked = sampling_inputs(config("conditioning={}"), wishes).request.start
        assert masked is not None
        assert masked.mask is not None
        same = (masked.mask[0, 0].numpy() == (grey >= 128)).mean()
        assert same > 0.85, "a mask keeps its edges, the picture is averaged"
    enlarge = config("conditioning.low_resolution={factor: 4}")
    low = sampling_inputs(enlarge, Wishes(image=str(file))).request.conditions["low_resolution"]
    upright = (56, 40) if kind.endswith("6") else (400, 560) if kind == "large JPEG" else (40, 56)
    assert low.shape[2:] == upright


@pytest.mark.parametrize("orientation", [1, 3, 6])
def test_maps_are_read_as_training_reads_them(tmp_path: Path, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    labels = Image.fromarray(np.arange(40 * 56, dtype=np.uint8).reshape(40, 56) % 150)
    levels = Image.fromarray(np.arange(40 * 56, dtype=np.uint16).reshape(40, 56) * 29)
    members = {
        "png": encoded(Image.fromarray(ramp(40, 56)), "PNG", exif=exif),
        "seg.png": encoded(labels, "PNG", exif=exif),
        "depth.png": encoded(levels, "PNG", exif=exif),
    }
    batch = as_trained(tmp_path, members, "semantic_map", "depth")
    for name in ("seg.png", "depth.png"):
        (tmp_path / name).write_bytes(members[name])
    model = config("conditioning={semantic_map: {}, depth: {}}")
    files = {"semantic_map": str(tmp_path / "seg.png"), "depth": str(tmp_path / "depth.png")}
    given = sampling_inputs(model, Wishes(**files, size=(32, 32))).request.conditions
    for name in ("semantic_map", "depth"):
        assert torch.equal(given[name][0], batch.conditions[name][0]), name


def test_damaged_files_are_one_sentence(tmp_path: Path) -> None:
    colours = Image.fromarray(ramp(40, 56))
    whole = {
        "jpg": encoded(colours, "JPEG"),
        "png": encoded(colours, "PNG"),
        "webp": encoded(colours, "WEBP"),
    }
    for extension, data in whole.items():
        for share in (0, 0.1, 0.3, 0.6):
            file = tmp_path / f"cut.{extension}"
            file.write_bytes(data[: int(share * len(data))])
            for name in ("image", "semantic_map", "depth"):
                model = config(f"conditioning={{{'' if name == 'image' else f'{name}: {{}}'}}}")
                with pytest.raises(DataError, match=f"cut.{extension} cannot be read as a picture"):
                    sampling_inputs(model, Wishes(**{name: str(file)}))
    with pytest.raises(DataError, match="is a folder"):
        sampling_inputs(config("conditioning={}"), Wishes(image=str(tmp_path)))


def test_a_mask_must_lie_on_its_picture(tmp_path: Path, photo: str) -> None:
    half = np.zeros((24, 38))
    half[:, 20:] = 255
    other = picture(tmp_path / "other.png", half.T)
    with pytest.raises(ConfigError, match="would not lie on the picture"):
        sampling_inputs(config("conditioning={}"), Wishes(image=photo, mask=other))
    larger = picture(tmp_path / "larger.png", half.repeat(2, 0).repeat(2, 1))
    start = sampling_inputs(config("conditioning={}"), Wishes(image=photo, mask=larger)).request.start
    assert start is not None
    assert start.mask is not None
    assert start.mask.shape == (1, 1, 24, 36)
    clear = Image.fromarray(np.zeros((24, 38, 4), np.uint8))
    clear.save(tmp_path / "clear.png")
    with pytest.raises(ConfigError, match="transparent parts count as white"):
        sampling_inputs(config("conditioning={}"), Wishes(image=photo, mask=str(tmp_path / "clear.png")))
